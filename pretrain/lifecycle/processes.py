"""What the kernel says of processes on this host."""

import os
from pathlib import Path


def process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since the boot; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def process_age_s(pid: int) -> float:
    """How long ago a process started; 0 when there is no such process, and where the kernel does not tell."""
    start = process_start(pid)
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return 0.0
    return uptime_s - int(start) / os.sysconf("SC_CLK_TCK") if start else 0.0


def pid_space() -> str:
    """Names what process ids count in: a boot of a kernel and a namespace on it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
