"""A process beside each rank that ends it where its watch cannot.

The watch (`tp.watch`) is a thread of Python's. Whoever holds the interpreter's lock while it waits for a GPU, which
waits for a rank that is gone, keeps that thread from running, and so does a process whose libraries wait for a GPU as
it ends. So the watch gives a sign of life every half second to a process that needs nothing of the rank's, and kills it

    torchrun tells the rank to end, or its agent died    after three seconds: the watch takes two
    no sign of life for `timeout`                        after three seconds more, which the other ranks' watches have

A rank that is stopped, as by Ctrl-Z, is let be (Linux). A rank that is stuck on one machine hears of a loss on another
by its own agent, or by its silence.

    python -I -S tp/guard.py RANK AGENT TIMEOUT NAME      # process numbers; signs of life come on stdin
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TURN, PATIENCE = 0.5, 3.0
LONG = 4 * TURN
"""Seconds of a turn after which this process must have been stopped too, and the rank's silence means nothing."""


class Guard:
    """The rank's end of it.

    Args:
        agent: the process number of the rank's parent.
        name: what to call the rank in a message, which goes to the file `messages`; to none where that is None.
    """

    def __init__(self, agent: int, timeout: float, name: str, messages: int | None) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(agent), str(timeout), name]
        quiet = subprocess.DEVNULL  # else who reads what the rank says would wait for this process too
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the guard knows what to do with it
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet if messages is None else messages, bufsize=0
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin, "it was asked for"
        self._signs = self._process.stdin.fileno()
        os.set_blocking(self._signs, False)

    def beat(self) -> None:
        """Give a sign of life."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._signs, b".")


def keep(rank: int, agent: int, timeout: float, name: str) -> None:
    """Return when the rank, this process's parent, has ended; end it where it must."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which of the ranks hears Ctrl-C is the watch's affair
    heard = woken = time.monotonic()
    deadline, listening = float("inf"), True
    while os.getppid() == rank:
        alive = bool(select.select([0] if listening else [], [], [], TURN)[0])
        if alive:
            listening = bool(os.read(0, 4096))  # at the end of file there is nothing more to hear
        now = time.monotonic()
        if alive or now - woken > LONG or _state(rank) in ("T", "t"):
            heard = now
        woken = now
        if told or not _lives(agent):
            deadline = min(deadline, now + PATIENCE)
        if now > min(deadline, heard + timeout + PATIENCE):
            os.kill(rank, signal.SIGKILL)
            if now <= deadline:
                write_line(2, f"fastgen: {name} has given no sign of life for {timeout:g} s: it is ended")
            return


def write_line(file: int, text: str) -> None:
    """Write a line, if it can be written within a second: ends must not wait for who reads of them."""
    line = text.encode(errors="backslashreplace")[: select.PIPE_BUF - 1] + b"\n"  # a pipe that is ready takes so many
    with contextlib.suppress(OSError):
        if select.select([], [file], [], 1.0)[1]:
            os.write(file, line)


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
    keep(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
