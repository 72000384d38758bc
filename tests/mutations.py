"""Checkpoints of every format, damaged at random: case `seed` of a form is always the same.

    case = mutate(base, seed)         # some of the files of `base` changed
    outcome = examine(base, folder)   # "refused", "loaded", or an AssertionError that says what went wrong

A damaged checkpoint may be refused, by a `ModelFileError` of a few lines, or load, and then what it gives must be what
its config asks for and, where the format has a library of its own, what that library reads: a flipped bit among the
weights is no error that a file without checksums could show.
"""

import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load as load_safetensors

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.lazy import Checkpoint
from fastgen.errors import ModelFileError
from quantize.format import INT8
from tests.checkpoint_writers import (
    LLAMA,
    Tensors,
    fused,
    make_model,
    write_gguf,
    write_hf,
    write_llama2c,
    write_meta,
    write_sharded_safetensors,
    write_sharded_torch,
    write_torch,
)
from tests.quantized_writers import (
    gpt_fast_int4,
    gpt_fast_int8,
    gpt_fast_state,
    quantized_model,
    write_awq,
    write_compressed,
    write_gptq,
)
from tests.vocabularies import sentencepiece_as_gguf, small_sentencepiece

SMALL = LLAMA | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 16,
}  # fmt: skip
MODEL = make_model(SMALL)

SHARES = {
    "safetensors": 3000, "safetensors-sharded": 2000, "torch": 1000, "torch-sharded": 500, "meta": 500, "gguf": 3000,
    "gguf-with-tokenizer": 1500, "llama2c": 2000, "gptq": 1500, "awq": 1500, "compressed": 1500,
    "compressed-int8": 1000, "gpt-fast-int8": 500, "gpt-fast-int4": 500,
}  # fmt: skip
"""Of 20,000 cases, how many each form has: PyTorch's archives take several times as long to read as other files."""

