"""A process beside each rank that ends it where its watch cannot.

The watch (`tp.watch`) is a thread of Python's. Whoever holds the interpreter's lock while it waits for a GPU, which
waits for a rank that is gone, keeps that thread from running, and so does a process whose libraries wait for a GPU as
it ends. So the watch gives a sign of life in every turn to a process that needs nothing of the rank's, and kills it

    torchrun tells the rank to end, or its agent died    after three seconds: the watch takes two
    no sign of life for `timeout`                        then; a rank that is stopped, as by Ctrl-Z, is let be

    python -I -S tp/guard.py RANK AGENT TIMEOUT      # process numbers; signs of life come on stdin
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PERIOD, PATIENCE = 0.5, 3.0


class Guard:
    """The rank's end of it."""

    def __init__(self, timeout: float) -> None:
        numbers = [os.getpid(), os.getppid(), timeout]
        command = [sys.executable, "-I", "-S", __file__, *map(str, numbers)]
        quiet = subprocess.DEVNULL  # else who reads what the rank says would wait for this process too
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, bufsize=0)
        assert self._process.stdin, "it was asked for"
        self._signs = self._process.stdin.fileno()
        os.set_blocking(self._signs, False)

    def beat(self) -> None:
        """Give a sign of life."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._signs, b".")


def keep(rank: int, agent: int, timeout: float) -> None:
    """Return when the rank, this process's parent, has ended; end it where it must."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which of the ranks hears Ctrl-C is the watch's affair
    heard, deadline, listening = time.monotonic(), float("inf"), True
    while os.getppid() == rank:
        if select.select([0] if listening else [], [], [], PERIOD)[0]:
            listening = bool(os.read(0, 4096))  # who ends closes it first, and may not get any further
            heard = time.monotonic()
        if _state(rank) == "T":
            heard = time.monotonic()
        if told or not _lives(agent):
            deadline = min(deadline, time.monotonic() + PATIENCE)
        if time.monotonic() > min(deadline, heard + timeout):
            os.kill(rank, signal.SIGKILL)
            return


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _state(process) != "Z"


def _state(process: int) -> str:
    """Return the letter that proc(5) has for a process's state; nothing where there is no such file."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


if __name__ == "__main__":
    keep(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
