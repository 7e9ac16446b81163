"""How many cores a process may use: limited by its CPU affinity and by the CPU quota of its container."""

import math
import os
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # where Linux shows a container its limits


def usable_cores() -> int:
    """Logical cores, hyper-threads included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        if (CGROUP / "cpu.max").is_file():
            quota, period = (CGROUP / "cpu.max").read_text().split()
        else:  # version 1; -1 means no limit
            quota, period = ((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def physical_cores() -> int:
    """Cores without hyper-threads, which do not speed up matrix products."""
    cores = usable_cores()
    return min(cores, psutil.cpu_count(logical=False) or cores)
