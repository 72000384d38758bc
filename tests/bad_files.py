"""Bad paths and bad single files, by name: what builds each, and what the error about it must say."""

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.bad_hf_folders import MODEL, Build
from tests.checkpoint_writers import LLAMA, QWEN2, TIED, gguf_metadata, make_model, write_gguf, write_hf, write_llama2c


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def gguf_bytes(content: bytes, tensors: int = 0, fields: int = 0, version: int = 3) -> Build:
    """A GGUF file made by hand."""

    def build(root: Path) -> Path:
        path = root / "model.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + content)
        return path

    return build


def gguf_tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "x") -> Build:
    place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return gguf_bytes(text(name) + place + bytes(256), tensors=1)


def gguf_with(extra: Mapping[str, np.ndarray] | None = None, /, **metadata: object) -> Build:
    """A GGUF file with some metadata changed (`__` stands for a dot), None taking a field away."""

    def build(root: Path) -> Path:
        named = {name.replace("__", "."): value for name, value in metadata.items()}
        return write_gguf(root / "model.gguf", LLAMA, MODEL, metadata=named, extra=extra)

    return build


def gguf_architecture(name: str) -> Build:
    def build(root: Path) -> Path:
        config = LLAMA | {"model_type": name}
        return write_gguf(root / "model.gguf", config, MODEL, metadata=gguf_metadata(config))

    return build


def llama2c_with(change: Callable[[bytes], bytes], config: Mapping[str, object] = TIED) -> Build:
    def build(root: Path) -> Path:
        path = write_llama2c(root / "model.bin", config, make_model(config))
        path.write_bytes(change(path.read_bytes()))
        return path

    return build


