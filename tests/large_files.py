"""Files of 4 GB, all holes but for a small model, in which one field is damaged: what a flipped bit of a real one does.

A length that no small file can hold fits into a large one, so it is not the file's end that refuses it.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bad_files import gguf_bytes, text
from tests.bad_hf_folders import MODEL, Build
from tests.checkpoint_writers import LLAMA, write_gguf, write_hf, write_torch
from tests.quantized_writers import quantized_model, write_gptq

SIZE = 4 << 30


def grown(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(SIZE)


def safetensors(header: bytes, length: int | None = None) -> Build:
    """A folder whose safetensors file has this header, and says that it has another length."""

    def build(root: Path) -> Path:
        folder = write_hf(root / "model", LLAMA, MODEL)
        count = len(header) if length is None else length
        grown(folder / "model.safetensors", struct.pack("<Q", count) + header)
        return folder

    return build


def one_long_bias(root: Path) -> Path:
    """A GPTQ folder with a bias where there is none, and as long as the file."""
    folder = write_gptq(root / "model", *quantized_model())
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:end])
    last = len(data) - end
    entry = {"dtype": "F16", "shape": [SIZE // 2], "data_offsets": [last, last + SIZE]}
    raw = json.dumps(header | {"model.layers.0.self_attn.q_proj.bias": entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw + data[end:])
        file.truncate(8 + len(raw) + last + SIZE)
    return folder


def gguf(change: Callable[[bytearray], None]) -> Build:
    def build(root: Path) -> Path:
        metadata = {"tokenizer.ggml.token_type": [1] * 40, "tokenizer.ggml.tokens": ["x"] * 40}
        path = write_gguf(root / "model.gguf", LLAMA, MODEL, metadata=metadata | {"llama.vocab_size": None})
        content = bytearray(path.read_bytes())
        change(content)
        grown(path, content)
        return path

    return build


def counted(key: bytes, count: int) -> Callable[[bytearray], None]:
    """Make another count of the array that stands under `key`."""

    def change(content: bytearray) -> None:
        place = content.index(key) + len(key) + 8
        assert struct.unpack_from("<Q", content, place) == (40,), "the count of items"
        struct.pack_into("<Q", content, place, count)

    return change


def zip_behind_a_hole(root: Path) -> Path:
    """A PyTorch file whose directory is said to be 1 GB long."""
    folder = write_torch(root / "model", LLAMA, MODEL)
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, len(content) - 10, 1 << 30)
    with path.open("wb") as file:
        file.write(content[:100])
        file.seek(SIZE)
        file.write(content)
    return folder


def zip64_behind_a_hole(root: Path) -> Path:
    """A PyTorch file whose directory is said to be 1 GB long where Python looks, and short where its locator points."""
    folder = write_torch(root / "model", LLAMA, MODEL)
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    locator = len(content) - 22 - 20  # PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16
    record = content[locator - 56 : locator]
    assert content[locator:][:4] == b"PK\6\7" and record[:4] == b"PK\6\6", "torch.save writes both"
    struct.pack_into("<Q", content, locator - 56 + 40, 1 << 30)
    struct.pack_into("<Q", content, locator + 8, 100)
    with path.open("wb") as file:
        file.write(content[:100] + record)
        file.seek(SIZE)
        file.write(content)
    return folder


def torch_with_a_long_pickle(root: Path) -> Path:
    folder = write_torch(root / "model", LLAMA, {})
    torch.save({"a": "x" * (60 << 20)}, folder / "pytorch_model.bin")
    return folder


def long_json(name: str) -> Build:
    """A folder in which a description is 80 MB long."""

    def build(root: Path) -> Path:
        folder = write_hf(root / "model", LLAMA, MODEL)
        (folder / name).write_bytes(b"{" + b" " * (80 << 20) + b"}")
        return folder

    return build


LARGE_CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
    "safetensors header of 90 MB of holes": (safetensors(b"{}", 90_000_000), ("model.safetensors", "90000000")),
    "safetensors header of 5 MB of holes": (safetensors(b"{}", 5_000_000), ("model.safetensors", "damaged JSON")),
    "safetensors header of 90 MB": (safetensors(b"{" + b" " * 90_000_000 + b"}"), ("model.safetensors", "90000002")),
    "a bias as long as the file": (one_long_bias, ("model.safetensors", "unexpected tensors (1)", "q_proj.bias")),
    "GGUF integers without an end": (gguf(counted(b"token_type", 40 + (1 << 24))), ("model.gguf", "token_type")),
    "GGUF texts without an end": (gguf(counted(b"ggml.tokens", 40 + (1 << 24))), ("model.gguf", "ggml.tokens")),
    "GGUF tensors without an end": (
        gguf(lambda content: struct.pack_into("<Q", content, 8, 1 << 20)), ("model.gguf", "of tensors is 1048576"),
    ),
    "GGUF arrays of a million together": (
        gguf_bytes(
            b"".join(text(key) + struct.pack("<IIQ", 9, 7, 600_000) + bytes(600_000) for key in ("a", "b")), fields=2
        ),
        ("model.gguf", "the length of b is 600000"),
    ),
    "GGUF fields without an end": (
        gguf(lambda content: struct.pack_into("<Q", content, 16, 1 << 20)), ("model.gguf", "fields is 1048576"),
    ),
    "GGUF arrays of a million": (gguf(counted(b"token_type", 1 << 20)), ("model.gguf",)),
    "a zip directory of 1 GB": (zip_behind_a_hole, ("pytorch_model.bin", "damaged")),
    "a zip64 directory of 1 GB": (zip64_behind_a_hole, ("pytorch_model.bin", "damaged")),
    "a pickle of 60 MB": (torch_with_a_long_pickle, ("pytorch_model.bin", "too large")),
    "config.json of 80 MB": (long_json("config.json"), ("config.json", "at most")),
    "generation_config.json of 80 MB": (long_json("generation_config.json"), ("generation_config.json", "at most")),
    "quantize_config.json of 80 MB": (long_json("quantize_config.json"), ("quantize_config.json", "at most")),
}  # fmt: skip
