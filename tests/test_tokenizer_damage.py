"""Damaged tokenizer files of every format end in a `ModelFileError` that names the file, and in nothing else."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from fastgen.errors import ModelFileError
from fastgen.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from fastgen.tokenizer.open import open_tokenizer
from tests.vocabularies import (
    byte_level_as_gguf,
    sentencepiece_as_gguf,
    sentencepiece_as_json,
    sentencepiece_as_llama2c,
    small_byte_level,
    small_sentencepiece,
)

pytestmark = pytest.mark.timeout(120)


def spm() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece())


def small_llama2c() -> bytes:
    return sentencepiece_as_llama2c(spm(), lambda value: b"<0x%02X>" % value)


FORMATS: dict[str, Callable[[], bytes]] = {
    "sentencepiece": small_sentencepiece,
    "sentencepiece json": lambda: sentencepiece_as_json(spm()).encode(),
    "byte-level json": lambda: small_byte_level().encode(),
    "llama2c": small_llama2c,
}


def edited_json(**changes: object) -> bytes:
    return json.dumps(json.loads(small_byte_level()) | changes).encode()


def edited_model(**changes: object) -> bytes:
    return edited_json(model=json.loads(small_byte_level())["model"] | changes)


def without_longest_token() -> bytes:
    vocabulary = json.loads(small_byte_level())["model"]["vocab"]
    longest = max(vocabulary, key=len)
    return edited_model(vocab={token: index for token, index in vocabulary.items() if token != longest})


NAMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no known tokenizer"),
    "zeros": (lambda: bytes(4096), "not the 256 bytes|cut off"),
    "text": (lambda: b"just some text\n", "no known tokenizer"),
    "gguf": (lambda: b"GGUF" + bytes(60), "no known tokenizer"),
    "half a sentencepiece model": (lambda: small_sentencepiece()[:2000], "damaged"),
    "one byte of a sentencepiece model": (lambda: b"\n", "damaged"),
    "half a json": (lambda: small_byte_level().encode()[:500], "damaged JSON"),
    "deep json": (lambda: b'{"a":' + b"[" * 100_000, "damaged JSON"),
    "json of something else": (lambda: b'{"version": "1.0"}', "no valid tokenizer.json"),
    "json with another decoder": (
        lambda: edited_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "WordPiece",
    ),
    "json without a decoder": (lambda: edited_json(decoder=None), "decoder None"),
    "json with a broken pattern": (
        lambda: edited_json(normalizer={"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}),
        "no valid tokenizer.json",
    ),
    "json of a unigram": (lambda: edited_model(type="Unigram"), "'Unigram' is not supported"),
    # The library itself answers the next three with an abort, a Rust panic and an untyped exception while encoding.
    "json with affixes": (lambda: edited_model(continuing_subword_prefix="##"), "'##' is not supported"),
    "json without its longest token": (without_longest_token, "merge .* not in the vocabulary"),
    "json with an unknown unknown": (lambda: edited_model(unk_token="<none>"), "'<none>' is not in the vocabulary"),
    "half a llama2c": (lambda: small_llama2c()[:3000], "id [0-9]+, at byte [0-9]+, is cut off"),
    "llama2c of few tokens": (lambda: small_llama2c()[:100], "cut off|256 bytes"),
    "llama2c with a negative length": (lambda: small_llama2c()[:8] + b"\xff" * 4 + small_llama2c()[12:], "no known"),
    "ranks that are few": (lambda: b"IQ== 0\nIg== 1\n", "2 distinct tokens"),
    "ranks out of order": (lambda: b"IQ== 0\nIg== 7\n", "line 2 has rank b'7', expected 1"),
    "ranks that are no base64": (lambda: b"IQ== 0\n!!!! 1\n", "line 2 is no base64"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    make, message = NAMED[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(make())
    with pytest.raises(ModelFileError, match=message) as error:
        open_tokenizer(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    source, chance = FORMATS[name](), random.Random(0)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(150):
        data = bytearray(source)
        for _ in range(chance.choice([1, 4, 16])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            tokenizer = open_tokenizer(path)
        except ModelFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            tokenizer.decode(tokenizer.encode("Once upon a time, 🙂 é", parse_special=True))
            tokenizer.decode(range(tokenizer.vocab_size))
    assert refused > 50


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer in this folder, expected tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_tokenizer(tmp_path)


def test_a_byte_order_mark_in_front_of_a_file_is_passed_over(tmp_path: Path) -> None:
    texts = {"tokenizer.json": small_byte_level(), "tokenizer_config.json": "{}", "chat_template.jinja": "{{ 1 }}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the time", bos=False)) == "the time"
    assert tokenizer.chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer_config.json", "{", "damaged JSON"),
        ("tokenizer_config.json", "[" * 100_000, "damaged JSON"),
        ("tokenizer_config.json", "[]", "a JSON object is expected"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token is 'yes'"),
        ("tokenizer_config.json", '{"bos_token": "<nope>"}', "bos_token '<nope>'"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'"),
        ("generation_config.json", '{"eos_token_id": [2, -1]}', "eos_token_id"),
        ("chat_template.jinja", "\udcff", "not UTF-8 at byte 0"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(small_byte_level())
    (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelFileError, match=message) as error:
        open_tokenizer(tmp_path)
    assert file in str(error.value)


@pytest.mark.parametrize(
    "kind, key, value, message",
    [
        ("llama", "model", "wordpiece", "expected llama or gpt2"),
        ("llama", "model", None, "expected a string"),
        ("llama", "tokens", [], "a list of strings"),
        ("llama", "tokens", 7, "a list of strings"),
        ("llama", "tokens", ["a"], "one for each of 1 tokens"),
        ("llama", "scores", None, "a list of numbers"),
        ("llama", "scores", [0.0], "1 values"),
        ("llama", "scores", [float("nan")] * 420, "not numbers"),
        ("llama", "token_type", [0] * 420, "values from 1 to 6"),
        ("llama", "token_type", [1] * 420, "0 byte tokens"),
        ("llama", "bos_token_id", 420, "an id below 420"),
        ("llama", "bos_token_id", True, "an integer"),
        ("llama", "bos_token_id", -1, "an id below 420"),
        ("llama", "token_type", [True] * 420, "a list of integers"),
        ("llama", "add_bos_token", 1, "true or false"),
        ("gpt2", "pre", "klingon", "'klingon', expected one of default, gpt-2"),
        ("gpt2", "merges", None, "a list of strings"),
        ("gpt2", "merges", ["x"], "not in the vocabulary"),
        ("gpt2", "merges", ["no where"], "not in the vocabulary"),
    ],
)
def test_contradicting_gguf_metadata_are_named(kind: str, key: str, value: object, message: str) -> None:
    metadata = sentencepiece_as_gguf(spm()) if kind == "llama" else byte_level_as_gguf(small_byte_level(), "gpt-2")
    with pytest.raises(ModelFileError, match=message) as error:
        tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": value}, Path("some.gguf"))
    assert "some.gguf" in str(error.value)


def test_gguf_tokens_that_occur_twice_are_named() -> None:
    for metadata in (sentencepiece_as_gguf(spm()), byte_level_as_gguf(small_byte_level(), "gpt-2")):
        tokens = metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        tokens[300] = tokens[301]
        with pytest.raises(ModelFileError, match=r"some.gguf: .*token.*(stands at ids 300 and 301|no two alike)"):
            tokenizer_from_gguf(metadata, Path("some.gguf"))