def file_with(content: bytes, name: str = "model.bin") -> Build:
    def build(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return build


def folder_with(*names: str) -> Build:
    def build(root: Path) -> Path:
        for name in names:
            (root / name).write_bytes(b"content")
        return root

    return build


def misspelt(root: Path) -> Path:
    write_hf(root / "smol-llama", LLAMA, MODEL)
    return root / "smol-lama"


def fifo(root: Path) -> Path:
    os.mkfifo(root / "model.gguf")
    return root / "model.gguf"


FILE_CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
    # paths
    "no such path": (lambda root: root / "nothing", ("nothing", "no such file")),
    "a misspelt path": (misspelt, ("smol-lama", "did you mean", "smol-llama")),
    "a NUL in the path": (lambda root: root / "a\0b", ("null byte",)),
    "a path longer than any": (lambda root: root / ("x" * 5000), ("too long",)),
    "an empty folder": (folder_with(), ("empty",)),
    "a folder of other things": (folder_with("notes.txt"), ("notes.txt", "model.safetensors", ".gguf")),
    "several GGUF files": (folder_with("a.gguf", "b.gguf"), ("2 GGUF files", "a.gguf, b.gguf")),
    "an empty file": (file_with(b""), ("model.bin", "0 bytes")),
    "a text": (file_with(b"# Notes\nnothing here, nothing at all\n"), ("model.bin", "no known format")),
    "a device": (lambda root: Path("/dev/zero"), ("/dev/zero", "not a regular file")),
    "a FIFO": (fifo, ("model.gguf", "not a regular file")),
    # llama2.c
    "llama2.c cut short": (llama2c_with(lambda raw: raw[:-4]), ("model.bin", "truncated")),
    "llama2.c with more behind": (llama2c_with(lambda raw: raw + bytes(4)), ("model.bin", "of another format")),
    "llama2.c heads that do not divide": (
        llama2c_with(lambda raw: raw[:12] + struct.pack("<i", 5) + raw[16:]),
        ("model.bin", "no header"),
    ),
    "llama2.c KV heads that do not divide": (
        llama2c_with(lambda raw: raw[:16] + struct.pack("<i", 3) + raw[20:]),
        ("model.bin", "3 KV heads"),
    ),
    "llama2.c of a later version": (llama2c_with(lambda raw: b"24ka" + raw), ("model.bin", "not supported yet")),
    # GGUF
    "GGUF of version 1": (gguf_bytes(b"", version=1), ("model.gguf", "version 1")),
    "GGUF big-endian": (gguf_bytes(b"", version=0x03000000), ("model.gguf", "big-endian")),
    "GGUF with countless tensors": (gguf_bytes(b"", tensors=2**63), ("model.gguf", "number of tensors", str(2**63))),
    "GGUF with countless fields": (gguf_bytes(b"", fields=2**40), ("model.gguf", "number of metadata fields")),
    "GGUF with an endless key": (
        gguf_bytes(struct.pack("<Q", 2**62) + bytes(64), fields=1),
        ("model.gguf", "metadata key"),
    ),
    "GGUF with an endless array": (
        gguf_bytes(text("a.b.c") + struct.pack("<IIQ", 9, 4, 2**63 - 1), fields=1),
        ("model.gguf", "the length of a.b.c"),
    ),
    "GGUF with an endless array of texts": (
        gguf_bytes(text("a.b.c") + struct.pack("<IIQ", 9, 8, 2**61), fields=1),
        ("model.gguf", "the length of a.b.c"),
    ),
    "GGUF with nested arrays": (
        gguf_bytes(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), fields=1),
        ("model.gguf", "'a'", "unknown type 9"),
    ),
    "GGUF with a value of no known type": (
        gguf_bytes(text("a") + struct.pack("<I", 77) + bytes(64), fields=1),
        ("model.gguf", "'a'", "unknown type 77"),
    ),
    "GGUF key that is no text": (
        gguf_bytes(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64), fields=1),
        ("model.gguf", "not UTF-8"),
    ),
    "GGUF key of many characters": (
        gguf_bytes(text("k" * 300) + struct.pack("<IB", 0, 1) + bytes(64), fields=1),
        ("model.gguf", "300 characters"),
    ),
    "GGUF field twice": (
        gguf_bytes((text("a") + struct.pack("<IB", 0, 1)) * 2 + bytes(64), fields=2),
        ("model.gguf", "'a'", "twice"),
    ),
    "GGUF alignment of nothing": (
        gguf_bytes(text("general.alignment") + struct.pack("<II", 4, 0) + bytes(64), fields=1),
        ("model.gguf", "general.alignment"),
    ),
    "GGUF tensor twice": (
        gguf_bytes((text("x") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2 + bytes(96), tensors=2),
        ("model.gguf", "'x'", "twice"),
    ),
    "GGUF tensors overlap": (
        gguf_bytes(b"".join(text(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in "xy") + bytes(96), tensors=2),
        ("model.gguf", "'y'"),
    ),
    "GGUF tensor without dimensions": (gguf_tensor(()), ("model.gguf", "'x'", "0 dimensions")),
    "GGUF tensor of many dimensions": (gguf_tensor((1,) * 5), ("model.gguf", "'x'", "5 dimensions")),
    "GGUF tensor without elements": (gguf_tensor((4, 0)), ("model.gguf", "'x'", "[0, 4]")),
    "GGUF tensor that overflows": (gguf_tensor((2**40, 2**40)), ("model.gguf", "'x'")),
    "GGUF tensor of no known type": (gguf_tensor((32,), kind=4711), ("model.gguf", "'x'", "4711")),
    "GGUF tensor of integers": (gguf_tensor((32,), kind=26), ("model.gguf", "'x'", "I32")),
    "GGUF tensor of half a block": (gguf_tensor((40, 2), kind=8), ("model.gguf", "'x'", "Q8_0", "32")),
    "GGUF tensor off its alignment": (gguf_tensor((8,), offset=4), ("model.gguf", "'x'", "multiple of 32")),
    "GGUF tensor beyond the end": (gguf_tensor((8,), offset=2**40), ("model.gguf", "'x'", "truncated")),
    "GGUF of another architecture": (gguf_architecture("mamba"), ("model.gguf", "'mamba'", "qwen3")),
    "GGUF adapter": (gguf_with(general__type="adapter"), ("model.gguf", "adapter")),
    "GGUF part of several": (gguf_with(split__count=3), ("model.gguf", "llama-gguf-split")),
    "GGUF field missing": (gguf_with(llama__block_count=None), ("model.gguf", "'llama.block_count'", "missing")),
    "GGUF field of the wrong type": (gguf_with(llama__block_count="two"), ("model.gguf", "'llama.block_count'", "two")),
    "GGUF heads by layer": (gguf_with(llama__attention__head_count=[4, 2]), ("model.gguf", "head_count", "[4, 2]")),
    "GGUF with absurd layers": (gguf_with(llama__block_count=2**31 - 1), ("model.gguf", "2147483647 layers")),
    "GGUF without heads": (gguf_with(llama__attention__head_count=0), ("model.gguf", "0 heads")),
    "GGUF with experts": (gguf_with(llama__expert_count=8), ("model.gguf", "'llama.expert_count'", "not supported")),
    "GGUF with a partial rotation": (gguf_with(llama__rope__dimension_count=8), ("model.gguf", "dimension_count", "8")),
    "GGUF with an unknown scaling": (gguf_with(llama__rope__scaling__type="longrope"), ("model.gguf", "'longrope'")),
    "GGUF with a factor of attention": (gguf_with(llama__rope__scaling__attn_factor=2.0), ("attn_factor", "2.0")),
    "GGUF that shrinks its context": (
        gguf_with(llama__rope__scaling__type="linear", llama__rope__scaling__factor=0.5),
        ("model.gguf", "factor 0.5"),
    ),
    "GGUF with an absurd epsilon": (
        gguf_with(llama__attention__layer_norm_rms_epsilon=float("nan")),
        ("model.gguf", "layer_norm_rms_epsilon", "nan"),
    ),
    "GGUF with two scalings": (
        gguf_with(
            {"rope_freqs.weight": np.array([1, 1, 1, 1, 1.4627318, 8, 8, 8], np.float32)},
            llama__rope__freq_base=2.0e5,
            llama__rope__scaling__type="linear",
            llama__rope__scaling__factor=2.0,
        ),
        ("model.gguf", "rope_freqs.weight", "rope.scaling"),
    ),
    "GGUF frequency factors without an end": (
        gguf_with({"rope_freqs.weight": np.full(8, np.inf, np.float32)}),
        ("model.gguf", "rope_freqs.weight", "not supported"),
    ),
    "GGUF frequency factors of its own": (
        gguf_with({"rope_freqs.weight": np.full(8, 2.0, np.float32)}),
        ("model.gguf", "rope_freqs.weight", "not supported"),
    ),
    "GGUF frequency factors of the wrong size": (
        gguf_with({"rope_freqs.weight": np.ones(7, np.float32)}),
        ("model.gguf", "rope_freqs.weight", "[7]"),
    ),
    "GGUF with a tensor too many": (
        gguf_with({"blk.0.attn_qkv.weight": np.ones((2, 2), np.float32)}),
        ("model.gguf", "unexpected", "blk.0.attn_qkv.weight"),
    ),
    "GGUF with another vocabulary than embedding": (
        gguf_with(tokenizer__ggml__tokens=["a", "b"]),
        ("model.gguf", "token_embd.weight is [40, 64] where [2, 64]"),
    ),
    "GGUF biases of queries only": (
        lambda root: write_gguf(
            root / "model.gguf",
            QWEN2,
            {name: tensor for name, tensor in make_model(QWEN2).items() if "k_proj.bias" not in name},
        ),
        ("model.gguf", "missing tensors (2)", "blk.0.attn_k.bias"),
    ),
}
