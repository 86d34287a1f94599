"""What Linux says of this machine and of the memory of its processes."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Literal


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def memory_mb(what: Literal["VmRSS", "VmHWM"], process: int | Literal["self"] = "self") -> float:
    """Megabytes that a process holds (VmRSS), or the most that it ever held (VmHWM); 0 once it has ended."""
    found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0
