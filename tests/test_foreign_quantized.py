"""Quantized checkpoints of other tools: integers survive bit by bit, logits are those of the dequantized weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.errors import ModelFileError
from fastgen.load import LoadedModel, load_model
from quantize import int4
from quantize.format import WeightFormat
from quantize.linear import dequantize_weight
from tests.checkpoint_writers import Tensors
from tests.quantized_writers import (
    WIDE,
    Matrix,
    quantized_model,
    random_matrix,
    write_awq,
    write_compressed,
    write_dequantized,
    write_folder,
    write_gptq,
)
from tests.vocabularies import small_byte_level

Write = Callable[[Path, Tensors, Mapping[str, Matrix]], Path]


def gptq(**options: object) -> Write:
    return lambda folder, plain, matrices: write_gptq(folder, plain, matrices, **options)


def awq(**options: object) -> Write:
    return lambda folder, plain, matrices: write_awq(folder, plain, matrices, **options)


def compressed(**options: object) -> Write:
    return lambda folder, plain, matrices: write_compressed(folder, plain, matrices, **options)


Q = "model.layers.0.self_attn.q_proj"


def changed(write: Callable[..., Path], options: Mapping[str, object] | None = None, /, **changes: object) -> Write:
    """A folder some of whose tensors (`__` for a dot) are other ones; None takes one away."""

    def build(folder: Path, plain: Tensors, matrices: Mapping[str, Matrix]) -> Path:
        from safetensors.torch import load_file, save_file

        write(folder, plain, matrices, **(options or {}))
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"{Q}.{leaf}": value for leaf, value in changes.items()}
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors"
        )
        return folder

    return build


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


SYM = {"symmetric": True}
CASES: dict[str, tuple[Write, dict[str, object], str]] = {
    # how it is written, what the model is, and the form it has in memory; "" is dequantized
    "gptq": (gptq(), {}, "int4-g64-asym"),
    "gptq-without-index": (gptq(index=False), {}, "int4-g64-asym"),
    "gptq-v2": (gptq(version=2), {}, "int4-g64-asym"),
    "gptq-sym": (gptq(sym=True, group_size=128), SYM | {"group": 128}, "int4-g128-sym"),
    "gptq-g32": (gptq(group_size=32), {"group": 32}, "int4-g32-asym"),
    "gptq-rows": (gptq(group_size=-1), {"group": -1}, "int4-g256-asym"),
    "gptq-g16": (gptq(group_size=16), {"group": 16}, ""),
    "gptq-act-order": (gptq(desc_act=True), {"scattered": True}, ""),
    "gptq-act-order-in-order": (gptq(desc_act=True), {}, "int4-g64-asym"),
    "gptq-int8-rows": (gptq(group_size=-1, sym=True), SYM | {"bits": 8, "group": -1}, "int8"),
    "gptq-int8-g64": (gptq(sym=True), SYM | {"bits": 8}, ""),
    "gptq-int8-asym": (gptq(version=2, group_size=-1), {"bits": 8, "group": -1}, ""),
    "gptq-int8-v1-asym": (gptq(group_size=-1), {"bits": 8, "group": -1}, ""),
    "gptq-a-layer-plain": (gptq(), {"skipped": ("layers.1.",)}, "int4-g64-asym"),
    "awq": (awq(), {}, "int4-g64-asym"),
    "awq-g128": (awq(group_size=128), {"group": 128}, "int4-g128-asym"),
    "awq-older": (awq(w_bit=4, q_group_size=32, version="GEMM"), {"group": 32}, "int4-g32-asym"),
    "compressed": (compressed(), {}, "int4-g64-asym"),
    "compressed-sym": (compressed(symmetric=True, group=32), SYM | {"group": 32}, "int4-g32-sym"),
    "compressed-rows": (compressed(group=-1), {"group": -1}, "int4-g256-asym"),
    "compressed-g512": (compressed(group=512), {"group": 512}, "int4-g256-asym"),
    "compressed-zeros-unpacked": (compressed(loose_zeros=True), {}, "int4-g64-asym"),
    "compressed-weight-order": (compressed(actorder="weight"), {}, "int4-g64-asym"),
    "compressed-group-order": (compressed(actorder="group"), {"scattered": True}, ""),
    "compressed-group-order-of-old": (compressed(actorder=True), {"scattered": True}, ""),
    "compressed-group-order-unset": (
        changed(write_compressed, {"actorder": "group"}, weight_g_idx=words(256) - 1), {}, "int4-g64-asym",
    ),
    "compressed-int8": (compressed(symmetric=True, group=-1), SYM | {"bits": 8, "group": -1}, "int8"),
    "compressed-int8-asym": (compressed(group=-1), {"bits": 8, "group": -1}, ""),
    "compressed-int8-g32": (compressed(symmetric=True, group=32), SYM | {"bits": 8, "group": 32}, ""),
    "compressed-ignored": (compressed(), {"skipped": ("down_proj", "layers.0.")}, "int4-g64-asym"),
    "compressed-ignored-part": (compressed(), {"skipped": ("k_proj",)}, "int4-g64-asym"),
    "compressed-pattern": (compressed(targets=("re:.*proj$",)), {}, "int4-g64-asym"),
    "int-quantized": (
        compressed(packing="int-quantized", symmetric=True, group=-1), SYM | {"bits": 8, "group": -1}, "int8",
    ),
    "int-quantized-asym": (compressed(packing="int-quantized", group=-1), {"bits": 8, "group": -1}, ""),
}  # fmt: skip


def load(folder: Path) -> LoadedModel:
    (folder / "tokenizer.json").write_text(json.dumps(SMALL))
    return load_model(folder, device="cpu", dtype="fp32")


SMALL = json.loads(small_byte_level())
SMALL["model"]["vocab"], SMALL["model"]["merges"], SMALL["added_tokens"] = {"a": 0, "b": 1}, [], []


@torch.inference_mode()
def logits(model: LoadedModel) -> torch.Tensor:
    tokens = torch.arange(32)[None] % 40
    model.transformer.allocate_cache(1, 32)
    positions = torch.arange(32)
    return model.transformer.logits(model.transformer(tokens, positions[None], positions, torch.tensor([32])))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path, case: str) -> None:
    write, options, expected = CASES[case]
    plain, matrices = quantized_model(**options)
    model = load(write(tmp_path / "quantized", plain, matrices))
    reference = load(write_dequantized(tmp_path / "plain", plain, matrices))
    found = logits(model)
    assert found.std() > 0.1
    torch.testing.assert_close(found, logits(reference), rtol=0, atol=2e-5)
    assert model.format == (expected or "fp32")
    lost = [name for name in model.checkpoint.notes if "dequantized" in name]
    assert len(lost) == (1 if not expected or case == "compressed-ignored-part" else 0)


@pytest.mark.parametrize(
    "write", [gptq(group_size=128), awq(group_size=128), compressed(group=128)], ids=["gptq", "awq", "compressed"]
)
def test_the_last_group_of_a_row_may_be_narrower(tmp_path: Path, write: Write) -> None:
    """Widths of one and a half, and of two and a half groups: ours are half as wide, and the last scale counts once."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1}
    plain, matrices = quantized_model(group=128, sizes=WIDE | sizes)
    found = []
    for each in (write, write_dequantized):
        folder = each(tmp_path / str(len(found)), plain, matrices)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | sizes))
        found.append(load(folder))
    assert [model.format for model in found] == ["int4-g64-asym", "fp32"]
    torch.testing.assert_close(logits(found[0]), logits(found[1]), rtol=0, atol=2e-5)


