"""llama2.c's first format (v0, `stories15M.bin` and its like): seven integers, then every weight in float32.

Layout: `legacy_export` in https://github.com/karpathy/llama2.c/blob/master/export.py. Tensors of one kind stand one
behind the other for all layers; two RoPE tables follow the last norm. A negative vocabulary size says that the head
is stored apart from the embeddings. The file has no magic number, so its exact size is what tells it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from fastgen.checkpoint.lazy import Checkpoint, FileTensor, LazyTensor
from fastgen.checkpoint.names import META, Shape, assemble
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile, naming
from fastgen.tokenizer.open import MissingTokenizerError, open_tokenizer

HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
LIMITS = (2**17, 2**20, 2**12, 2**12, 2**12, 2**24, 2**24)  # beyond these, seven integers are no header
TOKENIZERS = ("tokenizer.model", "tokenizer.bin")


def looks_like_llama2c(start: bytes) -> bool:
    """Return whether a file's first 28 bytes can be the header of a llama2.c v0 file."""
    if len(start) < HEADER.size:
        return False
    fields = HEADER.unpack(start[: HEADER.size])
    sizes = (*fields[:5], abs(fields[5]), fields[6])
    return all(0 < size <= limit for size, limit in zip(sizes, LIMITS, strict=True))


def open_llama2c(path: Path) -> Checkpoint:
    """Open the llama2.c v0 file `path`. Raises `ModelFileError` when its size is not the one its header implies."""
    file = RandomAccessFile(path)
    config = _config(file)
    tensors: dict[str, LazyTensor] = {}
    position = HEADER.size
    for names, shape in _layout(config):
        for name in names:
            tensors[name] = FileTensor(file, position, shape, torch.float32)
            position += tensors[name].nbytes
    if position != file.size:
        raise ModelFileError(
            f"{path}: {file.size} bytes, but a llama2.c model of {config.n_layers} layers of width {config.dim} and "
            f"{config.vocab_size} tokens has {position}: the file is truncated or of another format"
        )
    tables = [name for name in tensors if name.startswith("freqs_")]
    for name in tables:
        del tensors[name]
    return Checkpoint(
        path=path,
        format="llama2.c v0",
        config=config,
        dtype=torch.float32,
        tensors=assemble(config, tensors, META, path),
        open_tokenizer=lambda: open_tokenizer(tokenizer_place(path)),
    )


def _config(file: RandomAccessFile) -> ModelConfig:
    start = file.read(0, HEADER.size)
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(start)
    if not looks_like_llama2c(bytes(start)) or dim % n_heads:
        raise ModelFileError(f"{file.path}: {HEADER.unpack(start)} is no header of a llama2.c model")
    with naming(file.path):
        return ModelConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads,
            hidden_dim=hidden_dim,
            vocab_size=abs(vocab_size),
            max_seq_len=max_seq_len,
            norm_eps=1e-5,
            rope_theta=10000.0,
            tie_embeddings=vocab_size > 0,
            bos_token_id=1,
            eos_token_ids=(1, 2),  # its training texts follow each other with only a beginning-of-sequence between them
        )


def _layout(config: ModelConfig) -> Iterator[tuple[list[str], Shape]]:
    """Yield what the file holds, in order: the names of tensors that follow each other, and their common shape."""

    def stacked(name: str, *shape: int) -> tuple[list[str], Shape]:
        return [f"layers.{layer}.{name}.weight" for layer in range(config.n_layers)], shape

    dim, q_dim, kv_dim, hidden_dim = config.dim, config.q_dim, config.kv_dim, config.hidden_dim
    yield ["tok_embeddings.weight"], (config.vocab_size, dim)
    yield stacked("attention_norm", dim)
    yield stacked("attention.wq", q_dim, dim)
    yield stacked("attention.wk", kv_dim, dim)
    yield stacked("attention.wv", kv_dim, dim)
    yield stacked("attention.wo", dim, q_dim)
    yield stacked("ffn_norm", dim)
    yield stacked("feed_forward.w1", hidden_dim, dim)
    yield stacked("feed_forward.w2", dim, hidden_dim)
    yield stacked("feed_forward.w3", hidden_dim, dim)
    yield ["norm.weight"], (dim,)
    yield ["freqs_cos", "freqs_sin"], (config.max_seq_len, config.head_dim // 2)
    if not config.tie_embeddings:
        yield ["output.weight"], (config.vocab_size, dim)


def tokenizer_place(path: Path) -> Path:
    """Return the tokenizer's file beside the model; raises `MissingTokenizerError` where there is none."""
    for name in TOKENIZERS:
        if (path.parent / name).exists():
            return path.parent / name
    raise MissingTokenizerError(
        f"{path}: a llama2.c model carries no tokenizer, and there is no {' or '.join(TOKENIZERS)} beside it; "
        "pass one with --tokenizer"
    )
