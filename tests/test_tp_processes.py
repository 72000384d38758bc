"""Processes over gloo compute what one computes: logits, greedy and sampled texts, one and three at a time, speculated
or not."""

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch

from tests.sharded import CASES, logits, texts, whole

SIZES = (2, 3, 4)
SAMPLE = [
    (name, size)
    for (name, case), size in zip(CASES.items(), cycle([2, 3, 4, 2]), strict=False)
    if size in case.worlds and len(case.worlds) > 1
]
"""Most cases, each on one number of processes."""

REST = [(name, size) for size in SIZES for name, case in CASES.items() if size in case.worlds]


def check(pairs: list[tuple[str, int]], folder: Path) -> None:
    """Run pairs of a case and a number of processes, and compare all ranks with the model on one."""
    jobs = {str(size): [name for name, wanted in pairs if wanted == size] for size in SIZES}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.rank_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(jobs), folder], env=environment, cwd=Path(__file__).parents[1]
        )
        for rank in range(max(SIZES))
    ]
    assert [worker.wait(timeout=500) for worker in workers] == [0] * max(SIZES)
    found = [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(max(SIZES))]
    for name, size in pairs:
        model = whole(CASES[name])
        expected, expected_texts = logits(model), texts(model)
        for rank in range(size):
            own, own_texts, speculated = found[rank][name, size]
            assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4), f"{name}, rank {rank} of {size}"
            assert own_texts == expected_texts, f"{name}, rank {rank} of {size}"
            assert speculated == {kind: expected_texts[kind] for kind in speculated}, f"{name}, rank {rank} of {size}"


def test_processes_give_the_logits_and_texts_of_one(tmp_path: Path) -> None:
    check(SAMPLE, tmp_path)


@pytest.mark.long
def test_any_number_of_processes_gives_the_logits_and_texts_of_one(tmp_path: Path) -> None:
    check(REST, tmp_path)