def test_a_quantized_head_stays_quantized(tmp_path: Path) -> None:
    plain, matrices = quantized_model()
    generator = torch.Generator().manual_seed(7)
    del plain["lm_head.weight"]
    matrices["lm_head"] = random_matrix((40, 256), generator, bits=4, group=64, symmetric=False, scattered=False)
    model = load(write_gptq(tmp_path / "quantized", plain, matrices, lm_head=True))
    assert str(model.formats["lm_head"]) == "int4-g64-asym"
    reference = load(write_dequantized(tmp_path / "plain", plain, matrices))
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=2e-4)


def test_the_line_about_what_is_dequantized_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from fastgen.evaluate import main

    folder = write_gptq(tmp_path / "model", *quantized_model(scattered=True), desc_act=True)
    (folder / "tokenizer.json").write_text(json.dumps(SMALL))
    (tmp_path / "text").write_text("ab" * 40)
    assert main(["--model", str(folder), "--text", str(tmp_path / "text"), "--device", "cpu", "--window", "32"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert lines == [
        "note       dequantized while loading, since no form of ours fits: 8 linears of GPTQ int4 in act-order"
    ]


def test_groups_out_of_order_without_their_index_are_refused(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path / "model", *quantized_model(), desc_act=True, index=False)
    with pytest.raises(ModelFileError, match=r"g_idx is missing, and desc_act says that the groups are out of order"):
        load(folder)


PARTS = {"wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "wo": ("self_attn.o_proj",),
         "w_gate_up": ("mlp.gate_proj", "mlp.up_proj"), "w_down": ("mlp.down_proj",)}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case, (_, options, form) in CASES.items() if form and "skipped" not in options]
)
def test_integers_and_scales_survive_bit_by_bit(tmp_path: Path, case: str) -> None:
    write, options, form = CASES[case]
    plain, matrices = quantized_model(**options)
    model = load(write(tmp_path / "quantized", plain, matrices))
    for layer in range(2):
        for ours, theirs in PARTS.items():
            linear = model.transformer.get_submodule(f"layers.{layer}.{ours}")
            parts = [matrices[f"model.layers.{layer}.{name}"] for name in theirs]
            half = 1 << (parts[0].bits - 1)
            q = torch.cat([part.q for part in parts]) - half
            zero, scale = torch.cat([part.zero for part in parts]) - half, torch.cat([part.scale for part in parts])
            if form == "int8":
                assert torch.equal(linear.weight.long(), q)
            else:
                assert torch.equal(int4.unpack(linear.weight_packed).long(), q)
                times = linear.weight_scale.shape[1] // scale.shape[1]
                zero, scale = zero.repeat_interleave(times, 1), scale.repeat_interleave(times, 1)
                if linear.weight_zero_point is None:
                    assert not zero.any()
                else:
                    assert torch.equal(linear.weight_zero_point.long(), zero)
            assert torch.equal(linear.weight_scale, scale.float())


