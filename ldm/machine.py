"""This machine's memory. Does without torch."""

import os
from pathlib import Path


def host_memory() -> tuple[float, float]:
    """Bytes of RAM, all and available, within the container's limit if there is one."""
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {row[0]: int(row[1]) for row in rows}
        total, available = 1024 * kib["MemTotal:"], 1024 * kib["MemAvailable:"]
    except FileNotFoundError:  # macOS has no figure for the available memory
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    most = float(limit.read_text().replace("max", "inf")) if limit.exists() else float("inf")
    return min(total, most), min(available, most)
