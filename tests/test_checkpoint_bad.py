"""Checkpoints that are missing, damaged, hostile or contradictory: one typed error each, which names the place.

A memory map would turn some of these into SIGBUS, which ends pytest itself; a hang ends in the timeout.
"""

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.errors import ModelFileError
from tests.checkpoint_writers import (
    LLAMA,
    QWEN2,
    TIED,
    gguf_metadata,
    make_model,
    write_gguf,
    write_hf,
    write_llama2c,
    write_sharded_safetensors,
    write_torch,
)

pytestmark = pytest.mark.timeout(20)

Build = Callable[[Path], Path]

MODEL = make_model(LLAMA)
NORM = "model.norm.weight"


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def hf_with(content: bytes) -> Build:
    """A Hugging Face folder whose model.safetensors has `content`."""

    def build(root: Path) -> Path:
        folder = write_hf(root / "model", LLAMA, MODEL)
        (folder / "model.safetensors").write_bytes(content)
        return folder

    return build


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def hf_tensors(**changes: object) -> Build:
    """A Hugging Face folder with some tensors changed; None takes one away. `__` stands for a dot."""

    def build(root: Path) -> Path:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        tensors = {name: tensor for name, tensor in (MODEL | named).items() if isinstance(tensor, torch.Tensor)}
        return write_hf(root / "model", LLAMA, tensors)

    return build


def index_with(change: Callable[[dict[str, str], Path], object]) -> Build:
    """A sharded folder whose index's weight_map is what `change` makes of it."""

    def build(root: Path) -> Path:
        folder = write_sharded_safetensors(root / "model", LLAMA, MODEL)
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": change(shards, folder)}))
        return folder

    return build


def shard_named(name: str) -> Build:
    return index_with(lambda shards, folder: shards | {NORM: name})


def outward_link(shards: Mapping[str, str], folder: Path) -> object:
    save_file(MODEL, folder.parent / "secret.safetensors")
    (folder / "inner.safetensors").symlink_to("../secret.safetensors")
    return dict(shards) | {NORM: "inner.safetensors"}


def shard_made_by(make: Callable[[Path], object]) -> Build:
    def change(shards: dict[str, str], folder: Path) -> object:
        make(folder / "odd.safetensors")
        return shards | {NORM: "odd.safetensors"}

    return index_with(change)


def torch_with(value: object) -> Build:
    """A Hugging Face folder whose PyTorch file holds `value`."""

    def build(root: Path) -> Path:
        folder = write_torch(root / "model", LLAMA, {})
        torch.save(value, folder / "pytorch_model.bin")
        return folder

    return build


