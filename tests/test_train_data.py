"""Token files have llm.c's bytes, windows are a function of the seed, tokenizers agree with their JSON form."""

from pathlib import Path

import numpy as np
import pytest

from fastgen.errors import ModelFileError, UsageError
from fastgen.tokenizer.open import open_tokenizer
from fastgen.training.tokens import (
    check_tokens,
    encode_documents,
    read_documents,
    read_token_file,
    split,
    write_token_file,
)
from fastgen.training.vocabulary import LONGEST, train_tokenizer, write_tokenizer
from fastgen.training.windows import Windows, side_by_side

TEXT = "The quick brown fox jumps over the lazy dog.\nA fox, a dog, and the quick 42 brown foxes."


def test_a_token_file_has_llm_cs_bytes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write_token_file(path, np.array([1, 2, 65535], np.uint16))
    golden = bytes.fromhex("88d8340101000000 03000000") + bytes(1024 - 12) + bytes.fromhex("0100 0200 ffff")
    assert path.read_bytes() == golden


def test_a_token_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    write_token_file(tmp_path / "tokens.bin", tokens)
    assert (read_token_file(tmp_path / "tokens.bin") == tokens).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: data[:600], "truncated"),
        (lambda data: data[:-1], "1023|truncated"),
        (lambda data: data + b"\0\0", "truncated or damaged"),
        (lambda data: b"\0" * 1100, "no token file"),
        (lambda data: (20240801).to_bytes(4, "little") + data[4:], "uint32"),
        (lambda data: data[:4] + b"\x02" + data[5:], "version 1"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "announces -1"),
    ],
)
def test_damaged_token_files_are_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "tokens.bin"
    write_token_file(path, np.arange(30, dtype=np.uint16))
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelFileError, match=message):
        read_token_file(path)


def test_tokens_beyond_16_bits_do_not_go_into_a_token_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="65536"):
        write_token_file(tmp_path / "tokens.bin", np.array([65536], np.int32))
    assert not list(tmp_path.iterdir())


def test_tokens_beyond_the_vocabulary_are_refused_with_their_place() -> None:
    with pytest.raises(ModelFileError, match=r"here: token 300 at place 2 .* vocabulary of 300"):
        check_tokens(np.array([1, 2, 300, 4], np.uint16), 300, "here")


def test_a_text_too_short_for_a_window_is_refused_with_both_lengths() -> None:
    with pytest.raises(ModelFileError, match="90 tokens for training and 10 for validation, each needs 17"):
        split(np.zeros(100, np.uint16), 0.1, 16, "here")


def test_validation_tokens_are_the_last_and_train_nothing() -> None:
    data = split(np.arange(1000, dtype=np.uint16), 0.1, 16, "here")
    assert data.training.max() < data.validation.min()


def test_documents_are_divided_by_end_of_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n")
    (tmp_path / "b").write_text("three")
    assert read_documents([tmp_path / "a", tmp_path / "b"]) == ["one", "two\nlines", "three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", " \t\r\n"])
def test_documents_are_divided_however_lines_end(tmp_path: Path, end: str) -> None:
    text = end.join(["one", "<|endoftext|>", "two", "lines <|endoftext|>", "<|endoftext|>", "three", ""])
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_documents([tmp_path / "a"]) == ["one", f"two{end}lines <|endoftext|>", "three"]


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(ModelFileError, match="not UTF-8 at byte 2"):
        read_documents([tmp_path / "a"])


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint16), 16, seed=3)
    first, second = (windows.rows(epoch * windows.per_epoch, windows.per_epoch)[:, 0].tolist() for epoch in (0, 1))
    assert sorted(b - a for a, b in zip(sorted(first), sorted(first)[1:], strict=False)) == [16] * (len(first) - 1)
    assert first != second


def test_rows_are_a_function_of_seed_and_number() -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 2000).astype(np.uint16)
    whole = Windows(tokens, 16, seed=3).rows(0, 300)
    parts = Windows(tokens, 16, seed=3)
    assert (parts.rows(150, 150) == whole[150:]).all()
    assert (parts.rows(0, 150) == whole[:150]).all()
    assert (Windows(tokens, 16, seed=4).rows(0, 300) != whole).any()


def test_the_shortest_text_still_has_a_window() -> None:
    assert Windows(np.arange(17, dtype=np.uint16), 16, seed=0).rows(0, 5).tolist() == [list(range(17))] * 5


def test_validation_windows_lie_side_by_side() -> None:
    rows = side_by_side(np.arange(40, dtype=np.uint16), 16)
    assert rows[:, 0].tolist() == [0, 16] and rows.shape == (2, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that was learned from little text."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, train_tokenizer([TEXT], 300))
    return path


@pytest.mark.parametrize("text", [TEXT, "", " ", "  two  spaces \n\nlines\t", "é 你好 🦊", "12345", "</s> dog"])
def test_a_learned_tokenizer_says_the_same_as_json_and_in_transformers(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    ours, fast = open_tokenizer(folder / "tokenizer.model"), open_tokenizer(folder / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    tokens = ours.encode(text)
    assert fast.encode(text) == tokens
    assert theirs(text, split_special_tokens=True).input_ids == tokens
    assert ours.decode(tokens) == fast.decode(tokens) == text
    assert ours.vocab_size == fast.vocab_size == 300 and ours.stop_ids == fast.stop_ids == {2}


def test_documents_are_marked_at_both_ends(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    tokens = encode_documents(["a fox", "the dog"], tokenizer)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [*tokenizer.encode("a fox"), 2, *tokenizer.encode("the dog"), 2]
    assert tokens[0] == 1


@pytest.mark.parametrize(("size", "message"), [(200, "more than 259"), (5000, "at most 3")])
def test_vocabularies_that_cannot_be_learned_are_refused(size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_tokenizer([TEXT], size)


def test_a_text_that_is_one_long_line_is_learned_from_to_its_end() -> None:
    whole = "the quick brown fox jumps over the lazy dog " * 40_000
    assert len(whole) > 1_400_000 > 2 * LONGEST
    files = train_tokenizer([whole + "zyzzyva " * 50_000], 300)
    assert "▁zyzzyva" in files["tokenizer.json"].decode()
