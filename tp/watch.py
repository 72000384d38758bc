"""The ranks of a run keep an eye on each other, so that none is ever left behind.

A rank that waits for another does so inside a library or on a GPU, where no Python runs. So each has a thread that is
connected to this thread of every other rank. It says every half second how far its rank has come, and ends the process

    a rank died                    its connections close                                         at once
    a rank stalls                  it is silent, or others are ahead of it, for `timeout`        then
    a rank failed with an error    it says so; unless all have failed                            after a second
    rank 0 left                    it says so: Ctrl-C, say                                       at once
    torchrun died                  the kernel sends a signal (Linux), or the parent is another   at once

with one message, by the lowest rank that still lives; a rank that is stopped, or too stuck to say anything, is killed,
by another or by its guard (`tp.guard`). It needs no torch, and imports nothing that takes long: until the ranks are
connected, torchrun's own agent ends all when one ends.

Messages are lines of JSON: {"at": [progress, phase, seconds since]}, {"share": value}, {"lost": [rank, what]},
{"failed": [status, phase, message]}, {"left": status}.
"""

import contextlib
import ctypes
import functools
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fastgen.errors import INTERRUPTED, RankLostError
from tp.guard import Guard
from tp.place import Place, place_from_environment

PERIOD, TURN = 0.5, 0.1
"""Seconds between two things that a rank says of itself, and after which it looks at the others though none spoke."""

QUIET = 4 * PERIOD
"""Seconds after which a rank that says nothing may be stopped."""

GRACE = 1.0  # for the others to fail too, or for the message to be written
INTERRUPT_GRACE = 2.0
BUSY = ("prefill", "decode")
"""Phases in which no step takes long: if no rank comes on, something is wrong even if all are equally far."""

INPUT = "input"
"""The phase in which rank 0 waits for a person, however long, and the others for rank 0."""

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Peer:
    """Another rank, as far as it has told."""

    connection: socket.socket
    machine: str
    pid: int
    heard: float
    buffer: bytearray = field(default_factory=bytearray)  # of a line that has not ended
    progress: int = 0
    phase: str = "start"
    moved: float = field(default_factory=time.monotonic)
    gone: bool = False  # it left or failed: the end of its connection means nothing


