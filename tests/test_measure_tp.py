"""`scripts/measure_tp` measures case after case, and goes on where one fails, or where a run is silent."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastgen.device import DTYPES, choose_placement
from tests.script_modules import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "measure_tp"

BENCH = """
import json, pathlib, sys, time
cases, output, records = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), []
for case in cases:
    if case == "bad":
        sys.exit("fastgen.bench: it does not fit\\n" + "torchrun's traceback\\n" * 60 + "fastgen.bench FAILED")
    if case == "mute":
        time.sleep(600)
    records.append({"case": case})
    output.with_suffix(".new").write_text(json.dumps({"records": records}))
    output.with_suffix(".new").replace(output)
"""
"""In place of torchrun and `fastgen.bench`."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose runs are `BENCH`'s."""
    module = load_script("measure_tp")

    def command(self: object, world: int, cases: list[str], output: Path) -> list[str]:
        return [sys.executable, "-S", "-c", BENCH, json.dumps(cases), str(output)]

    monkeypatch.setattr(module.Run, "command", command)
    return module


def measured(script: ModuleType, folder: Path, *cases: str, limit: float = 500.0, worlds: int = 1) -> dict[str, Any]:
    """The document that a run of the script leaves."""
    output = folder / "result.json"
    run = script.Run(argparse.Namespace(shape=list(cases), limit=limit, patience=5.0, output=output))
    for world in range(2, 2 + worlds):
        run.measure(world)
    assert list(folder.iterdir()) == [output]
    return json.loads(output.read_text())


def test_a_case_that_fails_or_hangs_is_named_and_the_others_are_measured(script: ModuleType, tmp_path: Path) -> None:
    found = measured(script, tmp_path, "a", "bad", "b", "mute", "c")
    assert found["records"] == [{"case": "a"}, {"case": "b"}, {"case": "c"}]
    assert found["failed"] == [
        {"world_size": 2, "case": "bad", "why": "fastgen.bench: it does not fit"},
        {"world_size": 2, "case": "mute", "why": "no record for 5 s"},
    ]
    assert found["left_out"] == []


def test_every_number_of_ranks_measures_all_cases_and_keeps_the_others_records(
    script: ModuleType, tmp_path: Path
) -> None:
    found = measured(script, tmp_path, "a", "bad", "b", worlds=2)
    assert found["records"] == [{"case": "a"}, {"case": "b"}] * 2
    assert [failure["world_size"] for failure in found["failed"]] == [2, 3]


def test_no_case_begins_behind_the_limit(script: ModuleType, tmp_path: Path) -> None:
    found = measured(script, tmp_path, "a", "b", limit=0.0)
    assert found["records"] == []
    assert [(case["case"], case["why"]) for case in found["left_out"]] == [(name, "the time was over") for name in "ab"]


def test_ranks_that_cannot_even_start_are_given_up(script: ModuleType, tmp_path: Path) -> None:
    found = measured(script, tmp_path, "bad", "bad", "bad", "a")
    assert len(found["failed"]) == 3 and not found["records"]
    assert [case["case"] for case in found["left_out"]] == ["a"]


def test_a_folder_that_is_not_there_ends_it_before_anything_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--output", str(tmp_path / "there" / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith("no such folder\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "names"),
    [("llama-9", "llama-2-7b, llama-2-70b, "), ("stories15m:int3", "int8, int4, q8_0 behind"), ("stories15m:", "int8")],
)
def test_a_case_that_there_is_not_ends_it_before_anything_is_measured(case: str, names: str, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--output", str(tmp_path / "result.json"), "--shape", "stories15m"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([*command, "--shape", case], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"--shape {case}: expected one of {names}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_ranks_of_a_cpu_are_measured_with_their_sums(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    cases = ["--shape", "stories15m:int8", "--shape", "stories15m"]
    few = ["--device", "cpu", "--worlds", "2", "--new-tokens", "3", "--repeats", "1", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        [sys.executable, SCRIPT, *cases, *few], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(output.read_text())["records"]
    native = next(name for name, dtype in DTYPES.items() if dtype == choose_placement("cpu").dtype)
    assert [(record["format"], record["world_size"]) for record in records] == [("int8", 2), (native, 2)]
    assert all(record["all_reduce_us"] > 0 for record in records)
