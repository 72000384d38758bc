"""Another rank, as this rank's watch (`tp.watch`) knows it: the connection to it, and what it has told of itself.

    peer = Peer(connection, machine, pid)
    peer.send({"at": [3, "decode", 0.0]}, patience=1.0)
    while peer.receive(): ...peer.lines

Messages are lines of JSON. Who connects proves with its first line that it is the rank that it says it is.
"""

import contextlib
import json
import os
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEND_SECONDS = 1.0
"""Of one attempt to send or receive."""


@dataclass
class Peer:
    """Another rank, as far as it has told; `connection` becomes its own.

    Attributes:
        machine, pid: where it runs; see `machine`.
        progress, phase: how far it has come.
        heard, moved: when it last said something, and when it came so far, by this process's `time.monotonic`.
        gone: it left or failed: the end of its connection means nothing.
        lines: messages that nobody has looked at.
    """

    connection: socket.socket
    machine: str
    pid: int
    progress: int = 0
    phase: str = "start"
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    gone: bool = False
    lines: deque[bytes] = field(default_factory=deque)
    _rest: bytearray = field(default_factory=bytearray)  # of a line that has not ended

    def __post_init__(self) -> None:
        self.connection.settimeout(SEND_SECONDS)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> bool:
        """Wait for a second for something to be said, and add it to `lines`; returns whether it was."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return False
        self._rest += data
        if b"\n" in data:
            *lines, self._rest = self._rest.split(b"\n")
            self.lines.extend(map(bytes, lines))
        return bool(data)

    def has_said(self, seconds: float) -> bool:
        """Return whether it says within so many seconds that it has told the user why all end."""
        end, heard = time.monotonic() + seconds, True
        while not (said := any(line.startswith(b'{"said"') for line in self.lines)) and heard:
            self.connection.settimeout(max(end - time.monotonic(), 0.001))
            heard = self.receive()
        self.connection.settimeout(SEND_SECONDS)
        return said

    def send(self, message: dict[str, Any], patience: float) -> None:
        """Send a message of any length, if something of it is taken every `patience` seconds.

        Raises `OSError` otherwise; then the other reads no half of it, but the end of the connection.
        """
        rest, moved = memoryview(_line(message)), time.monotonic()
        while rest:
            try:
                rest = rest[self.connection.send(rest) :]
                moved = time.monotonic()
            except TimeoutError:
                if time.monotonic() - moved >= patience:
                    self.connection.shutdown(socket.SHUT_WR)
                    raise

    def kill(self) -> None:
        """Kill it, if it runs on this machine and has not left by itself."""
        if not self.gone and self.machine == machine():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def machine() -> str:
    """Return what two processes have in common that can signal each other."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def hello(rank: int, key: str) -> bytes:
    """Return what a rank says first to one that has this key."""
    return _line({"rank": rank, "key": key})


def read_line(connection: socket.socket) -> bytes:
    """Return the first line that somebody says, or what was said of it."""
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b"\n"
    return line


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
