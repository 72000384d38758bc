"""What training leaves on disk: folders that everybody loads, replaced whole or not at all, and runs that go on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.checkpoint.hf_config import config_from_hf
from fastgen.checkpoint.hf_save import hf_config, save_hf
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import CapacityError, UsageError
from fastgen.staged import staged_file, staged_folder
from fastgen.training.curve import can_draw, draw_curve
from fastgen.training.tokens import write_token_file
from tests.models import TINY, random_model
from tests.training_runs import full_disk

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


def test_a_curve_without_matplotlib_is_refused_and_with_it_a_picture(tmp_path: Path) -> None:
    if not can_draw():
        with pytest.raises(UsageError, match=r"fastgen\[plot\]"):
            draw_curve(tmp_path / "loss.png", [1.0], [], "run")
        return
    draw_curve(tmp_path / "loss.png", [2.0, 1.0], [], "run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
