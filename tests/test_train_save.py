"""What training leaves on disk: folders that everybody loads, replaced whole or not at all, and runs that go on."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.checkpoint.hf_config import config_from_hf
from fastgen.checkpoint.hf_save import hf_config, save_hf
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import CapacityError, FastgenError, ModelFileError, UsageError
from fastgen.load import load_model
from fastgen.staged import staged_file, staged_folder
from fastgen.train import main
from fastgen.training.curve import can_draw, draw_curve
from fastgen.training.tokens import write_token_file
from fastgen.training.trainer import Trainer
from tests.models import TINY, random_model

YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 64, "attention_factor": 1.2}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True, "bos_token_id": 1, "eos_token_ids": (2,)},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "eos_token_ids": (2, 7)},
    "mistral": {"windows": (9, 9)},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=2.0, original_max_seq_len=256)},
    "dynamic": {
        "rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=64),
        "max_seq_len": 128,
    },
    "yarn": {"rope_scaling": RopeScaling(**YARN)},
    "llama3": {"rope_scaling": RopeScaling(**LLAMA3), "rope_theta": 500000.0},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_read_as_it_was_written(changes: dict[str, Any]) -> None:
    config = ModelConfig(**(TINY | changes))
    content = json.loads(json.dumps(hf_config(config, torch.float32)))
    assert config_from_hf(content, Path("config.json")) == config


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_folder_loads_in_transformers_with_equal_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(**changes)
    save_hf(tmp_path, model.config, model.transformer.state_dict(), torch.float32)
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    tokens = torch.randint(258, (2, 20), generator=torch.Generator().manual_seed(3))
    model.transformer.allocate_cache(2, 32)
    positions = torch.arange(20).expand(2, 20)
    ours = model.transformer.logits(model.transformer(tokens, positions, positions[0], torch.tensor([20, 20])))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_mix_that_no_family_has_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        hf_config(ModelConfig(**TINY, qk_norm=True, windows=(3, 3)), torch.float32)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with staged_folder(target) as folder:
            (folder / "a").write_text(text)
            (folder / "deep").mkdir()
    with pytest.raises(ZeroDivisionError), staged_folder(target) as folder:
        (folder / "a").write_text("broken")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_without_an_exchange_of_names_the_old_folder_steps_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    for text in ("old", "new"):
        with staged_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text(text)
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for process in (int(gone.stdout), os.getppid()):
        (tmp_path / f".folder.partial-{process}").mkdir()
    with staged_folder(tmp_path / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".folder.partial-{os.getppid()}", "folder"]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write_token_file(path, np.arange(100, dtype=np.uint16))
    before = path.read_bytes()
    with full_disk(2000), pytest.raises(CapacityError, match=r"tokens.bin: cannot be written: File too large"):
        write_token_file(path, np.zeros(1000, np.uint16))
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_an_error_of_the_block_that_is_not_about_the_target_stays_what_it_is(tmp_path: Path) -> None:
    for staged in (staged_file, staged_folder):
        with pytest.raises(FileNotFoundError, match="elsewhere"), staged(tmp_path / "target"):
            (tmp_path / "elsewhere").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a: cannot be written: File exists"), staged_file(tmp_path / "file" / "a"):
        pass


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A small run that saves every second of its six steps."""
    text = tmp_path / "text.txt"
    text.write_text("A little dog saw a big ball. The ball was red, and the dog was happy.\n" * 60)
    return [
        "--text", str(text), "--train-tokenizer", "290", "--shape", "dim=32,layers=2,heads=4,kv-heads=2",
        "--context", "16", "--batch-size", "4", "--steps", "6", "--warmup", "2", "--save-every", "2",
        "--validate-every", "2", "--device", "cpu", "--dtype", "fp32", "--json", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def document(flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(flags) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let training go wrong once `step` steps are done."""
    advance = Trainer.advance

    def failing(self: Trainer, until: int) -> None:
        if self.step >= step:
            raise error
        advance(self, until)

    monkeypatch.setattr(Trainer, "advance", failing)


def test_an_interrupted_and_resumed_command_equals_an_uninterrupted_one(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = document([*flags, "--out", str(tmp_path / "whole")], capsys)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    assert "interrupted at step 4. The run as of step 4 is in" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unfinished run; add --resume"):
        main(flags)
    resumed = document([*flags, "--resume"], capsys)
    assert resumed["losses"] == whole["losses"] and resumed["validations"] == whole["validations"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "out" / "training_state.safetensors").exists()


def test_a_run_goes_on_only_as_it_began(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds no unfinished run"):
        main([*flags, "--resume"])
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    with pytest.raises(UsageError, match=r"began with seed 0, not 5"):
        main([*flags, "--resume", "--seed", "5"])


def test_the_folder_of_a_run_generates_and_can_be_trained_on(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = document([*flags, "--save-tokens", str(tmp_path / "tokens.bin")], capsys)
    model = load_model(tmp_path / "out", device="cpu", dtype="fp32")
    assert model.tokenizer.vocab_size == model.config.vocab_size == 290
    assert model.config.eos_token_ids == (2,) and model.config.max_seq_len == 16
    more = flags[flags.index("--context") :]
    more = [*more, "--tokens", str(tmp_path / "tokens.bin"), "--out", str(tmp_path / "more")]
    second = document([*more, "--init-from", str(tmp_path / "out")], capsys)
    assert second["losses"][0] < first["losses"][0]
    draft = [*more, "--shape", "dim=16,layers=1,heads=2", "--out", str(tmp_path / "draft")]
    third = document([*draft, "--distill-from", str(tmp_path / "out")], capsys)
    assert 0 <= third["validations"][-1]["agreement"] <= 1
    assert load_model(tmp_path / "draft", device="cpu").tokenizer.vocab_size == 290


def test_a_full_disk_while_saving_keeps_the_last_good_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with full_disk(20_000), pytest.raises(CapacityError, match=r"cannot be written.*\n.*\nThe run as of step 2 is in"):
        main([*flags, "--resume"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_a_diverging_run_keeps_its_last_good_state(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"step \d+: the loss is .*\nLower --learning-rate .*\n(The run as|Nothing)"):
        main([*flags, "--learning-rate", "1e30", "--warmup", "3", "--save-every", "1"])
    if (tmp_path / "out").exists():
        load_model(tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--context", "4000"], ModelFileError, "too short.*each needs 4001"),
        (["--tokenizer", "x"], UsageError, "two tokenizers"),
        (["--tokens", "x"], UsageError, "either --text FILE... or --tokens"),
        (["--config", "x"], UsageError, "each say what the model is"),
        (["--validation", "1"], UsageError, "--validation 1.0"),
        (["--batch-size", "5", "--accumulate", "2"], UsageError, "--accumulate 2"),
        (["--save-every", "0"], UsageError, "--save-every 0"),
        (["--train-tokenizer", "100"], UsageError, "--train-tokenizer 100"),
        (["--text", "missing.txt"], ModelFileError, "missing.txt"),
        (["--shape", "dim=32,layers=2,heads=4"], UsageError, "each say what the model is"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(
    flags: list[str], tmp_path: Path, change: list[str], kind: type[FastgenError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        main([*flags, *change])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(flags: list[str]) -> None:
    flags[flags.index("--shape") + 1] += ",vocab-size=100"
    with pytest.raises(ModelFileError, match=r"290 ids, the model's embedding 100"):
        main(flags)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "tokens.bin", np.full(1000, 500, np.uint16))
    with pytest.raises(ModelFileError, match=r"tokens.bin: token 500 at place 0 .* vocabulary of 300"):
        main([
            "--tokens", str(tmp_path / "tokens.bin"), "--shape", "dim=32,layers=1,heads=2,vocab-size=300",
            "--context", "16", "--device", "cpu", "--out", str(tmp_path / "out"),
        ])  # fmt: skip


def test_a_target_with_another_vocabulary_cannot_be_followed(flags: list[str], tmp_path: Path) -> None:
    main(flags)
    tokens = tmp_path / "tokens.bin"
    write_token_file(tokens, np.full(1000, 5, np.uint16))
    with pytest.raises(UsageError, match="its vocabulary has 290 tokens, the model's 300"):
        main([
            "--tokens", str(tokens), "--shape", "dim=32,layers=1,heads=2,vocab-size=300", "--context", "16",
            "--distill-from", str(tmp_path / "out"), "--device", "cpu", "--out", str(tmp_path / "draft"),
        ])  # fmt: skip


def test_an_existing_folder_is_never_overwritten(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"out: exists; name another folder"):
        main(flags)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_curve_without_matplotlib_is_refused_and_with_it_a_picture(tmp_path: Path) -> None:
    if not can_draw():
        with pytest.raises(UsageError, match=r"fastgen\[plot\]"):
            draw_curve(tmp_path / "loss.png", [1.0], [], "run")
        return
    draw_curve(tmp_path / "loss.png", [2.0, 1.0], [], "run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