class Watch:
    """This process's part in the watch over `place.world` processes; watches nothing before `connect`."""

    def __init__(self) -> None:
        self.place = Place()
        self.connected = False
        self._peers: dict[int, Peer] = {}
        self._progress, self._phase = 0, "start"
        self._came_on, self._moved = True, 0.0  # since the thread last looked; when it found so, by its own clock
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failures: dict[int, tuple[int, str, str]] = {}
        self._all_failed = threading.Event()
        self._interruptible = self._interrupted = False
        self._deadline: tuple[float, int] | None = None  # when to end, and with which status
        self._parent = os.getppid()
        self._messages: int | None = None
        self._guard: Guard | None = None
        self._lost: set[int] = set()  # ranks that died, or said nothing and were killed

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave(0)
        elif isinstance(error, SystemExit):
            self.leave(error.code if isinstance(error.code, int) else 0)
        else:
            self.settle()
            self.fail(1, f"{type(error).__name__}: {error}")

    # What the main thread calls.

    def begin(self, *, silence: bool) -> None:
        """Find this process's place, and follow its parent into death; ranks but the first fall silent, if `silence`.

        Raises `UsageError` for an environment that makes no sense.
        """
        self.place = place_from_environment()
        if self.place.world == 1:
            return
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
        self._messages = os.dup(2)
        if silence and not self.place.leads:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)

    def connect(self, exchange: Callable[[str], Sequence[str]], host: str, timeout: float) -> None:
        """Connect with all ranks and begin to watch.

        `exchange` gives every rank's text for this rank's; `host` is the address at which others reach this machine.
        """
        self._timeout = timeout
        key = secrets.token_hex(16)
        with socket.create_server((host, 0), backlog=self.place.world) as server:
            mine = {"address": server.getsockname()[:2], "key": key, "machine": _machine(), "pid": os.getpid()}
            others = [json.loads(text) for text in exchange(json.dumps(mine))]
            for rank, other in enumerate(others[: self.place.rank]):
                connection = socket.create_connection(tuple(other["address"]), timeout)
                connection.sendall(_hello(self.place.rank, other["key"]))
                self._add(rank, connection, other)
            server.settimeout(timeout)
            while len(self._peers) < self.place.world - 1:
                connection, _ = server.accept()
                connection.settimeout(timeout)
                hello = _read_line(connection)
                known = [rank for rank in range(self.place.world) if secrets.compare_digest(hello, _hello(rank, key))]
                if known:
                    self._add(known[0], connection, others[known[0]])
                else:
                    connection.close()  # a stranger
        self._selector = selectors.DefaultSelector()
        for rank, peer in self._peers.items():
            self._selector.register(peer.connection, selectors.EVENT_READ, rank)
        wakeup, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(wakeup, selectors.EVENT_READ)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            signal.signal(signal.SIGINT, self._on_interrupt)
            signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        name = f"rank {self.place.rank} of {self.place.world}"
        with contextlib.suppress(OSError):  # where there is no room for another process, the watch must do
            self._guard = Guard(self._parent, timeout, name, self._messages if self.place.leads else None)
        self.connected = True
        threading.Thread(target=self._run_or_end, daemon=True, name="watch").start()

    def at(self, phase: str) -> None:
        """Note that this rank has come on, to or within a phase.

        What is compared between ranks are their phases, and steps where all take the same ones.
        """
        changed = phase != self._phase
        self._progress += changed or phase in BUSY
        self._phase, self._came_on = phase, True
        if phase == INPUT and self._interrupted:  # too late for the answer, which has ended
            self._interrupted, self._deadline = False, None
        if changed and self.connected:
            self._send({"at": [self._progress, self._phase, 0.0]})

    def share(self, value: Any) -> Any:
        """Return rank 0's value, on every rank; the others wait for it."""
        if not self.connected:
            return value
        if not self.place.leads:
            return self._shared.get()
        self._send({"share": value})
        return value

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt, at the same place on all ranks, if Ctrl-C was pressed inside `interruptible`."""
        if self.connected and self.share(self._interrupted):
            self._interrupted, self._deadline = False, None
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C wait for `check_interrupt`, and raise KeyboardInterrupt where rank 0 waits for a person."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def fail(self, status: int, message: str) -> bool:
        """Tell the others that this rank ends with an error; returns whether all did, so that it is for rank 0 to say.

        Where others live on, one of them has said it, and this process ends in here; so it does where they are stuck.
        """
        if not self.connected:
            return True
        self._failures[self.place.rank] = (status, self._phase, message)
        self._send({"failed": [status, self._phase, message]})
        self._count_failures()
        if self._all_failed.wait(3 * GRACE):
            return True
        if not self._kill_silent() and self.place.rank == min(self._failures):
            self._say(f"rank {self.place.rank} of {self.place.world} failed in {self._phase}: {message}")
        os._exit(status)

    def settle(self) -> None:
        """Give the thread time to end the process, if what went wrong here is that another rank is gone."""
        if self.connected:
            time.sleep(GRACE)

    def leave(self, status: int) -> None:
        """Tell the others that this process ends as it should."""
        if self.connected:
            self._send({"left": status})

    # What its own thread does.

    def _run_or_end(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001  (whoever is not watched waits for ever)
            self._lose(self.place.rank, f"failed to watch the others ({type(error).__name__}: {error})")

    def _run(self) -> None:
        woken = told = float("-inf")
        while True:
            events = self._selector.select(TURN)
            # One reading of the clock a turn: if we are stopped within the turn, nothing in it has become old.
            now = time.monotonic()
            if now - woken > QUIET:  # we were stopped, perhaps with all the others: their silence means nothing
                for peer in self._peers.values():
                    peer.heard = peer.moved = now
                self._came_on = True
            woken = now
            if self._came_on:
                self._came_on, self._moved = False, now
            for key, _ in events:
                if key.data is None:
                    self._on_signals(key.fileobj.recv(64))  # type: ignore[union-attr]
                else:
                    self._read(key.data)
            if now - told >= PERIOD:  # and not whenever another has spoken: the two would answer each other for ever
                told = now
                self._send({"at": [self._progress, self._phase, now - self._moved]})
                if self._guard:
                    self._guard.beat()
            if os.getppid() != self._parent:
                self._lose(-1, f"torchrun's agent died in {self._phase}")
            self._check_deadline(now)
            self._check_stalls(now)

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.connection)
            if self.place.rank in self._failures:
                if rank not in self._failures and time.monotonic() - peer.heard <= QUIET:
                    os._exit(self._failures[self.place.rank][0])  # that one has told of our failure
                return  # nobody has: `fail` goes on
            if not peer.gone:
                self._lose(rank, f"died in {peer.phase}")
            return
        peer.heard = time.monotonic()
        peer.buffer += data
        if b"\n" not in data:
            return
        *lines, peer.buffer = peer.buffer.split(b"\n")
        for line in lines:
            for kind, value in json.loads(line).items():
                self._take(rank, peer, kind, value)

    def _take(self, rank: int, peer: Peer, kind: str, value: Any) -> None:
        match kind:
            case "at":
                peer.progress, peer.phase = value[:2]
                peer.moved = peer.heard - value[2]
            case "share":
                self._shared.put(value)
            case "failed":
                peer.gone = True
                self._failures[rank] = (value[0], value[1], value[2])
                self._deadline = self._deadline or (peer.heard + GRACE, value[0])
                self._count_failures()
            case "lost":
                self._end_lost(*value)
            case "left":
                peer.gone = True
                if rank == 0:
                    self._deadline = (peer.heard + (0 if value else 5 * GRACE), value)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            if os.getppid() != self._parent:
                self._lose(-1, f"torchrun's agent died in {self._phase}")
            # torchrun ends us because of another rank, which the others may be about to tell.
            self._deadline = (time.monotonic() + GRACE, 128 + signal.SIGTERM)
        if signal.SIGINT in numbers and self.place.leads:
            if not self._interruptible:
                self._kill_silent()
                self.leave(INTERRUPTED)
                os._exit(INTERRUPTED)
            self._interrupted = self._phase != INPUT
            self._deadline = (time.monotonic() + INTERRUPT_GRACE, INTERRUPTED)

    def _on_interrupt(self, number: int, frame: object) -> None:
        if self.place.leads and self._interruptible and self._phase == INPUT:
            raise KeyboardInterrupt

    def _check_deadline(self, now: float) -> None:
        if self._deadline is None or now < self._deadline[0]:
            return
        status = self._deadline[1]
        if self._failures and self.place.rank not in self._failures:
            rank, (status, phase, message) = min(self._failures.items())
            self._kill_silent()
            text = f"rank {rank} of {self.place.world} failed in {phase}: {message}"
            self._end(text, status, self._speaker(self._failures))
        if self.place.rank not in self._failures:
            if status:
                self._kill_silent()
            self.leave(status)
            os._exit(status)

    def _check_stalls(self, now: float) -> None:
        if self._deadline is not None or self._failures:
            return
        for rank, peer in self._peers.items():
            if not peer.gone and now - peer.heard > self._timeout:
                self._lose(rank, f"has not answered for {self._timeout:.0f} s, in {peer.phase}")
        present = [(rank, peer) for rank, peer in self._peers.items() if not peer.gone]
        standing = [(peer.progress, rank, peer.moved, peer.phase) for rank, peer in present]
        standing.append((self._progress, self.place.rank, self._moved, self._phase))
        progress, last, moved, phase = min(standing)
        ahead = phase != INPUT and any(other[0] > progress for other in standing)
        together = all(other[3] in BUSY and now - other[2] > self._timeout for other in standing)
        if now - moved > self._timeout and (ahead or together):
            # Those that wait for a rank have come no farther; the one that says nothing is what they wait for.
            quiet = [(peer.heard, rank, peer.phase) for rank, peer in present if now - peer.heard > QUIET]
            _, last, phase = min(quiet, default=(now, last, phase))
            self._lose(last, f"has not come on for {self._timeout:.0f} s, in {phase}")

    def _lose(self, rank: int, what: str) -> None:
        """End all, because of `rank` (-1: an agent): tell the others, so that all name the same."""
        self._send({"lost": [rank, what]})
        self._end_lost(rank, what)

    def _end_lost(self, rank: int, what: str) -> None:
        self._kill_silent(rank)
        subject = f"rank {rank} of {self.place.world} " if rank >= 0 else ""
        self._end(f"{subject}{what}: all processes end", RankLostError.exit_status, self._speaker([rank]))

    def _kill_silent(self, rank: int = -1) -> bool:
        """Kill `rank` and those that say nothing, being stopped or stuck; return whether others live.

        Only those of this machine can be killed. All are taken for lost before the first ends.
        """
        now, machine = time.monotonic(), _machine()
        silent = {other for other, peer in self._peers.items() if not peer.gone and now - peer.heard > QUIET}
        lost = silent | ({rank} & self._peers.keys())
        self._lost |= lost
        for peer in (self._peers[other] for other in lost):
            if peer.machine == machine:
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)
        return any(not peer.gone for other, peer in self._peers.items() if other not in lost)

    def _speaker(self, others: Iterable[int]) -> int:
        """Return the lowest rank that is neither lost nor one of `others`."""
        return min({*range(self.place.world)} - self._lost - {*others}, default=self.place.rank)

    def _say(self, message: str) -> None:
        os.write(self._messages or 2, f"fastgen: {message}\n".encode())

    def _end(self, message: str, status: int, speaker: int) -> None:
        """End this process, once `speaker` has said why."""
        if self.place.rank == speaker:
            self._say(message)
        elif speaker in self._peers:
            speaking = self._peers[speaker].connection
            speaking.settimeout(GRACE)
            with contextlib.suppress(OSError):
                while speaking.recv(1 << 16):
                    pass
        os._exit(status)

    def _count_failures(self) -> None:
        if len(self._failures) == self.place.world:
            self._all_failed.set()

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # its end is seen where it is read
                    _send_line(peer.connection, _line(message))

    def _add(self, rank: int, connection: socket.socket, told: dict[str, Any]) -> None:
        connection.settimeout(GRACE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[rank] = Peer(connection, told["machine"], told["pid"], time.monotonic())


@functools.cache
def process_watch() -> Watch:
    """Return this process's watch."""
    return Watch()


def _machine() -> str:
    """Return what two processes have in common that can signal each other."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _hello(rank: int, key: str) -> bytes:
    """Return what a rank says first to one that has this key."""
    return _line({"rank": rank, "key": key})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send_line(connection: socket.socket, line: bytes) -> None:
    """Send a line of any length to whoever goes on reading; who does not reads no half of it, but the end."""
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[connection.send(rest) :]
    except TimeoutError:
        connection.shutdown(socket.SHUT_WR)
        raise


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b"\n"
    return line
