"""What `scripts/measure_accuracy` says of greedy texts: where they part, and how far apart the choices lie."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastgen.engine import Engine
from fastgen.errors import ModelFileError, UsageError
from fastgen.fidelity import widened
from fastgen.kernels import reference
from fastgen.load import load_model
from fastgen.model import Stages
from tests.script_modules import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/measure_accuracy"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which compiles nothing and continues its prompts by six tokens."""
    module = load_script("measure_accuracy")
    monkeypatch.setattr(module, "STEPS", 6)
    monkeypatch.setattr(module, "Engine", lambda model, *, max_seq_len, compile: Engine(model, max_seq_len=max_seq_len))
    return module


def test_the_same_kernels_choose_the_same_tokens(script: ModuleType) -> None:
    plain, ours = (load_model("stories", device="cpu", dtype="bf16") for _ in range(2))
    found = list(script.greedy(widened(plain), plain, ours))
    assert [row["prompt"] for row in found] == list(script.PROMPTS)
    for row in found:
        assert row["texts_part_at"] is None and row["differing_choices"] == [] and row["near_ties_only"]


def test_a_kernel_that_chooses_wrongly_is_told_from_a_near_tie(script: ModuleType) -> None:
    plain, ours = (load_model("stories", device="cpu", dtype="bf16") for _ in range(2))
    stages = {name: getattr(reference, name) for name in Stages.__annotations__}
    stages["greedy_head"] = lambda *given: (reference.greedy_head(*given) + 1) % ours.config.vocab_size
    ours.transformer.stages = SimpleNamespace(**stages)
    for row in script.greedy(widened(plain), plain, ours):
        *choices, parting = row["differing_choices"]
        given = len(ours.tokenizer.encode(row["prompt"]))
        assert [each["at"] for each in choices] == list(range(given, given + 6))
        assert row["texts_part_at"] == given and parting == choices[0]
        assert all(each["kernels"] == each["eager"] + 1 for each in choices)
        assert not row["near_ties_only"]
        assert max(each["gap_in_fp32"] for each in choices) > 10 * max(e["largest_error_of_eager"] for e in choices)


@pytest.mark.parametrize(
    ("model", "text", "status"),
    [("stories", "nothing.txt", UsageError.exit_status), ("nothing", str(SCRIPT), ModelFileError.exit_status)],
)
def test_what_is_not_there_is_said_in_a_line(model: str, text: str, status: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", model, "--text", text]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert re.search(r"^measure_accuracy: .*nothing.*: no such file or folder$", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
