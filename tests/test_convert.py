"""`fastgen.convert --to hf`: what is written says the same as what was read, to us and to transformers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.convert import main
from fastgen.errors import CapacityError, ModelFileError, UsageError
from fastgen.load import load_model
from fastgen.manifest import verify_manifest
from fastgen.tokenizer.llama2c_bin import parse_llama2c
from fastgen.tokenizer.open import open_tokenizer
from fastgen.tokenizer.score_bpe_json import score_bpe_json
from fastgen.tokenizer.settings import Settings
from quantize import run
from tests import test_checkpoint_memory as memory
from tests.checkpoint_writers import LLAMA, QWEN2, QWEN3, TIED, make_model, write_gguf, write_hf, write_meta
from tests.quantized_writers import quantized_model, write_awq, write_compressed, write_gptq
from tests.vocabularies import sentencepiece_as_gguf, small_byte_level, small_sentencepiece
from tp.place import Place
from tp.watch import process_watch


def with_tokenizer(folder: Path) -> Path:
    content = json.loads(small_byte_level())
    content["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": []}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def gguf_with_words(root: Path) -> Path:
    words = sentencepiece_as_gguf(sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece()))
    size = len(words["tokenizer.ggml.tokens"])
    config = TIED | {"vocab_size": size}
    return write_gguf(root / "model.gguf", config, make_model(config), metadata=words | {"llama.vocab_size": None})


SOURCES: dict[str, Callable[[Path], Path]] = {
    "hf-tied": lambda root: with_tokenizer(write_hf(root / "model", TIED, make_model(TIED))),
    "hf-qwen2": lambda root: with_tokenizer(write_hf(root / "model", QWEN2, make_model(QWEN2))),
    "hf-qwen3": lambda root: with_tokenizer(write_hf(root / "model", QWEN3, make_model(QWEN3))),
    "meta": lambda root: with_tokenizer(write_meta(root / "model", LLAMA, make_model(LLAMA), shards=2)),
    "gguf": gguf_with_words,
    "gptq": lambda root: with_tokenizer(write_gptq(root / "model", *quantized_model())),
    "gptq-sym": lambda root: with_tokenizer(write_gptq(root / "model", *quantized_model(symmetric=True), sym=True)),
    "gptq-act-order": lambda root: with_tokenizer(write_gptq(root / "model", *quantized_model(scattered=True))),
    "awq": lambda root: with_tokenizer(write_awq(root / "model", *quantized_model())),
    "int8": lambda root: with_tokenizer(
        write_compressed(
            root / "model", *quantized_model(bits=8, group=-1, symmetric=True), packing="int-quantized",
            symmetric=True, group=-1,
        )
    ),
}  # fmt: skip


def test_only_the_tokenizer_that_was_read_is_written(tmp_path: Path, shared_data: Path) -> None:
    """llama2.c's models never take a tokenizer.json, which others would prefer."""
    shutil.copy(shared_data / "models" / "stories260K.bin", tmp_path)
    shutil.copy(shared_data / "tokenizers" / "tok512.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(small_byte_level())))
    (tmp_path / "tokenizer.bin").write_bytes((shared_data / "tokenizers" / "tok512.bin").read_bytes())
    target = convert(tmp_path / "stories260K.bin", tmp_path / "out")
    expected = open_tokenizer(shared_data / "tokenizers" / "tok512.model")
    assert load_model(target, device="cpu").tokenizer.encode("Once upon a time") == expected.encode("Once upon a time")


def convert(source: Path, target: Path, *arguments: str) -> Path:
    assert main(["--model", str(source), "--to", "hf", "--out", str(target), *arguments]) == 0
    return target


@pytest.mark.parametrize("form", SOURCES)
def test_what_is_written_is_what_was_read(tmp_path: Path, form: str) -> None:
    source = SOURCES[form](tmp_path)
    before, after = open_checkpoint(source), open_checkpoint(convert(source, tmp_path / "out"))
    assert not verify_manifest(tmp_path / "out")
    assert after.formats == before.formats and set(after.tensors) == set(before.tensors)
    assert bool(after.formats) == (form in ("gptq", "gptq-sym", "awq", "int8"))
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name][:], tensor[:].to(after.tensors[name].dtype)), name
        if name.rpartition(".")[2] not in ("weight", "bias"):
            assert after.tensors[name].dtype == tensor.dtype, name
    same = ("dim", "n_kv_heads", "hidden_dim", "vocab_size", "max_seq_len", "rope_theta", "tie_embeddings", "qk_norm")
    assert [getattr(after.config, name) for name in same] == [getattr(before.config, name) for name in same]
    text = "Once upon a time"
    assert after.open_tokenizer().encode(text) == before.open_tokenizer().encode(text)


