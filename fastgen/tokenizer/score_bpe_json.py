"""A vocabulary of pieces and scores (`score_bpe`) as a `tokenizer.json`, which transformers and `hf_json` read.

There, merging goes by a list of pairs. A pair of pieces that spells a piece has that piece's score; the list is all of
them, the best first, as transformers makes it of a SentencePiece model (`convert_slow_tokenizer.py`).
"""

import json

from fastgen.tokenizer.score_bpe import Kind, ScoreBpeTokenizer

SPACE = "▁"


def score_bpe_json(tokenizer: ScoreBpeTokenizer) -> str:
    """Return the content of a `tokenizer.json` that gives the same ids."""
    pieces = [piece.replace(" ", SPACE) for piece in tokenizer.pieces]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    added = [
        _added_token(token, pieces[token], special=kind is not Kind.USER_DEFINED)
        for token, kind in enumerate(tokenizer.kinds)
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]
    steps: list[dict[str, object]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tokenizer.adds_space:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = [pieces[token] for token, kind in enumerate(tokenizer.kinds) if kind is Kind.UNKNOWN]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _begin(tokenizer, pieces),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(tokenizer, pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _merges(tokenizer: ScoreBpeTokenizer, pieces: list[str]) -> list[tuple[str, str]]:
    known = {
        piece: token
        for token, piece in enumerate(pieces)
        if tokenizer.kinds[token] in (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
    }
    found = []
    for piece, token in known.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((-tokenizer.scores[token], known[left], known[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _begin(tokenizer: ScoreBpeTokenizer, pieces: list[str]) -> dict[str, object] | None:
    """Return what puts the beginning-of-sequence token in front, if that is wanted."""
    if not tokenizer.add_bos or tokenizer.bos_id is None:
        return None
    bos = pieces[tokenizer.bos_id]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


def _added_token(token: int, content: str, *, special: bool) -> dict[str, object]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": special, **plain}
