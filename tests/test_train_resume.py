"""Runs that stop and go on: exactly as if they had not stopped, from the last good state, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.errors import CapacityError, ModelFileError, UsageError
from fastgen.load import load_model
from fastgen.manifest import verify_manifest, write_manifest
from fastgen.train import main
from fastgen.training.trainer import Trainer
from tests.training_runs import TEXT, document, flags, full_disk, interrupt, without

STATE = "training_state.safetensors"

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_an_interrupted_and_resumed_command_equals_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = flags(tmp_path)
    whole = document([*words, "--out", str(tmp_path / "whole")], capsys)
    interrupt(words, 4, monkeypatch)
    assert "interrupted at step 4. The run as of step 4 is in" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unfinished run; add --resume"):
        main(words)
    resumed = document([*words, "--resume"], capsys)
    assert resumed["losses"] == whole["losses"] and resumed["validations"] == whole["validations"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "out" / "training_state.safetensors").exists()


def test_a_nan_stops_the_run_and_its_last_good_state_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = document([*flags(tmp_path), "--out", str(tmp_path / "whole")], capsys)
    advance = Trainer.advance

    def poisoned(self: Trainer, until: int) -> None:
        if self.step == 4:
            with torch.no_grad():
                self.model.norm.weight[0] = torch.nan
        advance(self, until)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", poisoned)
        with pytest.raises(UsageError, match=r"step 5: the loss is nan.*\nLower.*\nThe run as of step 4 is in .*out"):
            main(flags(tmp_path))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / STATE).values())
    assert document([*flags(tmp_path), "--resume"], capsys)["losses"] == whole["losses"]


def test_a_run_goes_on_only_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = flags(tmp_path)
    with pytest.raises(UsageError, match="holds no unfinished run"):
        main([*words, "--resume"])
    interrupt(words, 2, monkeypatch)
    with pytest.raises(UsageError, match=r"began with seed 0, not 5"):
        main([*words, "--resume", "--seed", "5"])


def test_a_full_disk_while_saving_keeps_the_last_good_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = flags(tmp_path)
    interrupt(words, 2, monkeypatch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with full_disk(20_000), pytest.raises(CapacityError, match=r"cannot be written.*\n.*\nThe run as of step 2 is in"):
        main([*words, "--resume"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_a_diverging_run_keeps_its_last_good_state(tmp_path: Path) -> None:
    words = flags(tmp_path)
    with pytest.raises(UsageError, match=r"step \d+: the loss is .*\nLower --learning-rate .*\n(The run as|Nothing)"):
        main([*words, "--learning-rate", "1e30", "--warmup", "3", "--save-every", "1"])
    if (tmp_path / "out").exists():
        load_model(tmp_path / "out", device="cpu")


def test_seconds_of_training_add_up_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(flags(tmp_path), 4, monkeypatch)
    path = tmp_path / "out" / "training.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"seconds": 1000.0 + record["seconds"]}))
    write_manifest(tmp_path / "out")
    found = document([*flags(tmp_path), "--resume"], capsys)
    assert 1000 < found["train_seconds"] < 1100
    assert found["tokens_per_second"] is None, "the steps after the first stretch of this process: there were none"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a draft that was interrupted after two steps, its text, config and target beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    assert main([*flags(folder), "--out", str(folder / "target")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(draft_flags(folder), 2, patch)
    return folder


def draft_flags(folder: Path) -> list[str]:
    if not (folder / "config.json").exists():
        content = json.loads((folder / "target" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1}))
    plain = without(without(flags(folder), "--train-tokenizer"), "--shape")
    return [*plain, "--config", str(folder / "config.json"), "--distill-from", str(folder / "target")]


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] += 0.25


CHANGES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "config": (
        lambda folder: edit_json(folder / "config.json", lambda content: content | {"rope_theta": 5000.0}),
        [], r"began with model rope_theta 10000.0, not 5000.0",
    ),
    "teacher": (
        lambda folder: edit_tensors(folder / "target" / "model.safetensors", nudge),
        [], r"began with teacher sha256 \w+, not sha256 \w+",
    ),
    "text": (
        lambda folder: (folder / "text.txt").write_text(TEXT.replace("red", "old")),
        [], r"began with tokens \d+ \(crc32 \w+\) and .*, not \d+ ",
    ),
    "tokenizer": (
        lambda folder: (folder / "target" / "chat_template.jinja").write_text("{{ messages }}"),
        [], r"began with tokenizer sha256 \w+, not sha256",
    ),
    "compile": (lambda folder: None, ["--compile"], r"began with compile False, not True"),
    "precision": (lambda folder: None, ["--dtype", "bf16"], r"began with precision float32, not bfloat16"),
    "seed": (lambda folder: None, ["--seed", "5"], r"began with seed 0, not 5"),
    "temperature": (lambda folder: None, ["--distill-temperature", "2"], "began with distill_temperature 1.0, not 2.0"),
    "share": (lambda folder: None, ["--validation", "0.06"], r"began with tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_only_with_what_it_began_with(stopped: Path, tmp_path: Path, name: str) -> None:
    change, more, message = CHANGES[name]
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    before = contents(folder / "out")
    change(folder)
    with pytest.raises(UsageError, match=message):
        main([*draft_flags(folder), *more, "--resume"])
    assert contents(folder / "out") == before


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def shorten(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"losses": record["losses"][:1]}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-of-state": (lambda out: flip_a_bit(out / STATE), f"damaged: {STATE}: its content is not what was written"),
    "bit-of-model": (lambda out: flip_a_bit(out / "model.safetensors"), "damaged: model.safetensors"),
    "gone": (lambda out: (out / "training.json").unlink(), "damaged: training.json: missing"),
    "manifest": (lambda out: (out / "fastgen-manifest.json").unlink(), "fastgen-manifest.json: cannot be read"),
}
FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "moment-gone": (
        lambda out: edit_tensors(out / STATE, lambda tensors: tensors.pop("optimizer.norm.weight.exp_avg_sq")),
        r"optimizer.norm.weight.exp_avg_sq is missing, expected torch.float32 \[32\]",
    ),
    "moment-of-another-shape": (
        lambda out: edit_tensors(
            out / STATE, lambda tensors: tensors.update({"optimizer.norm.weight.exp_avg": torch.zeros(31)})
        ),
        r"optimizer.norm.weight.exp_avg is torch.float32 \[31\], expected torch.float32 \[32\]",
    ),
    "moment-of-another-dtype": (
        lambda out: edit_tensors(
            out / STATE, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)})
        ),
        r"model.norm.weight is torch.int32 \[32\], expected torch.float32 \[32\]",
    ),
    "tensor-too-many": (
        lambda out: edit_tensors(
            out / STATE, lambda tensors: tensors.update({"model.bias": torch.zeros(3, dtype=torch.int8)})
        ),
        r"model.bias is torch.int8 \[3\], expected none",
    ),
    "losses-shortened": (
        lambda out: edit_json(out / "training.json", shorten),
        r"after \{2.0\} steps, .* has 1 losses",
    ),
    "losses-words": (
        lambda out: edit_json(out / "training.json", lambda record: record | {"losses": ["a", "b"]}),
        "losses are no list of numbers",
    ),
    "validation-with-more": (
        lambda out: edit_json(
            out / "training.json", lambda record: record | {"validations": [record["validations"][0] | {"mood": 1}]}
        ),
        "is no validation, expected agreement, divergence, loss, step",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGE, *FORGED])
def test_a_damaged_run_does_not_go_on(stopped: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    change, message = (DAMAGE | FORGED)[name]
    change(folder / "out")
    if name in FORGED:
        write_manifest(folder / "out")
    with pytest.raises(ModelFileError, match=message):
        main([*draft_flags(folder), "--resume"])


def test_the_copied_run_itself_goes_on(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    assert main([*draft_flags(folder), "--resume"]) == 0
    assert not verify_manifest(folder / "out")
