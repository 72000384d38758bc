"""Quantized checkpoints of other tools, packed in plain loops from the layouts that these publish.

A `Matrix` is what a tool's quantizer ends in: unsigned integers, their zero points, scales, and the group of every
column. The packers share no code with the readers; compressed-tensors packs with its own library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from tests.checkpoint_writers import LLAMA, Tensors, interleaved, make_model, renamed

WIDE = LLAMA | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """w[o, i] = (q[o, i] - zero[o, g[i]]) * scale[o, g[i]]; q and zero count from 0."""

    q: torch.Tensor  # int64 [out, in]
    zero: torch.Tensor  # int64 [out, groups]
    scale: torch.Tensor  # fp16 [out, groups]
    groups: torch.Tensor  # int64 [in]
    bits: int

    def weight(self) -> torch.Tensor:
        """The weights that it stands for, fp32."""
        return (self.q - self.zero[:, self.groups]).float() * self.scale.float()[:, self.groups]


def random_matrix(
    shape: tuple[int, int], generator: torch.Generator, *, bits: int, group: int, symmetric: bool, scattered: bool
) -> Matrix:
    rows, columns = shape
    size = columns if group == -1 else group
    count = -(-columns // size)
    groups = torch.arange(columns) // size
    if scattered:
        groups = groups[torch.randperm(columns, generator=generator)]
    zero = torch.randint(0, 1 << bits, (rows, count), generator=generator)
    if symmetric:
        zero = torch.full_like(zero, 1 << (bits - 1))
    scale = (torch.rand(rows, count, generator=generator) + 0.5) * 2.0 ** -(bits + 3)
    q = torch.randint(0, 1 << bits, shape, generator=generator)
    return Matrix(q=q, zero=zero, scale=scale.half(), groups=groups, bits=bits)


def quantized_model(
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    scattered: bool = False,
    skipped: tuple[str, ...] = (),
    sizes: Mapping[str, object] = WIDE,
) -> tuple[Tensors, dict[str, Matrix]]:
    """Return the plain tensors of a random model, and its quantized linears, those apart whose names have a word of
    `skipped`."""
    generator = torch.Generator().manual_seed(bits + group)
    plain, matrices = make_model(sizes), {}
    for name in list(plain):
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS) and not any(word in name for word in skipped):
            shape = tuple(plain.pop(name).shape)
            matrices[module] = random_matrix(
                shape, generator, bits=bits, group=group, symmetric=symmetric, scattered=scattered
            )
    return {name: 0.1 * tensor if tensor.dim() == 2 else tensor for name, tensor in plain.items()}, matrices


def write_folder(
    folder: Path,
    description: Mapping[str, object] | None,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, object] = WIDE,
) -> Path:
    folder.mkdir(parents=True)
    config = dict(sizes) if description is None else {**sizes, "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_dequantized(folder: Path, plain: Tensors, matrices: Mapping[str, Matrix]) -> Path:
    """Write the same model without quantization, in fp32."""
    return write_folder(folder, None, plain | {f"{name}.weight": m.weight() for name, m in matrices.items()})


def words_along_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack [n, m] into int32 [n * bits / 32, m]: value i of a column in bits (i % per) * bits of word i // per."""
    per = 32 // bits
    words = np.zeros((-(-values.shape[0] // per), values.shape[1]), np.uint32)
    for row, line in enumerate(values.numpy().astype(np.uint32)):
        words[row // per] |= line << np.uint32(bits * (row % per))
    return torch.from_numpy(words.view(np.int32))


def write_gptq(
    folder: Path,
    plain: Tensors,
    matrices: Mapping[str, Matrix],
    *,
    version: int = 1,
    index: bool = True,
    sizes: Mapping[str, object] = WIDE,
    **description: object,
) -> Path:
    """Write as AutoGPTQ (version 1) or GPTQModel (2) does: words along the input, of zero points along the output."""
    tensors = dict(plain)
    for name, matrix in matrices.items():
        stored = (matrix.zero - 1) % (1 << matrix.bits) if version == 1 else matrix.zero
        tensors[f"{name}.qweight"] = words_along_rows(matrix.q.T.contiguous(), matrix.bits)
        tensors[f"{name}.qzeros"] = words_along_rows(stored, matrix.bits).T.contiguous()
        tensors[f"{name}.scales"] = matrix.scale.T.contiguous()
        if index:
            tensors[f"{name}.g_idx"] = matrix.groups.int()
    first = next(iter(matrices.values()))
    fields = {
        "quant_method": "gptq",
        "bits": first.bits,
        "group_size": 64,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return write_folder(folder, fields | description, tensors, sizes)


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """Pack [n, m] into int32 [n, m / 8] in AutoAWQ's order of columns."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    columns = values.numpy().astype(np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= columns[:, 8 * word + column] << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def write_awq(
    folder: Path,
    plain: Tensors,
    matrices: Mapping[str, Matrix],
    *,
    sizes: Mapping[str, object] = WIDE,
    **description: object,
) -> Path:
    """Write as AutoAWQ does, in its `gemm` form."""
    tensors = dict(plain)
    for name, matrix in matrices.items():
        tensors[f"{name}.qweight"] = awq_words(matrix.q.T.contiguous())
        tensors[f"{name}.qzeros"] = awq_words(matrix.zero.T.contiguous())
        tensors[f"{name}.scales"] = matrix.scale.T.contiguous()
    fields = {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    if "w_bit" not in description:  # as the first versions call it
        fields |= {"bits": 4, "group_size": 64}
    return write_folder(folder, fields | description, tensors, sizes)


def write_compressed(
    folder: Path,
    plain: Tensors,
    matrices: Mapping[str, Matrix],
    *,
    packing: str = "pack-quantized",
    loose_zeros: bool = False,
    symmetric: bool = False,
    group: int = 64,
    targets: tuple[str, ...] = ("Linear",),
    sizes: Mapping[str, object] = WIDE,
    **weights: object,
) -> Path:
    """Write as compressed-tensors does, packed by its own code."""
    tensors = dict(plain)
    for name, matrix in matrices.items():
        half = 1 << (matrix.bits - 1)
        q, zero = (matrix.q - half).to(torch.int8), (matrix.zero - half).to(torch.int8)
        if packing == "pack-quantized":
            tensors[f"{name}.weight_packed"] = pack_to_int32(q, matrix.bits)
            tensors[f"{name}.weight_shape"] = torch.tensor(matrix.q.shape)
        else:
            tensors[f"{name}.weight"] = q
        tensors[f"{name}.weight_scale"] = matrix.scale
        if not symmetric:
            packed = packing == "pack-quantized" and not loose_zeros
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(zero, matrix.bits, packed_dim=0) if packed else zero
        if weights.get("actorder") in ("group", True):
            tensors[f"{name}.weight_g_idx"] = matrix.groups.int()
    first = next(iter(matrices.values()))
    scheme = {
        "num_bits": first.bits, "type": "int", "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group", "group_size": None if group == -1 else group,
        "dynamic": False, "observer": "minmax",
    }  # fmt: skip
    ignored = [name.removesuffix(".weight") for name in plain if name.endswith((*LINEARS, "lm_head.weight"))]
    ignored += [name.removesuffix(".weight") for name in plain if any(f"{part}.weight" in name for part in LINEARS)]
    description = {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": {"targets": list(targets), "weights": scheme | weights}},
        "ignore": ignored,
        "quantization_status": "compressed",
        "version": "0.9.4",
    }
    return write_folder(folder, description, tensors, sizes)


GPT_FAST_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def gpt_fast_name(name: str) -> str:
    """Return gpt-fast's name of a tensor that is no query, key or value."""
    return renamed(name, GPT_FAST_NAMES)


def gpt_fast_state(plain: Tensors, wanted: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by gpt-fast's names: fused, queries and keys in the order of interleaved RoPE."""
    head = wanted["head_dim"]
    assert isinstance(head, int)
    state = {}
    for name, tensor in plain.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            if name.endswith("q_proj.weight"):
                prefix = name.removesuffix("q_proj.weight")
                q, k, v = (plain[f"{prefix}{part}_proj.weight"] for part in "qkv")
                layer = prefix.removeprefix("model.").removesuffix("self_attn.")
                state[f"{layer}attention.wqkv.weight"] = torch.cat([interleaved(q, head), interleaved(k, head), v])
        else:
            state[gpt_fast_name(name)] = tensor
    return state


def tiled(q: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """Pack q [n, k] in 0 .. 15 into int32 tiles as `_convert_weight_to_int4pack` does, lane by lane of its kernel."""
    n, k = q.shape
    tiles = np.zeros((n // 8, k // (16 * inner_tiles), 32, inner_tiles // 2), np.uint32)
    values = q.numpy().astype(np.uint32)
    for outer in range(tiles.shape[1]):
        for lane in range(32):
            for inner in range(0, inner_tiles, 2):
                base = (outer * inner_tiles + inner) * 16 + lane % 4 * 2
                columns = [base, base + 1, base + 8, base + 9, base + 16, base + 17, base + 24, base + 25]
                rows = values[lane // 4 :: 8]
                word = sum(
                    rows[:, columns[value]] << np.uint32(4 * place)
                    for place, value in enumerate([0, 2, 4, 6, 1, 3, 5, 7])
                )
                tiles[:, outer, lane, inner // 2] = word
    return torch.from_numpy(tiles.view(np.int32))


def gpt_fast_int8(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a state with its linears in int8, and the integers and weights that these stand for."""
    stored, stands_for = {}, {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or "tok_embeddings" in name:
            stored[name] = stands_for[name] = tensor
            continue
        scales = (tensor.abs().amax(1) / 127.5).bfloat16()
        stored[name] = (tensor / scales.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        stored[name.replace(".weight", ".scales")] = scales
        stands_for[name] = stored[name].float() * scales.float()[:, None]
    return stored, stands_for


def gpt_fast_int4(
    state: Mapping[str, torch.Tensor], group: int, inner_tiles: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a state with its linears in int4 tiles, and the weights that these stand for."""
    stored, stands_for = {}, {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or "tok_embeddings" in name:
            stored[name] = stands_for[name] = tensor
            continue
        columns = tensor.shape[1]
        fits = columns % group == 0 and columns % (16 * inner_tiles) == 0
        padded = columns if fits else -(-columns // 1024) * 1024
        grouped = torch.nn.functional.pad(tensor, (0, padded - columns)).unflatten(1, (-1, group))
        scale = ((grouped.amax(2) - grouped.amin(2)).clamp(min=1e-6) / 15).bfloat16()
        zero = (grouped.amin(2) + scale * 8).bfloat16()
        low = zero.float() - 8 * scale.float()
        q = ((grouped - low[:, :, None]) / scale.float()[:, :, None]).round().clamp(0, 15)
        stored[name] = tiled(q.flatten(1).long(), inner_tiles)
        stored[name.replace(".weight", ".scales_and_zeros")] = (
            torch.stack([scale, zero], 2).transpose(0, 1).contiguous()
        )
        weight = (q - 8) * scale.float()[:, :, None] + zero.float()[:, :, None]
        stands_for[name] = weight.flatten(1)[:, :columns]
    return stored, stands_for
