"""The ranks of a run keep an eye on each other, so that none is ever left behind.

A rank that waits for another does so inside a library or on a GPU, where no Python runs. So each has a thread that is
connected to this thread of every other rank. It says every half second how far its rank has come, and ends the process

    a rank died                    its connections close                                         at once
    a rank stalls                  it is silent, or others are ahead of it, for `timeout`        then
    a rank failed with an error    it says so; unless all have failed                            after a second
    rank 0 left                    it says so: Ctrl-C, say                                       at once
                                   it is through                                                 after five seconds
    a rank was told to end         it says so, and nobody told this one                          after a second
    torchrun died                  the kernel sends a signal (Linux), or the parent is another   at once

with one message, by the lowest rank that still lives; a rank that is stopped, or too stuck to say anything, is killed,
by another or by its guard (`tp.guard`). It needs no torch, and imports nothing that takes long: until the ranks are
connected, torchrun's own agent ends all when one ends, and without that agent they do not meet.

Messages are lines of JSON: {"at": [progress, phase, seconds since]}, {"share": value}, {"lost": [rank, what]},
{"failed": [status, phase, message]}, {"left": status}, {"said": status}: the user knows why all end with this status.
"""

import contextlib
import ctypes
import functools
import json
import math
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
from types import TracebackType
from typing import Any, NoReturn

from fastgen.errors import INTERRUPTED, RankLostError
from tp.guard import Guard, write_line
from tp.peer import Peer, hello, machine, read_line
from tp.place import Place, place_from_environment

PERIOD, TURN = 0.5, 0.1
"""Seconds between two things that a rank says of itself, and after which it looks at the others though none spoke."""

STALE = PERIOD + TURN
"""Seconds that what is known of another rank may be old."""

QUIET = 4 * PERIOD
"""Seconds after which a rank that says nothing may be stopped."""

GRACE = 1.0  # for the others to fail too, or for the message to be written
INTERRUPT_GRACE = 2.0
BUSY = ("prefill", "decode")
"""Phases in which no step takes long: if no rank comes on, something is wrong even if all are equally far."""

INPUT = "input"
"""The phase in which rank 0 waits for a person, however long, and the others for rank 0."""

JOIN = "join"
"""The phase in which a rank waits for the others outside of a step: it is ahead of those that have not come."""

