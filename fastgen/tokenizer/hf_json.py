"""Hugging Face `tokenizer.json`, through the `tokenizers` library.

The library encodes; the bytes of a single token, which it does not give, follow from the file's decoder. Two kinds
are known: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), which spells every byte as a printable character, and
SentencePiece-style (Llama 2, Mistral), which spells a space as U+2581 and unknown bytes as `<0x00>` tokens. Other
decoders (WordPiece and the like) belong to other families of models and are refused by name.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from fastgen.errors import ModelFileError
from fastgen.json_file import parse_json
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.settings import Settings

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
PASSIVE = ("Fuse", "ByteFallback")


class HuggingFaceTokenizer(Tokenizer):
    """The `content` of a tokenizer.json. Raises `ModelFileError` naming `path` if it is none, or of another kind."""

    def __init__(self, content: object, path: Path, settings: Settings) -> None:
        model = _load(content, path)
        special = _special(model)
        for text in settings.tokens.values():  # named beside the file, and perhaps not marked special within
            if text not in special and model.token_to_id(text) is not None:
                model.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])
        special = _special(model)
        marked = special.get(_first_token(model))
        named = special.get(settings.tokens.get("bos_token", ""))
        self._model = model
        self._pieces = _PieceDecoder(model, path)
        super().__init__(
            vocab_size=max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            special=special,
            bos_id=marked,
            eos_id=None,
            add_bos=marked is not None and named in (None, marked),
            adds_space=self._pieces.drops_space,
            settings=settings,
        )

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json` for this tokenizer."""
        return self._model.to_str()

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        self._model.encode_special_tokens = not parse_special
        return self._model.encode(text, add_special_tokens=False).ids

    def _token_bytes(self, token: int) -> bytes:
        piece = self._model.id_to_token(token)
        return b"" if piece is None else self._pieces.to_bytes(piece)  # ids may have holes


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable spelling of bytes, by character (openai/gpt-2, `src/encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


class _PieceDecoder:
    """A file's decoder, for one token at a time.

    Attributes:
        drops_space: whether it takes one space away at the beginning of a text.
    """

    def __init__(self, model: tokenizers.Tokenizer, path: Path) -> None:
        steps = _steps(model.decoder, "decoders")
        kinds = [str(step["type"]) for step in steps]
        self.drops_space = False
        self._byte_level = byte_of_character() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements: list[tuple[str, str]] = []
        if self._byte_level is not None:
            return
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                    self._replacements.append((pattern, content))
                case {"type": "Metaspace", "replacement": str(pattern), "prepend_scheme": scheme}:
                    self._replacements.append((pattern, " "))
                    self.drops_space = scheme != "never"
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if start <= 1:
                    self.drops_space = start == 1
                case {"type": kind} if kind not in PASSIVE:
                    raise ModelFileError(f"{path}: decoder {kind} ({step}) is not supported")
        if not self._replacements:
            raise ModelFileError(
                f"{path}: decoder {kinds or None} is not supported, expected ByteLevel or SentencePiece's"
            )

    def to_bytes(self, piece: str) -> bytes:
        """Return the bytes of the token that is spelled `piece`."""
        if self._byte_level is not None:
            values = [self._byte_level.get(character) for character in piece]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(piece) else piece.encode()  # else an added token, as it is
        if self._byte_fallback and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for pattern, content in self._replacements:
            piece = piece.replace(pattern, content)
        return piece.encode()


def parse_hf_json(data: bytes, path: Path, settings: Settings) -> HuggingFaceTokenizer:
    """Return the tokenizer in `data`. Raises `ModelFileError` naming `path` if it is damaged or not supported."""
    return HuggingFaceTokenizer(parse_json(data, path), path, settings)


def _load(content: Any, path: Path) -> tokenizers.Tokenizer:
    try:
        _check_model(content["model"], path)
        for token in content.get("added_tokens") or []:
            # Older files match special tokens after normalization, where "a</s>" has none: match them as written.
            token["normalized"] = token["normalized"] and not token["special"]
        model = tokenizers.Tokenizer.from_buffer(json.dumps(content).encode())
    except ModelFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{path}: no valid tokenizer.json: {type(error).__name__} {error}") from error
    model.no_truncation()
    model.no_padding()
    return model


def _check_model(model: Any, path: Path) -> None:
    """Refuse what the library would meet with a Rust panic, at worst with the end of the process."""
    if model.get("type", "BPE") != "BPE":
        raise ModelFileError(f"{path}: model {model['type']!r} is not supported, expected BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise ModelFileError(f"{path}: {option} {model[option]!r} is not supported")
    vocabulary = model["vocab"]
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        raise ModelFileError(f"{path}: unk_token {unknown!r} is not in the vocabulary")
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelFileError(f"{path}: merge {merge!r} has parts or a result that are not in the vocabulary")


def _first_token(model: tokenizers.Tokenizer) -> str:
    """Return the special token that the post-processor puts in front of a text, or an empty string."""
    for step in _steps(model.post_processor, "processors"):
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(text)}}, *_]}:
                return text
    return ""


def _special(model: tokenizers.Tokenizer) -> dict[str, int]:
    return {added.content: token for token, added in model.get_added_tokens_decoder().items() if added.special}


def _steps(component: Any, parts: str) -> list[Mapping[str, object]]:
    """Return the settings of a component of the library, or of those in a `Sequence`, kept under the name `parts`."""
    return [] if component is None else _flatten(json.loads(component.__getstate__()), parts)


def _flatten(step: Mapping[str, object], parts: str) -> list[Mapping[str, object]]:
    inner = step.get(parts)
    return [deeper for part in inner for deeper in _flatten(part, parts)] if isinstance(inner, list) else [step]
