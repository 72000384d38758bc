"""Runs of torchrun that lose a rank or their agent, at a chosen phase: what was said, and how long until all was gone.

    loss = lose(folder, Disturbance("kill", world=3, rank=1, phase="decode", seconds=0.2))

`disturbances` are those of the long proof, the same every time; `scripts/lose_ranks` records what came of them.
"""

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.torchrun import torchrun

SECONDS = 5.0
"""In which every process must be gone."""

TIMEOUT = 8.0
"""`--timeout` of stalls; less, and ranks that start on a busy machine count as stalled."""

TIMEOUT_ON_GPUS = 20.0
"""The same where kernels may have to be compiled, which one rank may do for all."""

ENDLESS = ("--model", "stories", "--max-new-tokens", "1000", "--ignore-eos", "--device", "cpu")
"""A generation that outlasts any test on a CPU."""

ENDLESS_ON_GPUS = (
    "--shape", "llama-3.2-1b", "--quant", "int4", "--modes", "compile", "--new-tokens", "2000", "--repeats", "1000"
)  # fmt: skip
"""A measurement that does so on GPUs: texts of a model with random weights, one after the other."""

FLAGS = {
    "prefill": ("--prompt", "Once upon a time there was a girl. " * 90),
    "speculation": ("--draft", "embedded", "--speculate", "3"),
}
"""What makes a phase last, or happen."""

SIGNALS = {"kill": signal.SIGKILL, "stall": signal.SIGSTOP, "agent": 0, "fail": None}

DELAYS = {"load": 0.1, "prefill": 0.2, "decode": 1.0, "speculation": 1.0}
"""Seconds within a phase in which something happens."""

COUNTS = {"kill": 25, "stall": 5, "agent": 5, "fail": 5}
"""Of each kind in each phase: 100 ranks killed, 20 stalled, 20 agents killed, and 20 ranks that fail."""

COUNTS_ON_GPUS, PHASES_ON_GPUS = {"kill": 2, "fail": 2, "agent": 1, "stall": 1}, ("load", "prefill", "decode")
"""Of each kind in each of these phases: 18 runs."""


@dataclass(frozen=True)
class Disturbance:
    """What happens to a run, on a "cpu" or on GPUs ("cuda"), so long after a rank has come to a phase: "kill" or
    "stall" of the rank, "agent", or "fail" where the rank next comes on."""

    kind: str
    world: int
    rank: int
    phase: str
    seconds: float
    device: str = "cpu"


@dataclass(frozen=True)
class Loss:
    """What came of it.

    Attributes:
        seconds: from the disturbance until the last process was gone.
        messages: what the survivors said.
    """

    seconds: float
    messages: tuple[str, ...]


def disturbances() -> list[Disturbance]:
    """Return what the long proof does to its runs."""
    chance, found = random.Random(0), []
    for kind, count in COUNTS.items():
        for number in range(count):
            for phase, longest in DELAYS.items():
                world = 2 + number % 2
                delay = round(chance.uniform(0, longest), 3)
                found.append(Disturbance(kind, world, chance.randrange(world), phase, delay))
    return found


def disturbances_on_gpus(world: int) -> list[Disturbance]:
    """Return what `scripts/lose_ranks` does to runs on so many GPUs."""
    chance, found = random.Random(0), []
    for kind, count in COUNTS_ON_GPUS.items():
        for phase in PHASES_ON_GPUS * count:
            delay = round(chance.uniform(0, DELAYS[phase]), 3)
            found.append(Disturbance(kind, world, chance.randrange(world), phase, delay, "cuda"))
    return found


def lose(folder: Path, disturbance: Disturbance) -> Loss:
    """Disturb a run, and check that it ends in time, with the one message that is due."""
    kind, phase = disturbance.kind, disturbance.phase
    marker = folder / "disturbed"
    on_gpus = disturbance.device == "cuda"
    command, flags = ("bench", ENDLESS_ON_GPUS) if on_gpus else ("generate", (*ENDLESS, *FLAGS.get(phase, ())))
    timeout = TIMEOUT_ON_GPUS if on_gpus else TIMEOUT
    plan = {
        "rank": disturbance.rank, "phase": "decode" if phase == "speculation" else phase,
        "seconds": disturbance.seconds, "number": SIGNALS[kind], "marker": str(marker), "command": command,
    }  # fmt: skip
    flags = (*flags, "--timeout", str(timeout))
    allowed = SECONDS + (timeout if kind == "stall" else 0)
    with torchrun(folder, disturbance.world, json.dumps(plan), *flags, module="tests.disturbed_rank") as run:
        run.wait_for_ranks(disturbance.world)
        run.remember()
        run.wait_for_file(marker)
        begin = time.monotonic()
        if kind == "agent":
            run.agents[0].kill()
        run.gone_within(allowed)
        seconds = time.monotonic() - begin
        messages = run.told()
    check_messages(disturbance, messages)
    return Loss(round(seconds, 2), messages)


def check_messages(disturbance: Disturbance, messages: tuple[str, ...]) -> None:
    """One message names the rank, and what became of it."""
    rank = f"rank {disturbance.rank} of {disturbance.world}"
    due = {
        "kill": f"{rank} died in", "stall": f"{rank} has not ", "agent": "torchrun's agent died in",
        "fail": f"{rank} failed in",
    }  # fmt: skip
    assert len(messages) == 1 and due[disturbance.kind] in messages[0], f"{disturbance}: {messages}"
