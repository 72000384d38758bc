"""Processes that a test did not start itself."""

import psutil


def lives(process: int) -> bool:
    """Whether a process runs, or would if it were let: one that has ended and not been waited for does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
