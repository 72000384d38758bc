"""Ids of models on the Hugging Face hub, and the paths that its cache gives them. Nothing slow is imported here."""

import re
from pathlib import Path

ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>[\w.-]+\.gguf))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_id(name: str) -> bool:
    """Return whether `name` is of the form `owner/model` or `owner/model/file.gguf`, and no path into a folder here."""
    return ID.fullmatch(name) is not None and not Path(name.partition("/")[0]).exists()


def commit_of(path: Path) -> str | None:
    """Return the hash of the revision that a path in the hub's cache belongs to, None for any other path."""
    for folder in (path, *path.parents):
        if COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
            return folder.name
    return None
