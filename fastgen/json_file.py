"""JSON that nobody vouches for: size, nesting and duplicate keys are checked, every failure is a typed error.

A byte order mark in front, which Windows editors leave, is passed over.
"""

import json
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile

MAX_JSON = 100_000_000  # bytes; the index of a model with 100,000 tensors takes about 10 million


def read_json(path: Path) -> dict[str, object]:
    """Return the object in the JSON file `path`."""
    file = RandomAccessFile(path)
    if file.size > MAX_JSON:
        raise ModelFileError(f"{path}: {file.size} bytes, expected JSON of at most {MAX_JSON}")
    return parse_json(bytes(file.read(0, file.size)), path)


def parse_json(raw: bytes, source: Path) -> dict[str, object]:
    """Return the object that UTF-8 `raw` holds; `source` is named in errors. A key that occurs twice is an error."""

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: damaged JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{source}: a JSON object is expected, not a {type(value).__name__}")
    return value
