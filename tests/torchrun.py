"""Runs of torchrun to be disturbed: started on gloo, found in /proc, and gone to the last process in time."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""Of what is started: two processes on two cores take one thread each."""

PORT = str(20000 + os.getpid() % 10000)
"""Another for every worker of pytest."""

PATIENCE = 120.0
"""Seconds for anything to happen on a busy machine."""


class Run:
    """A run of torchrun and all processes that it started."""

    def __init__(self, agents: Sequence[subprocess.Popen], errors: Path) -> None:
        self.agents, self.errors = agents, errors

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that compute, by rank, as far as they have started."""
        found = {}
        for agent in self.agents:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(agent.pid).children():
                    with contextlib.suppress(psutil.Error, KeyError):
                        found[int(child.environ()["RANK"])] = child
        return found

    def message(self) -> str:
        """What was written to stderr so far."""
        return self.errors.read_text()

    def told(self) -> tuple[str, ...]:
        """What fastgen said on stderr, line by line."""
        return tuple(line for line in self.message().splitlines() if "fastgen: " in line)

    def wait_for(self, text: str) -> None:
        """Return once stderr or stdout holds a text."""
        self._wait(lambda: text in self.message())

    def wait_for_ranks(self, world: int) -> None:
        """Return once so many processes have started."""
        self._wait(lambda: len(self.ranks()) == world)

    def wait_for_file(self, path: Path) -> None:
        """Return once a file is there."""
        self._wait(path.exists)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_done():
            assert time.monotonic() < deadline and self.agents[0].poll() is None, self.message()
            time.sleep(0.01)

    def gone_within(self, seconds: float, *, agents: bool = True) -> None:
        """Check that no process of the run is left after so many seconds; torchrun's own may be slow to say goodbye."""
        deadline = time.monotonic() + seconds
        own = {agent.pid for agent in self.agents}
        family = [process for process in self._family if agents or process.pid not in own]
        while left := [process for process in family if process.is_running() and not _is_dead(process)]:
            assert time.monotonic() < deadline, f"left after {seconds} s: {left}\n{self.message()}"
            time.sleep(0.02)

    def remember(self) -> None:
        """Note all processes of the run: who is asked later may have lost its parent."""
        parents = [psutil.Process(agent.pid) for agent in self.agents]
        self._family = [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


@contextlib.contextmanager
def torchrun(
    folder: Path,
    world: int,
    *flags: str,
    prefixes: Sequence[Sequence[str]] = ((),),
    address: str = "127.0.0.1",
    module: str = "fastgen.generate",
) -> Iterator[Run]:
    """Start `module` on `world` ranks for each of `prefixes`, commands in front of the agents' own.

    stdout and stderr go to one file. Whatever is left at the end is killed.
    """
    common = ["--nproc-per-node", str(world), "--master-addr", address, "--master-port", PORT]
    common += ["--nnodes", str(len(prefixes))]
    errors = folder / "messages"
    agents = []
    with errors.open("w") as file:
        for node, prefix in enumerate(prefixes):
            command = [*prefix, sys.executable, "-m", "torch.distributed.run", *common, "--node-rank", str(node)]
            command += ["-m", module, *flags]
            agents.append(subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT, start_new_session=True))
    run = Run(agents, errors)
    try:
        yield run
    finally:
        for agent in agents:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.kill()
            agent.kill()
            agent.wait()


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
