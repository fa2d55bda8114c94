"""Huge pages for programs that compute on the CPU."""

import contextlib
import glob
import os
import re
import sys
from pathlib import Path

# glibc's manual, "Memory Allocation Tunables" (from version 2.35 on): huge pages; and pieces of up to
# 64 MiB, which is what the heap of a thread can hold, stay with the process.
SETTINGS = (
    "glibc.malloc.hugetlb=1",
    f"glibc.malloc.mmap_threshold={64 << 20}",
    f"glibc.malloc.trim_threshold={64 << 20}",
)
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Files that the drivers of TPUs, NVIDIA's and AMD's GPUs make.
ACCELERATORS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_huge_pages() -> None:
    """Begin this program again with GLIBC_TUNABLES set, where that makes it faster; else do nothing.

    A program of XLA:CPU asks for all of its temporary memory at once and gives it back at its end, so
    the kernel clears each page of it anew in every step: a third of the time of a training step with
    12,000 pages of 4 KiB (docs/performance.md). With pages of 2 MiB it is a few percent. glibc asks the
    kernel for such pages only where its setting says so when a process begins. So the process executes
    its own command line once more and keeps its number; the child processes inherit the setting.

    It is not needed where the system gives huge pages without being asked or does not give them at all
    (`SYSTEM`), with another C library, and where JAX computes on an accelerator: that is, JAX_PLATFORMS
    does not begin with cpu and there is a TPU's or a GPU's device file. Where the environment has
    GLIBC_TUNABLES, an empty one too, that is left as it is.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.executable or not _helps():
        return
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    with contextlib.suppress(OSError):  # where it may not, it goes on as it is
        os.execve(command[0], command, os.environ | {"GLIBC_TUNABLES": ":".join(SETTINGS)})


def _helps() -> bool:
    """Whether the setting makes a difference to what JAX computes here."""
    try:
        on_request = "[madvise]" in SYSTEM.read_text()
        libc = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (OSError, ValueError, AttributeError):  # no such file, name or function: not Linux with glibc
        return False
    known = libc is not None and (int(libc[1]), int(libc[2])) >= (2, 35)
    return on_request and known and not _has_accelerator()


def _has_accelerator() -> bool:
    """Whether JAX's default device will be a TPU or a GPU, told without starting it."""
    if os.environ.get("JAX_PLATFORMS"):
        return not os.environ["JAX_PLATFORMS"].startswith("cpu")
    return any(map(glob.glob, ACCELERATORS))
