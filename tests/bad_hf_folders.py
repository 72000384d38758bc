"""Bad Hugging Face folders, by name: what builds each, and what the error about it must say."""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoint_writers import LLAMA, make_model, write_hf, write_sharded_safetensors, write_torch

Build = Callable[[Path], Path]

MODEL = make_model(LLAMA)
NORM = "model.norm.weight"


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with `header`, right or wrong."""
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


def misnamed_record(root: Path) -> Path:
    """An archive whose directory, at the end, gives one record's name to another."""
    folder = write_torch(root / "model", LLAMA, MODEL)
    path = folder / "pytorch_model.bin"
    before, _, behind = path.read_bytes().rpartition(b"data/1PK")
    path.write_bytes(before + b"data/2PK" + behind)
    return folder


def torch_directory(at: int, value: bytes) -> Build:
    """An archive whose directory, at the end, has other bytes in the fields of one record, `at` places behind its
    start (PKWARE's APPNOTE.TXT, 4.3.12)."""

    def build(root: Path) -> Path:
        folder = write_torch(root / "model", LLAMA, MODEL)
        path = folder / "pytorch_model.bin"
        data = bytearray(path.read_bytes())
        start = data.rindex(b"data/1PK") - len("pytorch_model/") - 46 + at
        data[start : start + len(value)] = value
        path.write_bytes(data)
        return folder

    return build


def legacy_pickle(root: Path) -> Path:
    folder = write_torch(root / "model", LLAMA, {})
    torch.save(MODEL, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


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


NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
WRONG = torch.zeros(3, 5)

HF_CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
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
        config_with(json.dumps(LLAMA | {"quantization_config": {"quant_method": "fp8"}})),
        ("config.json", "quantization_config", "'fp8'"),
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
        hf_tensors(**{"\x1b[2J" + "x" * 100_000: WRONG}),
        ("unexpected tensors (1): '\\x1b[2Jxxx",),
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
    "torch file with a record of another's name": (misnamed_record, ("pytorch_model.bin", "data/2", "damaged")),
    "torch file with a record of two sizes": (torch_directory(20, b"\xff" * 4), ("data/1", "of two sizes")),
    "torch file with an encrypted record": (torch_directory(8, b"\x01\x08"), ("data/1", "encrypted")),
    "torch file with a record that is a folder": (torch_directory(38, b"\x10"), ("data/1", "or a folder")),
    "torch file without its pickle": (
        torch_rezipped(lambda name, content: (name.replace("data.pkl", "other"), content)),
        ("pytorch_model.bin", "damaged"),
    ),
    "a TorchScript program": (
        torch_rezipped(lambda name, content: (name.replace("version", "constants.pkl"), content)),
        ("pytorch_model.bin", "TorchScript"),
    ),
}
