"""Meta's folders: any number of shards and layers gives the whole model, and params.json what the releases are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.fields import Fields
from fastgen.checkpoint.meta_config import config_from_params
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import ModelFileError
from tests.checkpoint_writers import LLAMA, TIED, fused, make_model, write_meta
from tests.models import InMemory

WIDE = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.mark.parametrize("vocabulary_split", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_of_any_number_are_merged_bit_exactly(
    tmp_path: Path, shards: int, layers: int, vocabulary_split: bool
) -> None:
    config = WIDE | {"num_hidden_layers": layers}
    model = make_model(config)
    folder = write_meta(tmp_path / "model", config, model, shards=shards, vocabulary_split=vocabulary_split)
    expected = fused(model)
    for path in (folder, folder / "consolidated.00.pth"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == "meta"
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensors[name][:], tensor), name
            assert torch.equal(checkpoint.tensors[name][7:21], tensor[7:21]), name
            if tensor.dim() == 2:
                assert torch.equal(checkpoint.tensors[name][3:9, 11:50], tensor[3:9, 11:50]), name


def test_a_tokenizer_is_found_beside_the_weights_or_above_them(tmp_path: Path, shared_data: Path) -> None:
    folder = write_meta(tmp_path / "llama" / "7B", TIED, make_model(TIED))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelFileError, match="7B: no tokenizer in this folder"):
        checkpoint.open_tokenizer()
    for name, size, place in (("llama2", 32000, folder.parent), ("llama3", 128256, folder)):
        data = (shared_data / "tokenizers" / f"{name}-tokenizer.model").read_bytes()
        (place / "tokenizer.model").write_bytes(data)
        assert checkpoint.open_tokenizer().vocab_size == size


RELEASES: dict[str, tuple[dict[str, object], int, dict[str, object]]] = {
    "llama 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        32000,
        {"hidden_dim": 11008, "max_seq_len": 2048, "n_kv_heads": 32, "rope_theta": 10000.0},
    ),
    "llama 1 65B": (
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        32000,
        {"hidden_dim": 22016, "max_seq_len": 2048},
    ),
    "llama 2 13B": (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1},
        32000,
        {"hidden_dim": 13824, "max_seq_len": 4096},
    ),
    "llama 2 70B": (
        {
            "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
            "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1,
        },
        32000,
        {"hidden_dim": 28672, "max_seq_len": 4096, "n_kv_heads": 8},
    ),
    "code llama 7B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 1000000},
        32016,
        {"hidden_dim": 11008, "max_seq_len": 16384, "rope_theta": 1e6, "vocab_size": 32016},
    ),
    "llama 3 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
        },
        128256,
        {"hidden_dim": 14336, "max_seq_len": 8192, "rope_scaling": None},
    ),
    "llama 3.1 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
        },
        128256,
        {
            "max_seq_len": 131072,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192),
        },
    ),
    "llama 3.2 1B": (
        {
            "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
            "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
        },
        128256,
        {
            "hidden_dim": 8192, "head_dim": 64, "tie_embeddings": True,
            "rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_max_seq_len=8192),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_the_params_of_every_release_give_its_published_config(release: str) -> None:
    params, rows, expected = RELEASES[release]
    tensors = {"tok_embeddings.weight": InMemory(torch.empty(rows, 1))}
    if not expected.get("tie_embeddings"):
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    config = config_from_params(Fields(params), tensors)
    assert isinstance(config, ModelConfig)
    assert {name: getattr(config, name) for name in expected} == expected


def with_params(**changes: object) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        write_meta(folder, LLAMA, make_model(LLAMA), shards=2)
        params = json.loads((folder / "params.json").read_text()) | changes
        params = {name: value for name, value in params.items() if value != "absent"}
        (folder / "params.json").write_text(json.dumps(params))
        return folder

    return build


def with_shards(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        write_meta(folder, LLAMA, make_model(LLAMA), shards=2)
        change(folder)
        return folder

    return build


def edit_shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    def edited(folder: Path) -> None:
        state = torch.load(folder / "consolidated.01.pth", weights_only=True)
        change(state)
        torch.save(state, folder / "consolidated.01.pth")

    return with_shards(edited)


NORM = "layers.1.ffn_norm.weight"
META_CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "params.json is no JSON": (
        with_shards(lambda folder: (folder / "params.json").write_text("{")),
        ("params.json", "JSON"),
    ),
    "no dim": (with_params(dim="absent"), ("params.json", "dim is missing")),
    "a dim of text": (with_params(dim="64"), ("params.json", "dim is '64'")),
    "heads that do not divide": (with_params(n_heads=5), ("params.json", "multiple of n_heads 5")),
    "KV heads that do not divide": (with_params(n_kv_heads=3), ("params.json", "3 KV heads")),
    "absurd layers": (with_params(n_layers=10**9), ("params.json", "n_layers")),
    "an absurd multiplier": (with_params(ffn_dim_multiplier=1e20), ("params.json", "ffn_dim_multiplier")),
    "another hidden size": (with_params(multiple_of=7), ("feed_forward.w1.weight", "[91, 64] is expected")),
    "another vocabulary": (with_params(vocab_size=39), ("tok_embeddings.weight", "[39, 64] is expected")),
    "experts": (with_params(moe_args={"num_experts": 8}), ("params.json", "moe_args", "not supported")),
    "adapters": (with_params(lora_args={"rank": 16}), ("params.json", "lora_args", "not supported")),
    "a quantized release": (with_params(quantization_args={"spinquant": True}), ("params.json", "quantization_args")),
    "pictures": (with_params(vision_chunk_size=448), ("params.json", "vision_chunk_size")),
    "no shards": (
        with_shards(lambda folder: [path.unlink() for path in folder.glob("*.pth")]),
        ("consolidated.00.pth", "none"),
    ),
    "the first shard missing": (
        with_shards(lambda folder: (folder / "consolidated.00.pth").unlink()),
        ("consolidated.01.pth", "expected all of them"),
    ),
    "a gap among the shards": (
        with_shards(lambda folder: (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")),
        ("consolidated.02.pth", "expected all of them"),
    ),
    "one shard of two": (
        with_shards(lambda folder: (folder / "consolidated.01.pth").unlink()),
        ("attention.wq.weight is [32, 64] where [64, 64] is expected",),
    ),
    "a shard that lacks a tensor": (
        edit_shard(lambda state: state.pop(NORM)),
        ("consolidated.01.pth", NORM, "not of one model"),
    ),
    "a shard with one too many": (
        edit_shard(lambda state: state.update(x=torch.ones(2))),
        ("consolidated.01.pth", ": x;"),
    ),
    "slices of different shapes": (
        edit_shard(lambda state: state.update({"output.weight": torch.ones(3, 64)})),
        ("output.weight", "[20, 64], [3, 64]"),
    ),
    "slices of different dtypes": (
        edit_shard(lambda state: state.update({"output.weight": state["output.weight"].half()})),
        ("output.weight", "one shape and dtype"),
    ),
    "a shard of a list": (
        with_shards(lambda folder: torch.save([1], folder / "consolidated.01.pth")),
        ("consolidated.01.pth", "list"),
    ),
    "no embedding": (
        with_shards(
            lambda folder: [torch.save({"a": torch.ones(2)}, path) for path in sorted(folder.glob("*.pth"))],
        ),
        ("params.json", "no tok_embeddings.weight"),
    ),
}


@pytest.mark.parametrize("case", META_CASES)
def test_a_bad_folder_is_one_typed_error_that_names_the_place(tmp_path: Path, case: str) -> None:
    build, expected = META_CASES[case]
    path = build(tmp_path / "model")
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "model" in message and len(message.splitlines()) <= 3
    for part in expected:
        assert part in message, message
