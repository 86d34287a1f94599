"""``python -m bitstep`` is ``bitstep``."""

from bitstep.cli import main

main()
