"""The measuring script's own arithmetic and ends: ratios to peers, limits, nothing that lives on."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import lives
from tests.script_modules import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/measure_decode"
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('{\"records\": [1]}')"
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[2]).write_text('{"child": %d}' % child.pid)
time.sleep(SECONDS)
"""

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text('{"records": [1]}')
pathlib.Path("pid").write_text(str(os.getpid()))
os.rename("pid", "part")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("measure_decode")


def until(happened: Callable[[], object]) -> None:
    """Wait for something; fail after ten seconds."""
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_gives_what_it_wrote_and_why_that_is_not_all(script: ModuleType) -> None:
    written = {"records": [1]}
    assert script.run([sys.executable, "-c", WRITE], 60) == (written, None)
    assert script.run([sys.executable, "-c", f"{WRITE}; sys.exit(3)"], 60) == (written, "exit status 3")
    assert script.run([sys.executable, "-c", "raise SystemExit(2)"], 60) == ({}, "exit status 2")
    half = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('{\"records\": [1'); sys.exit(9)"
    assert script.run([sys.executable, "-c", half], 60) == ({}, "exit status 9"), "as cut while it was written"


@pytest.mark.parametrize("flags", [["--output", "there/all.json"], ["--output", "all.json", "--text", "wiki.txt"]])
def test_a_file_or_a_folder_that_is_not_there_ends_it_before_anything_is_measured(
    flags: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "--parts", "accuracy", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith("no such file or folder\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_part_and_keeps_what_it_wrote(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "fastgen").mkdir()  # -m looks into the working directory first
    (tmp_path / "fastgen/__init__.py").touch()
    (tmp_path / "fastgen/bench.py").write_text(SLEEPER)
    command = [sys.executable, str(SCRIPT), "--parts", "texts", "--output", "all.json"]
    command = ["env", "--default-signal=INT", *command]  # a shell has it ignored by what runs in its background
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as parent:
        until((tmp_path / "part").exists)
        parent.send_signal(number)
        _, said = parent.communicate(timeout=60)
    assert (parent.returncode, said) == (130, "")
    kept = json.loads((tmp_path / "all.json").read_text())
    assert (kept["records"], kept["failed"]) == ([1], {"texts bf16": "interrupted"})
    part = int((tmp_path / "part").read_text())
    until(lambda: not lives(part))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("seconds", "problem"), [(60, "cut after 3 s"), (0, None)])
def test_nothing_that_a_part_started_lives_on(script: ModuleType, seconds: int, problem: str | None) -> None:
    found, told = script.run([sys.executable, "-c", PARENT.replace("SECONDS", str(seconds))], 3)
    assert told == problem
    until(lambda: not lives(found["child"]))


def test_every_kind_of_weights_is_measured_in_the_order_of_importance(script: ModuleType) -> None:
    options = argparse.Namespace(
        quant=["bf16", "int4"],
        shape=None,
        parts=list(script.PARTS),
        text=["t.txt"],
        model=["stories"],
        gpt_fast="there",
    )
    names = [part.name for part in script.chosen(options)]
    assert names[:4] == ["texts bf16", "texts int4", "stages bf16", "stages int4"]
    compared = [part.command for part in script.chosen(options) if part.name == "gpt-fast"]
    assert [[word for word in command if word in ("bf16", "int4", *script.GPT_FAST)] for command in compared] == [
        ["bf16", "int4", "llama-2-7b", "llama-3-8b"]
    ]
    commands = {part.name: part.command for part in script.chosen(options)}
    assert "llama-2-70b" in commands["texts int4"] and "--quant" not in commands["texts bf16"]
    options.parts, options.text = ["stages", "accuracy"], None
    assert [part.name for part in script.chosen(options)] == ["stages bf16", "stages int4"]


def test_ratios_stand_beside_peers_of_the_same_model_and_weights(script: ModuleType) -> None:
    def row(system: str, weights: str, rate: float, model: str = "7b") -> dict[str, object]:
        return {"system": system, "model": model, "format": weights, "decode_tokens_per_second": rate}

    steps = {"model": "7b", "format": "bf16", "step_us": {"1": 100.0, "8": 112.0}}
    int4 = "int4-g128-asym, int8"
    parts = {
        "texts bf16": {"records": [row("fastgen", "bf16", 300.0), row("fastgen", "bf16", 9.0, "1b")]},
        "texts int4": {"records": [row("fastgen", int4, 900.0)]},
        "gpt-fast bf16 7b": {"records": [row("gpt-fast", "bf16", 200.0), row("fastgen", "bf16", 299.0)]},
        "gpt-fast int4 7b": {"records": [row("gpt-fast", "int4-g128", 300.0), row("fastgen", int4, 1.0)]},
        "stages bf16": {"records": [steps, {"model": "1b"}]},
        "start": {},
    }  # fmt: skip
    found = script.summary(parts)
    assert [row["decode_tokens_per_second"] for row in found["records"]] == [300.0, 9.0, 900.0, 200.0, 300.0]
    assert [(each["format"], each["peer"], each["ratio"]) for each in found["ratios"]] == [
        ("bf16", "gpt-fast", 1.5), (int4, "gpt-fast", 3.0),
    ]  # fmt: skip
    assert found["steps"] == [{"model": "7b", "format": "bf16", "relative_to_one_token": {"1": 1.0, "8": 1.12}}]