def torch_rezipped(change: Callable[[str, bytes], tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Build:
    """A PyTorch file taken apart and put together again, its records changed."""

    def build(root: Path) -> Path:
        folder = write_torch(root / "model", LLAMA, MODEL)
        path = folder / "pytorch_model.bin"
        with zipfile.ZipFile(path) as archive:
            records = [change(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in records:
                archive.writestr(name, content)
        return folder

    return build


def big_endian(name: str, content: bytes) -> tuple[str, bytes]:
    return name, b"big" if name.endswith("byteorder") else content


def legacy_pickle(root: Path) -> Path:
    folder = write_torch(root / "model", LLAMA, {})
    torch.save(MODEL, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


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


def without(name: str) -> Build:
    def build(root: Path) -> Path:
        folder = write_hf(root / "model", LLAMA, MODEL)
        (folder / name).unlink()
        return folder

    return build


def config_with(content: str) -> Build:
    def build(root: Path) -> Path:
        folder = write_hf(root / "model", LLAMA, MODEL)
        (folder / "config.json").write_text(content)
        return folder

    return build


def misspelt(root: Path) -> Path:
    write_hf(root / "smol-llama", LLAMA, MODEL)
    return root / "smol-lama"


def fifo(root: Path) -> Path:
    os.mkfifo(root / "model.gguf")
    return root / "model.gguf"


NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
WRONG = torch.zeros(3, 5)

CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
    # paths
    "no such path": (lambda root: root / "nothing", ("nothing", "no such file")),
    "a misspelt path": (misspelt, ("smol-lama", "did you mean", "smol-llama")),
    "a NUL in the path": (lambda root: root / "a\0b", ("null byte",)),
    "a path longer than any": (lambda root: root / ("x" * 5000), ("too long",)),
    "an empty folder": (folder_with(), ("empty",)),
    "a folder of other things": (folder_with("notes.txt"), ("notes.txt", "model.safetensors", ".gguf")),
    "several GGUF files": (folder_with("a.gguf", "b.gguf"), ("2 GGUF files", "a.gguf, b.gguf")),
    "Meta's own format": (folder_with("params.json", "consolidated.00.pth"), ("Meta", "not supported yet")),
    "an empty file": (file_with(b""), ("model.bin", "0 bytes")),
    "a text": (file_with(b"# Notes\nnothing here, nothing at all\n"), ("model.bin", "no known format")),
    "a device": (lambda root: Path("/dev/zero"), ("/dev/zero", "not a regular file")),
    "a FIFO": (fifo, ("model.gguf", "not a regular file")),
    # Hugging Face folders
    "no config.json": (without("config.json"), ("config.json", "missing")),
    "no weights": (without("model.safetensors"), ("model", "none of", "pytorch_model.bin")),
    "config.json is no JSON": (config_with("{'a': 1}"), ("config.json",)),
    "config.json is a list": (config_with("[]"), ("config.json", "object")),
    "config.json is nested without end": (config_with(NESTED.decode()), ("config.json",)),
    "config.json of another architecture": (
        config_with(json.dumps(LLAMA | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]})),
        ("config.json", "mamba"),
    ),
    "config.json with absurd layers": (
        config_with(json.dumps(LLAMA | {"num_hidden_layers": 2_000_000_000})),
        ("config.json", "num_hidden_layers"),
    ),
    "config.json with more layers than tensors": (
        config_with(json.dumps(LLAMA | {"num_hidden_layers": 4000})),
        ("model.safetensors", "4000 layers"),
    ),
    "a quantized folder": (
        config_with(json.dumps(LLAMA | {"quantization_config": {"quant_method": "gptq"}})),
        ("config.json", "quantization_config", "not supported yet"),
    ),
    # safetensors
    "safetensors without a header": (hf_with(b"12345"), ("model.safetensors", "truncated")),
    "safetensors with a header beyond the end": (
        hf_with(struct.pack("<Q", 1000) + b"{}"),
        ("model.safetensors", "1000"),
    ),
    "safetensors with a huge header": (hf_with(struct.pack("<Q", 2**63) + b"{}"), ("model.safetensors", str(2**63))),
    "safetensors header is no JSON": (hf_with(safetensors_bytes(b"{]")), ("model.safetensors", "JSON")),
    "safetensors header is no text": (hf_with(safetensors_bytes(b'{"\xff":1}')), ("model.safetensors", "JSON")),
    "safetensors header is a list": (hf_with(safetensors_bytes(b"[]")), ("model.safetensors", "object")),
    "safetensors header is nested without end": (hf_with(safetensors_bytes(NESTED)), ("model.safetensors",)),
    "safetensors tensor twice": (
        hf_with(safetensors_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}', bytes(8))),
        ("model.safetensors", "twice"),
    ),
    "safetensors entry is no object": (hf_with(safetensors_bytes({"a": 7})), ("model.safetensors", "'a'")),
    "safetensors dtype unknown": (hf_with(safetensors_bytes({"a": entry("F4")}, bytes(8))), ("'a'", "'F4'", "BF16")),
    "safetensors dtype no text": (hf_with(safetensors_bytes({"a": entry([1])}, bytes(8))), ("'a'", "[1]")),
    "safetensors shape negative": (hf_with(safetensors_bytes({"a": entry(shape=[-2])}, bytes(8))), ("'a'", "[-2]")),
    "safetensors shape of floats": (hf_with(safetensors_bytes({"a": entry(shape=[2.0])}, bytes(8))), ("'a'", "2.0")),
    "safetensors shape overflows": (
        hf_with(safetensors_bytes({"a": entry(shape=[2**40, 2**40])}, bytes(8))),
        ("'a'", "larger than any"),
    ),
    "safetensors offsets missing": (hf_with(safetensors_bytes({"a": entry(offsets=None)})), ("'a'", "data_offsets")),
    "safetensors offsets of the wrong size": (
        hf_with(safetensors_bytes({"a": entry(offsets=[0, 12])}, bytes(12))),
        ("'a'", "8 bytes", "[0, 12]"),
    ),
    "safetensors tensors overlap": (
        hf_with(safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12))),
        ("'b'", "overlaps"),
    ),
    "safetensors hole": (
        hf_with(safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20))),
        ("'b'", "hole"),
    ),
    "safetensors data too short": (
        hf_with(safetensors_bytes({"a": entry()}, bytes(7))),
        ("model.safetensors", "truncated"),
    ),
    "safetensors data too long": (
        hf_with(safetensors_bytes({"a": entry()}, bytes(9))),
        ("model.safetensors", "damaged"),
    ),
    "safetensors without tensors": (hf_with(safetensors_bytes({})), ("model.safetensors", "0 tensors")),
    # tensors against the config
    "a tensor missing": (hf_tensors(model__norm__weight=None), (NORM, "missing tensors (1)")),
    "a tensor too many": (hf_tensors(model__layers__7__x=WRONG), ("unexpected tensors (1)", "model.layers.7.x")),
    "the head missing though not tied": (hf_tensors(lm_head__weight=None), ("missing", "lm_head.weight")),
    "a tensor with a hostile name": (
        hf_with(
            safetensors_bytes(
                {"\x1b[2J" + "x" * 100_000: entry()} | {str(n): entry(shape=[0], offsets=[8, 8]) for n in range(3)},
                bytes(8),
            )
        ),
        ("'\\x1b[2Jx", "unexpected tensors (4)"),
    ),
    "a wrong shape": (hf_tensors(model__norm__weight=WRONG), (NORM, "[3, 5]", "[64]")),
    "a transposed matrix": (
        hf_tensors(model__layers__1__mlp__down_proj__weight=torch.zeros(96, 64)),
        ("model.layers.1.mlp.down_proj.weight", "[96, 64]", "[64, 96]"),
    ),
    "integers for weights": (hf_tensors(model__norm__weight=torch.zeros(64, dtype=torch.int8)), (NORM, "int8 [64]")),
    "everything at once": (
        hf_tensors(model__norm__weight=None, lm_head__weight=torch.zeros(3, 5), a=WRONG, b=torch.ones(2)),
        ("missing tensors (1): model.norm.weight", "unexpected tensors (2): a, b", "lm_head.weight is [3, 5]"),
    ),
    "more missing than an error can list": (
        lambda root: write_hf(root / "model", LLAMA | {"num_hidden_layers": 5}, MODEL),
        ("missing tensors (27)", "and 19 more"),
    ),
    # indices
    "an index without a map": (index_with(lambda shards, folder: None), ("index.json", "weight_map")),
    "an index that names a number": (index_with(lambda shards, folder: shards | {"a": 7}), ("index.json", "'a'", "7")),
    "an index that names a missing shard": (shard_named("gone.safetensors"), ("index.json", "gone.safetensors")),
    "an index that points upward": (shard_named("../secret.safetensors"), ("index.json", "'../secret.safetensors'")),
    "an index with an absolute name": (shard_named("/etc/passwd"), ("index.json", "'/etc/passwd'", NORM)),
    "an index that names its folder": (shard_named("."), ("index.json", "'.'")),
    "an index that names nothing": (shard_named(""), ("index.json", "''")),
    "an index with a NUL": (shard_named("a\0b"), ("index.json", "plain file name")),
    "an index with a name of another system": (shard_named("..\\secret"), ("index.json", "plain file name")),
    "an index with a link that leads out": (index_with(outward_link), ("index.json", "inner.safetensors", "leads out")),
    "an index with a link to a device": (
        shard_made_by(lambda path: path.symlink_to("/dev/zero")),
        ("index.json", "odd.safetensors", "/dev/zero"),
    ),
    "an index with a link to itself": (shard_made_by(lambda path: path.symlink_to(path)), ("odd.safetensors",)),
    "an index that names a FIFO": (shard_made_by(os.mkfifo), ("odd.safetensors", "not a regular file")),
    "an index that names a folder": (shard_made_by(os.mkdir), ("odd.safetensors", "not a regular file")),
    "an index with a tensor in the wrong shard": (
        index_with(lambda shards, folder: shards | {NORM: shards["lm_head.weight"]}),
        ("index.json", NORM, "not in the file the index names"),
    ),
    # PyTorch files
    "torch file of a list": (torch_with([1, 2]), ("pytorch_model.bin", "list")),
    "torch file with a number": (torch_with(MODEL | {"step": 7}), ("pytorch_model.bin", "'step'", "int")),
    "torch file one level too deep": (torch_with({"model": MODEL}), ("pytorch_model.bin", "'model'", "dict")),
    "torch file with a sparse tensor": (torch_with({"a": torch.eye(3).to_sparse()}), ("pytorch_model.bin",)),
    "torch file of before 1.6": (legacy_pickle, ("pytorch_model.bin", "before version 1.6")),
    "torch file compressed": (
        torch_rezipped(lambda *record: record, zipfile.ZIP_DEFLATED),
        ("pytorch_model.bin", "compressed"),
    ),
    "torch file of another byte order": (torch_rezipped(big_endian), ("pytorch_model.bin", "little-endian")),
    "torch file with a short record": (
        torch_rezipped(lambda name, content: (name, content[:-4] if name.endswith("data/0") else content)),
        ("pytorch_model.bin", "model.embed_tokens.weight"),
    ),
    "torch file without its pickle": (
        torch_rezipped(lambda name, content: (name.replace("data.pkl", "other"), content)),
        ("pytorch_model.bin", "damaged"),
    ),
    "a TorchScript program": (
        torch_rezipped(lambda name, content: (name.replace("version", "constants.pkl"), content)),
        ("pytorch_model.bin", "TorchScript"),
    ),
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
        ("model.gguf", "norm_eps"),
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


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_one_typed_error_that_names_the_place(tmp_path: Path, case: str) -> None:
    build, expected = CASES[case]
    path = build(tmp_path)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert caught.value.exit_status == 3
    assert path.name in message, message
    assert len(message.splitlines()) <= 3, message
    assert len(message) < 7000, len(message)
    for part in expected:
        assert part in message, message


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["record", "legacy"])
def test_a_hostile_pickle_executes_nothing(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "executed"
    folder = write_torch(tmp_path / "model", LLAMA, {})
    if place == "record":
        torch.save({"a": Hostile(marker)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)
    assert not marker.exists()


def write_single(form: str, root: Path) -> tuple[Path, Path]:
    """Return the path to open, and the file of weights, of a model in `form`."""
    if form == "safetensors":
        return (folder := write_hf(root / "model", LLAMA, MODEL)), folder / "model.safetensors"
    if form == "torch":
        return (folder := write_torch(root / "model", LLAMA, MODEL)), folder / "pytorch_model.bin"
    path = (write_gguf if form == "gguf" else write_llama2c)(root / "model.bin", LLAMA, MODEL)
    return path, path


FORMS = ["safetensors", "torch", "gguf", "llama2c"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere_is_an_error_when_it_is_opened(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    near_ends = [*range(0, 64, 5), *range(len(whole) - 64, len(whole) - 32, 9)]  # GGUF may end in 31 bytes of padding
    for length in {*near_ends, *range(0, len(whole) - 32, len(whole) // 64)}:
        file.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=file.name):
            open_checkpoint(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1024, len(whole) // 16):  # a zip's directory, at the end, is read when opening
        file.write_bytes(whole)
        tensors = open_checkpoint(path).tensors
        os.truncate(file, length)
        failures = 0
        for tensor in tensors.values():
            try:
                tensor[:]
            except ModelFileError as error:
                assert file.name in str(error)
                failures += 1
        assert failures, f"cut to {length} of {len(whole)} bytes"


@pytest.mark.parametrize("form", FORMS)
def test_random_damage_is_a_typed_error_or_harmless(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    dice = random.Random(0)
    headers = [dice.randrange(min(len(whole), 3000)) for _ in range(150)]
    ends = [len(whole) - 1 - dice.randrange(2000) for _ in range(100)]
    for place in headers + ends:
        damaged = bytearray(whole)
        damaged[place : place + dice.choice((1, 4, 8))] = dice.randbytes(dice.choice((0, 1, 4, 8, 30)))
        file.write_bytes(damaged)
        try:
            for tensor in open_checkpoint(path).tensors.values():
                tensor[:2]
        except ModelFileError as error:
            assert file.name in str(error)
