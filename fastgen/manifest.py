"""The manifest of a folder that we write: every file's size and SHA-256, so that damage is found and named.

    {"version": 1, "files": {"config.json": {"bytes": 987, "sha256": "..."}, ...}}

The file is in one canonical form, so a change of any bit is seen in the manifest too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fastgen.errors import ModelFileError

NAME = "fastgen-manifest.json"
VERSION = 1
BLOCK = 1 << 22


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files that are in `folder` now; it has no folders in it."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.name != NAME}
    (folder / NAME).write_bytes(_canonical({"version": VERSION, "files": files}))


def verify_manifest(folder: Path) -> list[str]:
    """Return what is wrong with `folder`, one line a file; nothing, if it is what was written.

    Raises `ModelFileError` where there is no manifest.
    """
    files = _files(folder)
    if files is None:
        return [f"{NAME}: damaged"]
    strangers = (path.name for path in sorted(folder.iterdir()) if path.name != NAME and path.name not in files)
    return [*find_damage(folder), *(f"{name}: not in the manifest" for name in strangers)]


def find_damage(folder: Path) -> list[str]:
    """Return which of the files that were written are no longer what they were; errors as in `verify_manifest`."""
    files = _files(folder)
    if files is None:
        return [f"{NAME}: damaged"]
    problems = []
    for name, entry in files.items():
        if not (folder / name).is_file():
            problems.append(f"{name}: missing")
            continue
        try:
            if _entry(folder / name) != entry:
                problems.append(f"{name}: its content is not what was written")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror}")
    return problems


def _files(folder: Path) -> Mapping[str, object] | None:
    """Return the files of the manifest in `folder`, None if it is damaged."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read: {error.strerror}; only folders that we wrote have one"
        ) from error
    return _read(data)


def _read(data: bytes) -> Mapping[str, object] | None:
    """Return the files of a manifest, None if it is not exactly as it was written."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("version") != VERSION or _canonical(content) != data:
        return None
    plain = all(name and "/" not in name and "\0" not in name for name in files)
    return files if plain else None


def _entry(path: Path) -> dict[str, object]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _canonical(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
