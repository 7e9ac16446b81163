"""How many cores a process may use: those it is bound to, and those that a container is granted the time of."""

import math
import os
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # of Linux, where containers find their limits


def usable_cores() -> int:
    """Also the second threads of a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        if (CGROUP / "cpu.max").is_file():
            quota, period = (CGROUP / "cpu.max").read_text().split()
        else:  # version 1, which says -1 for none
            quota, period = ((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def physical_cores() -> int:
    """Without the second threads of a core, which do not make matrices faster."""
    cores = usable_cores()
    return min(cores, psutil.cpu_count(logical=False) or cores)
