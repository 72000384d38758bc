"""JSON that nobody vouches for: size, nesting and duplicate keys are checked, every failure is a typed error.

Parsed, JSON can take ten times its bytes, so what describes a model may not be much longer than such things are.

A byte order mark in front, which Windows editors leave, is passed over.
"""

import json
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile

MAX_JSON = 6_000_000  # bytes; an index or header of 45,000 tensors, ten times what the largest Llama has


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, object]:
    """Return the object in the JSON file `path`, of at most `limit` bytes."""
    file = RandomAccessFile(path)
    if file.size > limit:
        raise ModelFileError(f"{path}: {file.size} bytes, expected JSON of at most {limit}")
    return parse_json(file.read(0, file.size), path)


def parse_json(raw: bytes | bytearray, source: Path, *, strict: bool = False) -> dict[str, object]:
    """Return the object that UTF-8 `raw` holds; `source` is named in errors. A key that occurs twice is an error.

    If `strict`, so are a byte order mark and NaN, which Python's own writer puts into JSON.
    """

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    def constant(name: str) -> float:
        if strict:
            raise ValueError(f"{name} is no JSON")
        return float(name)

    try:
        text = raw.decode("utf-8" if strict else "utf-8-sig")
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: damaged JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{source}: a JSON object is expected, not a {type(value).__name__}")
    return value
