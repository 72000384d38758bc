"""The script that reads hardware counters: ncu's table, a record a launch; and what it says without ncu."""

import csv
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.script_modules import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/read_counters"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("read_counters")


def test_a_tables_rows_become_a_record_a_launch_with_the_tokens_of_its_step(script: ModuleType) -> None:
    values = {"us": "10,176", "dram_bytes": "26,375,424", "dram_percent": "54.01", "issue_percent": "26.4",
              "registers": "85"}  # fmt: skip
    table = ['"ID","Kernel Name","Metric Name","Metric Value"']
    for launch, kernel in enumerate(
        ["packed_linear_kernel(int, int)", "pick_token_kernel(int)", "prepare_kernel(int)"]
    ):
        pairs = {script.COUNTERS[name]: value for name, value in values.items()}
        pairs |= {script.STALL.format(why): "2.91" if why == "barrier" else "n/a" for why in script.STALLS}
        table += [f'"{launch}","{kernel}","{name}","{value}"' for name, value in pairs.items()]
    first, second, third = script.kernels(csv.DictReader(table))
    assert first == {
        "tokens": 1, "kernel": "packed_linear_kernel", "us": 10.176, "dram_bytes": 26375424.0, "dram_percent": 54.01,
        "issue_percent": 26.4, "registers": 85.0, "stalls": {"barrier": 2.91},
    }  # fmt: skip
    assert (second["tokens"], third["tokens"]) == (1, 8), "a step ends with the token that is picked"
    assert script.line_of(first).endswith("10.2 us   26.4 MB  DRAM 54%  issue 26%  barrier 2.9")


def test_without_ncu_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "counters.json")]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "ncu: not found; it comes with the CUDA toolkit (Nsight Compute)\n")