@pytest.mark.parametrize("case", CASES)
def test_a_slice_equals_that_slice_of_the_whole(tmp_path: Path, case: str) -> None:
    write, options, _ = CASES[case]
    tensors = open_checkpoint(write(tmp_path / "model", *quantized_model(**options))).tensors
    for name, tensor in tensors.items():
        if ".1." not in name:
            continue
        whole = tensor[:]
        rows, columns = whole.shape[0], whole.shape[1] if whole.dim() == 2 else 0
        for start, stop in [(0, 1), (3, 21), (rows - 9, rows), (5, 5)]:
            assert torch.equal(tensor[start:stop], whole[start:stop]), (name, start, stop)
            for left, right in [(0, 1), (1, columns - 1), (columns // 2, columns)] if columns else []:
                assert torch.equal(tensor[start:stop, left:right], whole[start:stop, left:right]), (name, left, right)


def test_a_description_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    plain, matrices = quantized_model()
    for name, write in (("quantize_config.json", write_gptq), ("quant_config.json", write_awq)):
        folder = write(tmp_path / name, plain, matrices)
        config = json.loads((folder / "config.json").read_text())
        description = config.pop("quantization_config")
        del description["quant_method"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(description))
        assert load(folder).format == "int4-g64-asym"


def test_the_one_file_of_weights_may_have_any_name(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path / "model", *quantized_model())
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-64g.safetensors")
    assert load(folder).format == "int4-g64-asym"
    (folder / "b.safetensors").touch()
    with pytest.raises(ModelFileError, match=r"none of model.safetensors, .* 2 other .safetensors files"):
        open_checkpoint(folder)


def test_biases_of_zeros_are_passed_over_and_others_are_not(tmp_path: Path) -> None:
    plain, matrices = quantized_model()
    bias = "model.layers.0.self_attn.q_proj.bias"
    load(write_gptq(tmp_path / "zeros", plain | {bias: torch.zeros(256)}, matrices))
    with pytest.raises(ModelFileError, match=rf"unexpected tensors \(1\): {bias}"):
        open_checkpoint(write_gptq(tmp_path / "ones", plain | {bias: torch.ones(256)}, matrices))


def test_dequantized_matrices_equal_what_our_own_linears_compute(tmp_path: Path) -> None:
    """The readers' view and `quantize.linear` say the same of the same integers."""
    plain, matrices = quantized_model(group=32)
    checkpoint = open_checkpoint(write_awq(tmp_path / "model", plain, matrices, group_size=32))
    form = WeightFormat(bits=4, group_size=32, symmetric=False)
    prefix = "layers.0.wo"
    stored = {
        leaf: checkpoint.tensors[f"{prefix}.{leaf}"][:]
        for leaf in ("weight_packed", "weight_scale", "weight_zero_point")
    }
    expected = matrices["model.layers.0.self_attn.o_proj"].weight()
    assert torch.equal(dequantize_weight(stored, form, torch.float32), expected)


BAD_QUANTIZED: dict[str, tuple[Write, tuple[str, ...]]] = {
    "gptq without bits": (gptq(bits=None), ("config.json", "quantization_config: bits")),
    "gptq of three bits": (gptq(bits=3), ("config.json", "bits is 3", "4 or 8")),
    "gptq of other bits than it has": (gptq(bits=8), ("qweight is int32 [32, 256] where [64, 256] is expected",)),
    "gptq with a group of nothing": (gptq(group_size=0), ("config.json", "group_size is 0")),
    "gptq with another group than it has": (gptq(group_size=32), ("scales is [4, 256] where [8, 256] is expected",)),
    "gptq in marlin's packing": (gptq(checkpoint_format="marlin"), ("config.json", "checkpoint_format is 'marlin'")),
    "gptq with single linears of another form": (gptq(dynamic={"+:.*": {"bits": 8}}), ("config.json", "dynamic")),
    "gptq sym that is no flag": (gptq(sym="yes"), ("config.json", "sym is 'yes'")),
    "gptq without scales": (changed(write_gptq, scales=None), ("model.safetensors", f"tensors (1): {Q}.scales")),
    "gptq without zero points": (changed(write_gptq, qzeros=None), ("missing", f"{Q}.qzeros")),
    "gptq with both forms of a weight": (changed(write_gptq, weight=torch.zeros(256, 256)), ("unexpected", Q)),
    "gptq words of floats": (changed(write_gptq, qweight=torch.zeros(32, 256)), (f"{Q}.qweight is [32, 256] where",)),
    "gptq words of another width": (changed(write_gptq, qweight=words(31, 256)), (f"{Q}.qweight is int32 [31, 256]",)),
    "gptq scales of integers": (changed(write_gptq, scales=words(4, 256)), (f"{Q}.scales is int32",)),
    "gptq index beyond its groups": (changed(write_gptq, g_idx=words(256) + 4), (Q, "groups 4 to 4, of 4")),
    "gptq index below its groups": (changed(write_gptq, g_idx=words(256) - 1), (Q, "groups -1 to -1")),
    "gptq index too short": (changed(write_gptq, g_idx=words(9)), (f"{Q}.g_idx is int32 [9] where [256]",)),
    "awq in another packing": (awq(version="gemv"), ("config.json", "version is 'gemv'")),
    "awq of eight bits": (awq(bits=8), ("config.json", "bits is 8, expected 4")),
    "awq without zero points": (awq(zero_point=False), ("config.json", "zero_point is False")),
    "awq with a group of nothing": (awq(group_size=-7), ("config.json", "group_size is -7")),
    "awq without a scale": (changed(write_awq, scales=None), ("missing tensors (1)", f"{Q}.scales")),
    "awq packed as gptq is": (changed(write_awq, qweight=words(32, 256)), (f"{Q}.qweight is int32 [32, 256]",)),
    "compressed of two bits": (compressed(num_bits=2), ("config.json", "'num_bits': 2")),
    "compressed with a strategy of blocks": (compressed(strategy="block"), ("config.json", "'strategy': 'block'")),
    "compressed with a group of text": (compressed(group_size="64"), ("config.json", "'group_size': '64'")),
    "compressed with floats of 8 bits": (compressed(type="float"), ("config.json", "'type': 'float'")),
    "compressed in bits that are dynamic": (compressed(dynamic=True), ("config.json", "'dynamic': True")),
    "compressed without its index": (
        changed(write_compressed, {"actorder": "group"}, weight_g_idx=None), ("missing", f"{Q}.weight_g_idx"),
    ),
    "compressed with an index beyond its groups": (
        changed(write_compressed, {"actorder": "group"}, weight_g_idx=words(256) + 4), (Q, "groups 4 to 4, of 4"),
    ),
    "compressed with groups of other sizes": (
        changed(write_compressed, {"actorder": "group"}, weight_g_idx=words(256)), (Q, "groups of 0 to 256 columns"),
    ),
    "compressed of floats in an integer format": (
        changed(write_compressed, {"packing": "int-quantized", "num_bits": 8}, weight=torch.zeros(256, 256)),
        (f"{Q}.weight is [256, 256]",),
    ),
    "a description that is no object": (
        lambda folder, plain, matrices: write_folder(folder, ["gptq"], plain), ("config.json", "quantization_config"),
    ),
    "a method that is no text": (gptq(quant_method=["gptq"]), ("config.json", "['gptq']")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_QUANTIZED)
def test_a_bad_folder_is_one_typed_error_that_names_the_place(tmp_path: Path, case: str) -> None:
    write, expected = BAD_QUANTIZED[case]
    path = write(tmp_path / "model", *quantized_model())
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) <= 3, message
    for part in expected:
        assert part in message, message


def test_zero_points_that_a_symmetric_description_denies_are_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gptq(tmp_path / "model", *quantized_model(), sym=True))
    with pytest.raises(ModelFileError, match=r"model.safetensors: model.layers.0.self_attn.q_proj: has zero points"):
        checkpoint.tensors["layers.0.wqkv.weight_scale"][:]
