"""Tokenizers for new models: a SentencePiece BPE model trained on a text, and its files.

The model is of Llama 2's kind: BPE with byte fallback, digits alone, a space in front of a text, no normalization;
ids 0, 1, 2 are <unk>, <s>, </s>. The same merges are written as a `tokenizer.json`, since transformers without
protobuf reads no SentencePiece.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from fastgen.errors import ModelFileError, UsageError
from fastgen.tokenizer.sentencepiece_model import SPACE

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
BYTES = 256  # pieces that byte fallback takes
LONGEST = 1 << 17  # characters of a piece of text that is learned from at a time, at most 4 bytes each

SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BEGIN,
    "eos_token": END,
    "unk_token": UNKNOWN,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> dict[str, bytes]:
    """Return the files of a SentencePiece BPE tokenizer of `vocab_size` pieces learned from `documents`.

    Raises `UsageError` for a size that byte fallback or the text do not allow.
    """
    if vocab_size <= BYTES + len((UNKNOWN, BEGIN, END)):
        raise UsageError(f"--train-tokenizer {vocab_size}: expected more than {BYTES + 3}, which bytes and marks take")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
            max_sentence_length=4 * LONGEST,
        )  # fmt: skip
    except RuntimeError as error:
        most, least = re.search(r"<= (\d+)", str(error)), re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if least:
            reason = f"the text has more characters than that; at least {least[1]} are needed"
        else:
            advice = f"at most {most[1]} are possible" if most else "give more text"
            reason = f"the text is too short for so many pieces; {advice}"
        raise UsageError(f"--train-tokenizer {vocab_size}: {reason}") from error
    data = model.getvalue()
    return {
        "tokenizer.model": data,
        "tokenizer.json": _as_json(data),
        "tokenizer_config.json": json.dumps(SETTINGS, indent=2).encode() + b"\n",
    }


def write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a tokenizer's files into the existing `folder`."""
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _lines(documents: Sequence[str]) -> Iterator[str]:
    """Yield the lines of all documents: a new line is always a token of its own, the byte's.

    Long lines come in pieces, since SentencePiece skips what is longer than a limit.
    """
    for document in documents:
        for line in document.splitlines():
            yield from (line[start : start + LONGEST] for start in range(0, len(line), LONGEST))


def _as_json(model: bytes) -> bytes:
    """Return a `tokenizer.json` that encodes as the SentencePiece BPE `model` does."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(token): token for token in range(pieces.get_piece_size())}
    fast = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([UNKNOWN, BEGIN, END])
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return fast.to_str(pretty=False).encode()


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Return the merges in their order: every way to join two pieces into a third, best third first.

    SentencePiece joins whatever gives the piece of the highest score, so a piece has a merge for each of its splits.
    """
    size = pieces.get_piece_size()
    ordinary = {
        pieces.id_to_piece(token): pieces.get_score(token)
        for token in range(size)
        if not (pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_byte(token))
    }
    merges = []
    for piece in sorted(ordinary, key=lambda piece: -ordinary[piece]):
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in ordinary and pair[1] in ordinary]
    if not merges:
        raise ModelFileError("the tokenizer has learned no merges; give more text")
    return merges
