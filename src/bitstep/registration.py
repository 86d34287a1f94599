"""Makes plain diffusers able to load packed folders, at no cost to a program that never uses diffusers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def install() -> None:
    """Register with diffusers now if it is imported, otherwise right after it is.

    Importing diffusers takes seconds, which ``bitstep --help`` or a mistyped option should not; and it must not
    matter whether a program imports bitstep or diffusers first.
    """
    if "diffusers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterDiffusers())


def _register() -> None:
    import_module("bitstep.checkpoint")  # which registers, also when it is what brought diffusers in


class _AfterDiffusers(MetaPathFinder):
    """Finds diffusers as the other finders do, and has its loader register the plug-in once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Loader) -> None:
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