JOIN_SECONDS = 60.0
"""What all of them may take there, whatever the timeout: GPUs and NCCL start."""

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a rank that was told to end."""


class Watch:
    """This process's part in the watch over `place.world` processes; watches nothing before `connect`."""

    def __init__(self) -> None:
        self.place = Place()
        self.connected = False
        self._peers: dict[int, Peer] = {}
        self._progress, self._phase = 0, "start"
        self._came_on, self._moved = True, 0.0  # since the thread last looked; when it found so, by its own clock
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._failures: dict[int, tuple[int, str, str]] = {}
        self._all_failed = threading.Event()
        self._interruptible = self._interrupted = False
        self._pressed = float("-inf")  # when Ctrl-C was
        self._deadline: tuple[float, int] | None = None  # when to end, and with which status
        self._parent = os.getppid()
        self._messages: int | None = None
        self._silenced = False
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

        Raises `UsageError` for an environment that makes no sense, `RankLostError` if the parent has died.
        """
        self.place = place_from_environment()
        if self.place.world == 1:
            return
        self._messages = os.dup(2)
        self._silenced = silence and not self.place.leads
        if self._silenced:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != self._parent:  # before that signal was asked for
            raise RankLostError("torchrun's agent died as its processes started")

    def connect(self, exchange: Callable[[str], Sequence[str]], host: str, timeout: float) -> None:
        """Connect with all ranks and begin to watch.

        `exchange` gives every rank's text for this rank's; `host` is the address at which others reach this machine.
        """
        self._timeout = timeout
        key = secrets.token_hex(16)
        with socket.create_server((host, 0), backlog=self.place.world) as server:
            mine = {"address": server.getsockname()[:2], "key": key, "machine": machine(), "pid": os.getpid()}
            others = [json.loads(text) for text in exchange(json.dumps(mine))]
            for rank, other in enumerate(others[: self.place.rank]):
                connection = socket.create_connection(tuple(other["address"]), timeout)
                connection.sendall(hello(self.place.rank, other["key"]))
                self._peers[rank] = Peer(connection, other["machine"], other["pid"])
            server.settimeout(timeout)
            while len(self._peers) < self.place.world - 1:
                connection, _ = server.accept()
                connection.settimeout(timeout)
                word = read_line(connection)
                known = [rank for rank in range(self.place.world) if secrets.compare_digest(word, hello(rank, key))]
                if known:
                    other = others[known[0]]
                    self._peers[known[0]] = Peer(connection, other["machine"], other["pid"])
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
            self._forget_interrupt()
        if changed and self.connected:
            self._tell_place(0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the others inside, outside of any step: one that never comes is missed."""
        phase = self._phase
        self.at(JOIN)
        yield
        self.at(phase)

    def share(self, value: Any) -> Any:
        """Return rank 0's value, on every rank; the others wait for it."""
        if not self.connected:
            return value
        if not self.place.leads:
            return self._shared.get()
        self._send({"share": value}, patience=self._timeout)  # of any length, to ranks that may be importing torch
        return value

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt, at the same place on all ranks, if Ctrl-C was pressed inside `interruptible`."""
        if self.connected and self.share(self._interrupted):
            self._forget_interrupt()
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
        Before the ranks are connected, the first of every machine says what rank 0 may not know.
        """
        if not self.connected:
            if self._silenced and self.place.local == 0:
                self._say(f"rank {self.place.rank} of {self.place.world}: {message}")
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
                self._tell_place(now - self._moved)
                if self._guard:
                    self._guard.beat()
            if os.getppid() != self._parent:
                self._lose(-1, f"torchrun's agent died in {self._phase}")
            self._check_deadline(now)
            self._check_stalls(now)

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        if not peer.receive():
            self._selector.unregister(peer.connection)
            # Who fails waits in `fail` until one says so.
            if not peer.gone and self.place.rank not in self._failures:
                self._lose(rank, f"died in {peer.phase}")
            return
        peer.heard = time.monotonic()
        while peer.lines:
            for kind, value in json.loads(peer.lines.popleft()).items():
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
                self._end_at(peer.heard + GRACE, value[0])
                self._count_failures()
            case "lost":
                self._end_lost(*value)
            case "said":
                self._kill_silent()
                os._exit(self._failures.get(self.place.rank, (value,))[0])
            case "left":
                peer.gone = True
                if value == TERMINATED and self._deadline is None:
                    self._lose(rank, f"was told to end in {peer.phase}")
                if rank == 0:
                    self._end_at(peer.heard + (0 if value else 5 * GRACE), value)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            if os.getppid() != self._parent:
                self._lose(-1, f"torchrun's agent died in {self._phase}")
            # torchrun ends us because of another rank, which the others may be about to tell.
            self._end_at(time.monotonic() + GRACE, TERMINATED)
        repeated = time.monotonic() - self._pressed < GRACE  # torchrun passes its own Ctrl-C on to us, who had ours
        if signal.SIGINT in numbers and self.place.leads and not repeated:
            self._pressed = time.monotonic()
            if not self._interruptible:
                self._kill_silent()
                self.leave(INTERRUPTED)
                os._exit(INTERRUPTED)
            self._interrupted = self._phase != INPUT
            self._end_at(time.monotonic() + INTERRUPT_GRACE, INTERRUPTED)

    def _end_at(self, end: float, status: int) -> None:
        """End this process then, unless something ends it before."""
        self._deadline = min(self._deadline or (end, status), (end, status))

    def _forget_interrupt(self) -> None:
        self._interrupted = False
        if self._deadline and self._deadline[1] == INTERRUPTED:
            self._deadline = None

    def _on_interrupt(self, number: int, frame: object) -> None:
        if self.place.leads and self._interruptible and self._phase == INPUT:
            raise KeyboardInterrupt

    def _check_deadline(self, now: float) -> None:
        end, status = self._deadline or (float("inf"), 0)
        if now < end:
            return
        if self._failures and self.place.rank not in self._failures:
            rank, (status, phase, message) = min(self._failures.items())
            self._kill_silent()
            text = f"rank {rank} of {self.place.world} failed in {phase}: {message}"
            self._end(text, status, self._failures)
        if self.place.rank not in self._failures:
            if status:
                self._kill_silent()
            self.leave(status)
            os._exit(status)

    def _check_stalls(self, now: float) -> None:
        present = [(rank, peer) for rank, peer in self._peers.items() if not peer.gone]
        if self._deadline is not None or self._failures or not present:
            return
        patience = self._timeout + STALE
        for rank, peer in present:
            if now - peer.heard > patience:
                self._lose(rank, f"has not answered for {self._timeout:g} s, in {peer.phase}")
        standing = [(peer.progress, rank, peer.moved, peer.phase) for rank, peer in present]
        standing.append((self._progress, self.place.rank, self._moved, self._phase))
        progress, last, moved, phase = min(standing)
        ahead = phase != INPUT and any(other[0] > progress for other in standing)
        limits = {JOIN: max(self._timeout, JOIN_SECONDS)} | dict.fromkeys(BUSY, self._timeout)
        together = all(now - other[2] > limits.get(other[3], math.inf) + STALE for other in standing)
        if now - moved > patience and (ahead or together):
            # Those that wait for a rank have come no farther; the one that says nothing is what they wait for.
            quiet = [(peer.heard, rank, peer.phase) for rank, peer in present if now - peer.heard > QUIET]
            _, last, phase = min(quiet, default=(now, last, phase))
            if ahead or quiet:
                self._lose(last, f"has not come on for {self._timeout:g} s, in {phase}")
            self._lose(-1, f"no rank has come on for {limits[phase]:g} s, in {phase}")

    def _lose(self, rank: int, what: str) -> NoReturn:
        """End all, because of `rank` (-1: an agent, or nobody knows): tell the others, so that all name the same."""
        self._send({"lost": [rank, what]})
        self._end_lost(rank, what)

    def _end_lost(self, rank: int, what: str) -> NoReturn:
        self._kill_silent(rank)
        subject = f"rank {rank} of {self.place.world} " if rank >= 0 else ""
        self._end(f"{subject}{what}: all processes end", RankLostError.exit_status, [rank])

    def _kill_silent(self, rank: int = -1) -> bool:
        """Kill `rank` and those that say nothing, being stopped or stuck; return whether others live.

        Only those of this machine can be killed. All are taken for lost before the first ends.
        """
        now = time.monotonic()
        silent = {other for other, peer in self._peers.items() if not peer.gone and now - peer.heard > QUIET}
        lost = silent | ({rank} & self._peers.keys())
        self._kill(lost)
        return any(not peer.gone for other, peer in self._peers.items() if other not in lost)

    def _kill(self, ranks: set[int]) -> None:
        self._lost |= ranks
        for rank in ranks:
            self._peers[rank].kill()

    def _say(self, message: str) -> None:
        write_line(2 if self._messages is None else self._messages, f"fastgen: {message}")

    def _end(self, message: str, status: int, others: Iterable[int]) -> NoReturn:
        """End this process, once the lowest rank that lives, and is none of `others`, has said why."""
        end, rank = time.monotonic() + GRACE, self.place.rank
        for other in sorted(self._peers.keys() - self._lost - {*others}):
            if other < rank or rank in others:
                # The first has a second; those after it have waited for it as we have.
                if self._peers[other].has_said(max(end - time.monotonic(), GRACE / 3)):
                    os._exit(status)
                self._kill({other})  # it died as well, or is stuck
        if not any(peer.has_said(0.0) for peer in self._peers.values()):  # one that took this process for stuck
            self._say(message)
            self._send({"said": status})
        os._exit(status)

    def _count_failures(self) -> None:
        if len(self._failures) == self.place.world:
            self._all_failed.set()

    def _tell_place(self, seconds: float) -> None:
        with self._lock:  # in which order two threads tell it, and not something older last
            self._send({"at": [self._progress, self._phase, seconds]})

    def _send(self, message: dict[str, Any], *, patience: float = GRACE) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # its end is seen where it is read
                    peer.send(message, patience)


@functools.cache
def process_watch() -> Watch:
    """Return this process's watch."""
    return Watch()