@torch.inference_mode()
def ours(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = load_model(folder, device="cpu", dtype="fp32")
    model.transformer.allocate_cache(1, tokens.shape[1])
    positions = torch.arange(tokens.shape[1])
    hidden = model.transformer(tokens, positions[None], positions, torch.tensor([tokens.shape[1]]))
    return model.transformer.logits(hidden)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("form", ["meta", "gguf", "gptq", "gptq-sym", "gptq-act-order", "awq", "int8"])
def test_transformers_predicts_the_same_of_it(tmp_path: Path, form: str) -> None:
    """Zero points are dequantized at load: left packed, transformers 5.23 refuses them, compressed-tensors' own too
    (https://github.com/vllm-project/llm-compressor/issues/1618)."""
    source = SOURCES[form](tmp_path)
    tokens = torch.arange(24)[None]
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if form in ("gptq", "awq") else {}
    theirs = AutoModelForCausalLM.from_pretrained(convert(source, tmp_path / "out"), dtype=torch.float32, **how)
    with torch.inference_mode():
        found = theirs(tokens).logits
    expected = ours(source, tokens)
    limit = 2**-9 if open_checkpoint(source).formats else 1e-5  # they compute weights in the scales' fp16, of 2**-11
    assert (found - expected).norm() < limit * expected.norm()


def test_another_precision_is_written_on_request_and_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    source = with_tokenizer(write_hf(tmp_path / "model", LLAMA, model))
    checkpoint = open_checkpoint(convert(source, tmp_path / "bf16", "--dtype", "bf16"))
    assert checkpoint.dtype == torch.bfloat16
    assert torch.equal(checkpoint.tensors["norm.weight"][:], model["model.norm.weight"].bfloat16())
    model["model.norm.weight"][3] = 1e6
    source = with_tokenizer(write_hf(tmp_path / "large", LLAMA, model))
    with pytest.raises(ModelFileError, match=r"large: model.norm.weight holds values that are not finite"):
        convert(source, tmp_path / "fp16", "--dtype", "fp16")
    assert not (tmp_path / "fp16").exists()


def test_large_models_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["hf-tied"](tmp_path)
    monkeypatch.setattr("fastgen.checkpoint.hf_export.SHARD_BYTES", 60_000)
    target = convert(source, tmp_path / "out")
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert torch.equal(open_checkpoint(target).tensors["norm.weight"][:], make_model(TIED)["model.norm.weight"])


def test_what_stands_there_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["hf-tied"](tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert(source, tmp_path / "there")
    with pytest.raises(UsageError, match="--to hf and --out DIR are needed"):
        main(["--model", str(source)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CapacityError, match=r"needs .* MB"):
        convert(source, tmp_path / "out")


def test_pieces_and_scores_become_a_list_of_merges_that_gives_the_same_ids(tmp_path: Path, shared_data: Path) -> None:
    """Llama 2's vocabulary from its llama2.c form, on llama.cpp's cases and on text."""
    data = shared_data / "tokenizers" / "llama2-tokenizer.bin"
    pieces = parse_llama2c(data.read_bytes(), data, Settings())
    (tmp_path / "tokenizer.json").write_text(score_bpe_json(pieces))
    merged = open_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    cases = (shared_data / "tokenizers" / "llama-tokenizer-cases.inp").read_text().split("\n__ggml_vocab_test__\n")
    text = (shared_data / "text" / "wikitext2-raw-test.txt").read_text()[:20_000]
    for case in (*cases, text):
        expected = pieces.encode(case)
        assert merged.encode(case) == expected, case
        assert theirs(case)["input_ids"] == expected, case
        assert merged.decode(expected) == pieces.decode(expected)


CHILD = """
import sys
from pathlib import Path
from fastgen.convert import main

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

import fastgen.checkpoint.hf_export, fastgen.model_folder, fastgen.session
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
assert main(["--model", sys.argv[1], "--to", "hf", "--out", sys.argv[2]]) == 0
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_any_size_takes_the_memory_of_its_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 16000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    monkeypatch.setattr(memory, "CONFIG", memory.CONFIG | smaller | heads)
    (tmp_path / "in").mkdir()
    memory.write_sparse(tmp_path / "in")
    with_tokenizer(tmp_path / "in")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    peak, largest = int(child.stdout.splitlines()[-1]), 16000 * 1024 * 2
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 330_000_000
    assert peak < largest + 128 * 2**20, f"peak of {peak} bytes for {size}, where the largest tensor has {largest}"


def test_a_folder_of_quantize_run_is_written_as_it_is(tmp_path: Path) -> None:
    arguments: Mapping[str, str] = {"--model": "stories", "--quant": "int4", "--group-size": "32"}
    run.main([part for pair in arguments.items() for part in pair] + ["--out", str(tmp_path / "int4")])
    before, after = open_checkpoint(tmp_path / "int4"), open_checkpoint(convert(tmp_path / "int4", tmp_path / "again"))
    assert before.formats == after.formats
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name][:], tensor[:]), name


def test_of_several_processes_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_watch(), "place", Place(rank=1, world=2))
    assert main(["--model", "stories-draft", "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(process_watch(), "place", Place(rank=0, world=2))
    assert main(["--model", "stories-draft", "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").exists()
