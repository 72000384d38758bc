"""gpt-fast's checkpoints, written as its scripts write them: the same weights, int8 integers untouched."""

import json
from pathlib import Path

import pytest
import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.gpt_fast import untiled
from fastgen.errors import ModelFileError
from tests.checkpoint_writers import LLAMA, Tensors, fused, make_model, write_meta
from tests.quantized_writers import gpt_fast_int4, gpt_fast_int8, gpt_fast_state, tiled

MODEL = make_model(LLAMA)
STATE = gpt_fast_state(MODEL, LLAMA)


def write(folder: Path, name: str, state: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save(state, folder / name)
    return folder / name


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Query or key rows of interleaved RoPE in the half-split order, for heads of 16."""
    order = [head + place for head in range(0, rows.shape[0], 16) for place in (*range(0, 16, 2), *range(1, 16, 2))]
    return rows[order]


def ours(state: Tensors) -> Tensors:
    """The weights of a gpt-fast state by our names."""
    named = {"embedding.weight": state["tok_embeddings.weight"], "norm.weight": state["norm.weight"]}
    named["lm_head.weight"] = state["output.weight"]
    for layer in range(2):
        theirs = {name: state[f"layers.{layer}.{name}.weight"] for name in
                  ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
                   "attention_norm", "ffn_norm")}  # fmt: skip
        q, k, v = theirs["attention.wqkv"].split([64, 32, 32])
        named |= {
            f"layers.{layer}.wqkv.weight": torch.cat([halves(q), halves(k), v]),
            f"layers.{layer}.wo.weight": theirs["attention.wo"],
            f"layers.{layer}.w_gate_up.weight": torch.cat([theirs["feed_forward.w1"], theirs["feed_forward.w3"]]),
            f"layers.{layer}.w_down.weight": theirs["feed_forward.w2"],
            f"layers.{layer}.attention_norm.weight": theirs["attention_norm"],
            f"layers.{layer}.ffn_norm.weight": theirs["ffn_norm"],
        }
    return named


def test_plain_weights_are_those_of_the_folder_they_were_made_of(tmp_path: Path) -> None:
    tensors = open_checkpoint(write(tmp_path / "model", "model.pth", STATE)).tensors
    expected = fused(MODEL)
    assert set(tensors) == set(expected) == set(ours(STATE))
    for name, tensor in expected.items():
        assert torch.equal(tensors[name][:], tensor) and torch.equal(ours(STATE)[name], tensor), name


def test_int8_keeps_integers_and_scales(tmp_path: Path) -> None:
    stored, stands_for = gpt_fast_int8(STATE)
    checkpoint = open_checkpoint(write(tmp_path / "model", "model_int8.pth", stored))
    assert {str(form) for form in checkpoint.formats.values()} == {"int8"} and len(checkpoint.formats) == 9
    assert not checkpoint.notes
    expected = ours(stands_for)
    for name, tensor in expected.items():
        if name.removesuffix(".weight") in checkpoint.formats:
            q, scale = checkpoint.tensors[name], checkpoint.tensors[f"{name}_scale"]
            assert (q.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
            assert torch.equal(q[:].float() * scale[:].float(), tensor), name
            assert torch.equal(q[3:40, 5:30], q[:][3:40, 5:30]) and torch.equal(scale[3:40], scale[:][3:40])
        else:
            assert torch.equal(checkpoint.tensors[name][:], tensor), name


@pytest.mark.parametrize(("group", "inner_tiles"), [(32, 2), (32, 4), (64, 8), (128, 8), (32, 8)])
def test_int4_is_dequantized_exactly_padding_included(tmp_path: Path, group: int, inner_tiles: int) -> None:
    stored, stands_for = gpt_fast_int4(STATE, group, inner_tiles)
    checkpoint = open_checkpoint(write(tmp_path / "model", f"model_int4.g{group}.pth", stored))
    assert not checkpoint.formats
    assert checkpoint.notes == ("dequantized while loading, since no form of ours fits: 15 linears of gpt-fast int4",)
    for name, tensor in ours(stands_for).items():
        found = checkpoint.tensors[name]
        assert torch.equal(found[:], tensor), name
        assert torch.equal(found[5:21], tensor[5:21]), name
        if tensor.dim() == 2:
            assert torch.equal(found[5:21, 7:40], tensor[5:21, 7:40]), name


@pytest.mark.parametrize("inner_tiles", [2, 4, 8])
def test_tiles_come_apart_as_they_were_put_together(inner_tiles: int) -> None:
    q = torch.randint(0, 16, (24, 256), generator=torch.Generator().manual_seed(0))
    tiles = tiled(q, inner_tiles)
    assert tiles.shape == (3, 256 // (16 * inner_tiles), 32, inner_tiles // 2)
    assert torch.equal(untiled(tiles).long(), q)


INT4, _ = gpt_fast_int4(STATE, 32, 2)
INT8, _ = gpt_fast_int8(STATE)
WO = "layers.0.attention.wo"
BAD: dict[str, tuple[Tensors, tuple[str, ...]]] = {
    "int4 without words": ({WO: None}, (WO, "weight is nothing")),
    "int4 tiles of another width": ({WO: torch.zeros(8, 1, 32, 1, dtype=torch.int32)}, (WO, "[8, 1, 32, 1]")),
    "int4 tiles of floats": ({WO: torch.zeros(8, 2, 32, 1)}, (WO, "no int4 tiles")),
    "int4 tiles of too few rows": ({WO: torch.zeros(7, 2, 32, 1, dtype=torch.int32)}, (WO, "64 rows and 64 columns")),
    "int4 tiles in three words": ({WO: torch.zeros(8, 2, 32, 3, dtype=torch.int32)}, (WO, "[8, 2, 32, 3]")),
}


@pytest.mark.parametrize("case", BAD)
def test_int4_that_cannot_be_is_named(tmp_path: Path, case: str) -> None:
    changes, expected = BAD[case]
    state = INT4 | {f"{name}.weight": value for name, value in changes.items()}
    path = write(
        tmp_path / "model", "model_int4.g32.pth", {key: value for key, value in state.items() if value is not None}
    )
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    for part in ("model_int4.g32.pth", *expected):
        assert part in str(caught.value)


def test_int8_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in INT8.items() if name != "output.scales"}
    with pytest.raises(ModelFileError, match=r"output.weight is int8 \[40, 64\]"):
        open_checkpoint(write(tmp_path / "a", "model_int8.pth", state))
    state = INT8 | {"layers.0.attention.wqkv.weight": INT8["layers.0.attention.wqkv.weight"][:100]}
    with pytest.raises(ModelFileError, match=r"layers.0.attention.wv.weight is int8 \[100, 64\] where \[32, 64\]"):
        open_checkpoint(write(tmp_path / "b", "model_int8.pth", state))


def test_meta_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    assert open_checkpoint(write_meta(tmp_path / "meta", LLAMA, MODEL) / "consolidated.00.pth").format == "meta"