MESSAGE_LINES, MESSAGE_CHARACTERS = 3, 8000
HEADER = 4000  # bytes at either end of a file, where most of what describes it stands
INTEGERS = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 1e300, float("nan"), 0.5, "", "x", "../x", "\0", "1", [], [1],
          {}, {"a": 1}, [[]], "F32", "group", "Linear", "x" * 5000)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A sound checkpoint: its files by name, and the one of them to open (else the folder)."""

    form: str
    files: Mapping[str, bytes]
    opened: str = ""

    def write(self, folder: Path, changes: Mapping[str, bytes | None] | None = None) -> Path:
        """Write the files, or only the changed ones, and return what is to be opened."""
        for name, data in (self.files if changes is None else changes).items():
            if data is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data)
        return folder / self.opened if self.opened else folder


def make_bases() -> dict[str, Base]:
    """Return a small model in every form that is read."""
    state = gpt_fast_state(MODEL, SMALL)
    small = {"sizes": SMALL}
    root = Path(tempfile.mkdtemp())
    words = sentencepiece_as_gguf(sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece()))
    tokens = len(words["tokenizer.ggml.tokens"])
    spoken = SMALL | {"vocab_size": tokens, "hidden_size": 16, "head_dim": 8, "intermediate_size": 16}

    def gpt_fast(name: str, stored: Tensors) -> Path:
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SMALL))
        torch.save(stored, folder / f"{name}.pth")
        return folder / f"{name}.pth"

    int8 = quantized_model(bits=8, group=-1, symmetric=True, **small)
    paths = {
        "safetensors": write_hf(root / "hf", SMALL, MODEL),
        "safetensors-sharded": write_sharded_safetensors(root / "shards", SMALL, MODEL),
        "torch": write_torch(root / "torch", SMALL, MODEL),
        "torch-sharded": write_sharded_torch(root / "torches", SMALL, MODEL),
        "meta": write_meta(root / "meta", SMALL, MODEL, shards=2),
        "gguf": write_gguf(root / "plain.gguf", SMALL, MODEL),
        "gguf-with-tokenizer": write_gguf(
            root / "words.gguf", spoken, make_model(spoken), metadata=words | {"llama.vocab_size": None}
        ),
        "llama2c": write_llama2c(root / "model.bin", SMALL, MODEL),
        "gptq": write_gptq(root / "gptq", *quantized_model(group=32, **small), sizes=SMALL, group_size=32),
        "awq": write_awq(root / "awq", *quantized_model(group=32, **small), sizes=SMALL, group_size=32),
        "compressed": write_compressed(root / "ct", *quantized_model(group=32, **small), sizes=SMALL, group=32),
        "compressed-int8": write_compressed(root / "ct8", *int8, sizes=SMALL, group=-1, symmetric=True),
        "gpt-fast-int8": gpt_fast("model_int8", gpt_fast_int8(state)[0]),
        "gpt-fast-int4": gpt_fast("model_int4", gpt_fast_int4(state, 32, 2)[0]),
    }
    bases = {}
    for form, path in paths.items():
        alone = path.suffix in (".gguf", ".bin")
        files = [path] if alone else sorted((path if path.is_dir() else path.parent).iterdir())
        bases[form] = Base(form, {file.name: file.read_bytes() for file in files}, "" if path.is_dir() else path.name)
    shutil.rmtree(root)
    return bases


def mutate(base: Base, seed: int) -> dict[str, bytes | None]:
    """Return the files of `base` that are different in case `seed`; None: not there any more."""
    dice = random.Random(f"{base.form} {seed}")
    name = dice.choice(sorted(base.files))
    data = base.files[name]
    if dice.random() < 0.03:
        others = [other for other in base.files if other != name] or [name]
        return {name: dice.choice([None, b"", base.files[dice.choice(others)], dice.randbytes(64)])}
    if name.endswith(".json") and dice.random() < 0.85:
        return {name: _edited_json(data, dice)}
    if name.endswith(".safetensors") and dice.random() < 0.6:
        length = struct.unpack_from("<Q", data)[0]
        header = _edited_json(data[8 : 8 + length], dice)
        return {name: struct.pack("<Q", len(header)) + header + data[8 + length :]}
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        data = dice.choice(STRATEGIES)(data, dice)
    return {name: data}


def _edited_json(data: bytes, dice: random.Random) -> bytes:
    """Return a JSON text in which one value somewhere is another, gone, or there under another name."""
    tree = json.loads(data)
    places: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(tree)
    owner, key = dice.choice(places)
    action = dice.random()
    if action < 0.15:
        del owner[key]
    elif action < 0.25 and isinstance(owner, dict):
        owner[dice.choice(["x", f"{key}x", str(key).upper(), "dtype", "weight"])] = owner.pop(key)
    elif action < 0.4:
        other, place = dice.choice(places)
        owner[key] = json.loads(json.dumps(other[place]))
    elif action < 0.6 and type(owner[key]) is int:
        owner[key] += dice.choice((-1, 1, 4, -4, 2**20, 2**40))
    else:
        owner[key] = dice.choice(VALUES)
    return json.dumps(tree).encode()


def _place(data: bytes, dice: random.Random) -> int:
    """Return a place in `data`, most often near one of its ends."""
    kind, size = dice.random(), max(len(data), 1)
    if kind < 0.55:
        return dice.randrange(min(size, HEADER))
    return size - 1 - dice.randrange(min(size, HEADER)) if kind < 0.85 else dice.randrange(size)


def _flip(data: bytes, dice: random.Random) -> bytes:
    at = _place(data, dice)
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :] if data else data


def _scribble(data: bytes, dice: random.Random) -> bytes:
    at, noise = _place(data, dice), dice.randbytes(dice.choice((1, 2, 4, 8, 32)))
    return data[:at] + noise + data[at + len(noise) :]


def _integer(data: bytes, dice: random.Random) -> bytes:
    at, form = _place(data, dice) & ~3, dice.choice(("<Q", "<I"))
    value = dice.choice(INTEGERS) & (2 ** (8 * struct.calcsize(form)) - 1)
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: _place(data, dice)]


def _remove(data: bytes, dice: random.Random) -> bytes:
    at = _place(data, dice)
    return data[:at] + data[at + dice.choice((1, 4, 8, 64)) :]


def _insert(data: bytes, dice: random.Random) -> bytes:
    at = _place(data, dice)
    return data[:at] + dice.choice((b"\0", bytes(8), dice.randbytes(5), b'"', b"}", b"\xff" * 8)) + data[at:]


def _repeat(data: bytes, dice: random.Random) -> bytes:
    at, size = _place(data, dice), dice.choice((4, 16, 200))
    return data[:at] + data[at : at + size] + data[at:]


def _exchange(data: bytes, dice: random.Random) -> bytes:
    first, second = sorted((_place(data, dice), _place(data, dice)))
    size = min(dice.choice((4, 8, 32)), second - first, len(data) - second)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


STRATEGIES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _scribble, _integer, _integer, _cut, _remove, _insert, _repeat, _exchange,
)  # fmt: skip


def examine(base: Base, folder: Path) -> str:
    """Open what lies in `folder`, read all of it, and return "refused" or "loaded".

    Raises AssertionError for an error of another kind or form, and for a load that gives what it should not.
    """
    path = folder / base.opened if base.opened else folder
    try:
        checkpoint = open_checkpoint(path)
        values = {name: tensor[:] for name, tensor in checkpoint.tensors.items()}
        if base.form == "gguf-with-tokenizer":
            tokenizer = checkpoint.open_tokenizer()
            tokenizer.decode(tokenizer.encode("Once upon a é", parse_special=True))
    except ModelFileError as error:
        message = str(error)
        lines = len(message.splitlines())
        assert folder.name in message or path.name in message, f"names no file: {message}"
        assert lines <= MESSAGE_LINES and len(message) <= MESSAGE_CHARACTERS, f"{lines} lines: {message[:500]}"
        return "refused"
    found = {name: tuple(value.shape) for name, value in values.items()}
    assert found == expected_shapes(checkpoint), "tensors that the config does not ask for"
    reference = READERS.get(base.form)
    if reference is not None:
        _assert_same(values, reference(folder, base))
    return "loaded"


def expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a model has, by its config and its formats alone."""
    c = checkpoint.config
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (c.vocab_size, c.dim), "norm.weight": (c.dim,)}
    linears = {} if c.tie_embeddings else {"lm_head": (c.vocab_size, c.dim)}
    for layer in range(c.n_layers):
        prefix, qkv = f"layers.{layer}.", c.q_dim + 2 * c.kv_dim
        shapes |= {f"{prefix}attention_norm.weight": (c.dim,), f"{prefix}ffn_norm.weight": (c.dim,)}
        linears |= {f"{prefix}wqkv": (qkv, c.dim), f"{prefix}wo": (c.dim, c.q_dim)}
        linears |= {f"{prefix}w_gate_up": (2 * c.hidden_dim, c.dim), f"{prefix}w_down": (c.dim, c.hidden_dim)}
        for present, name, size in (
            (c.qkv_bias, "wqkv", qkv), (c.output_bias, "wo", c.dim), (c.mlp_bias, "w_gate_up", 2 * c.hidden_dim),
            (c.mlp_bias, "w_down", c.dim),
        ):  # fmt: skip
            shapes |= {f"{prefix}{name}.bias": (size,)} if present else {}
        shapes |= {f"{prefix}{part}_norm.weight": (c.head_dim,) for part in "qk" if c.qk_norm}
    for name, (rows, columns) in linears.items():
        form = checkpoint.formats.get(name)
        if form is None:
            shapes[f"{name}.weight"] = (rows, columns)
        elif form == INT8:
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.weight_scale": (rows, 1)}
        else:
            groups = (rows, columns // (form.group_size or columns))
            shapes |= {f"{name}.weight_packed": (rows, columns // 8), f"{name}.weight_scale": groups}
            shapes |= {} if form.symmetric else {f"{name}.weight_zero_point": groups}
    return shapes


def _assert_same(values: Mapping[str, torch.Tensor], reference: Tensors) -> None:
    for name, expected in fused(reference).items():
        if name in values:  # a head beside tied embeddings is not read
            same = values[name].view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
            assert same, f"{name} is not what the format's own library reads"


def _with_safetensors(folder: Path, base: Base) -> Tensors:
    return load_safetensors((folder / "model.safetensors").read_bytes())


def _with_shards(folder: Path, base: Base) -> Tensors:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_safetensors((folder / name).read_bytes()) for name in set(index.values())}
    return {tensor: files[name][tensor] for tensor, name in index.items()}


def _with_torch(folder: Path, base: Base) -> Tensors:
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


READERS: Mapping[str, Callable[[Path, Base], Tensors]] = {
    "safetensors": _with_safetensors,
    "safetensors-sharded": _with_shards,
    "torch": _with_torch,
}
"""Forms whose own library reads the same files: whatever we load, it loads, and to the same bits."""
