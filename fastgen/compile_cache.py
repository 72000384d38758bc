"""Compiled kernels kept in a folder of the user's choice: `--cache-dir DIR`.

    DIR/KEY-N/triton, DIR/KEY-N/inductor    what Triton and Inductor keep, which they name by content
    DIR/KEY-N/sealed.json                   every file's size and SHA-256, written when all is there

KEY is a hash of what the artefacts hang on: model, format, sizes, device and versions. A folder that is not sealed, or
no longer what was sealed, is left alone and another number taken: Triton would load a damaged binary without a look.
Both libraries write absolute paths into their files, so a folder cannot be moved into place when it is complete.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fastgen.errors import UsageError

SEAL = "sealed.json"
VARIABLES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def use_cache(root: Path, facts: dict[str, object], note: Callable[[str], None]) -> Path:
    """Let everything that is compiled from now on go to a folder below `root`; return it, for `seal`.

    `facts` are what the artefacts hang on, as JSON. `note` is told in a line of a folder that cannot be used.
    Raises `UsageError` where nothing can be written.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        folder = _choose(root.expanduser().resolve(), key, note)
    except OSError as error:
        raise UsageError(f"--cache-dir {root}: cannot be written: {error.strerror or error}") from error
    for variable, name in VARIABLES.items():
        os.environ[variable] = str(folder / name)
    return folder


def seal(folder: Path) -> None:
    """Record what is in a cache folder, if something was added; from now on it counts as complete."""
    entries = {str(path.relative_to(folder)): _entry(path) for path in _files(folder)}
    if _sealed(folder) == entries:
        return
    staging = folder / f".{SEAL}-{os.getpid()}"
    staging.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(staging, folder / SEAL)


def _choose(root: Path, key: str, note: Callable[[str], None]) -> Path:
    """Return a folder of a key that is what was sealed, else a new one."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in sorted(root.glob(f"{key}-*")):
        sealed = _sealed(folder)
        if sealed is not None and all(_is_intact(folder / name, entry) for name, entry in sealed.items()):
            for stranger in (path for path in _files(folder) if str(path.relative_to(folder)) not in sealed):
                stranger.unlink(missing_ok=True)  # added since, and never checked
            return folder
        note(f"--cache-dir: {folder} is {'incomplete' if sealed is None else 'damaged'}, and ignored")
        if sealed is not None:  # else another process may be writing there
            shutil.rmtree(folder, ignore_errors=True)
    folder = next(path for number in itertools.count() if not (path := root / f"{key}-{number}").exists())
    for name in VARIABLES.values():
        (folder / name).mkdir(parents=True)
    return folder


def _sealed(folder: Path) -> dict[str, list[object]] | None:
    """Return what was sealed, None if nothing was, or if the seal is no longer readable."""
    try:
        content = json.loads((folder / SEAL).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _is_intact(path: Path, entry: object) -> bool:
    return path.is_file() and _entry(path) == entry


def _entry(path: Path) -> list[object]:
    data = path.read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


def _files(folder: Path) -> list[Path]:
    """Return the files of the artefacts; locks are none."""
    found = (path for name in VARIABLES.values() for path in (folder / name).rglob("*"))
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".lock"))
