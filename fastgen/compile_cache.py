"""Compiled kernels kept in a folder of the user's choice: `--cache-dir DIR`.

    DIR/KEY.lock                            held while a process chooses or seals a folder of the key
    DIR/KEY-N/lock                          held, shared, by all that use the folder until they end; names the last
    DIR/KEY-N/triton, DIR/KEY-N/inductor    what Triton and Inductor keep, which they name by content
    DIR/KEY-N/sealed.json                   every file's SHA-256, written when all is there

KEY is a hash of what the artefacts hang on: model, sizes, sampling, draft, device and versions. What is not sealed, or
no longer what was sealed, is never used, for Triton would load a damaged binary without a look. It is removed unless
another process uses the folder and may be writing there; then another number is taken. For the same reason a folder is
sealed only by a process that was alone in it all the time. Both libraries write absolute paths into their files, so a
folder cannot be moved into place when it is complete.

C++ headers that Inductor compiles ahead, on a CPU, stay outside, below the system's folder for temporary files: PyTorch
has no setting for where.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastgen.errors import UsageError

LOCK, SEAL = "lock", "sealed.json"
VARIABLES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


class Cache(NamedTuple):
    """A folder that is in use.

    Attributes:
        folder: the folder.
        lock: the descriptor that holds its lock; nobody closes it, so it lasts as long as the process.
        token: what the lock file says while no other process has come; None if others were there already.
    """

    folder: Path
    lock: int
    token: bytes | None


def cache_root(text: str) -> Path:
    """Return the path that `--cache-dir` names; raises `UsageError` for one that nothing can be compiled in."""
    if not text:
        raise UsageError("--cache-dir '': expected a folder; leave the flag out to use your own cache")
    try:
        root = Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # no such home, links in a circle
        raise UsageError(f"--cache-dir {text}: no path: {error}") from error
    if re.search(r"[ \t\r\n'\"\\]", str(root)):
        raise UsageError(
            f"--cache-dir {str(root)!r}: PyTorch gives such a path to the C++ compiler in pieces\n"
            "Choose one without spaces, quotes and backslashes"
        )
    return root


def use_cache(root: str, facts: dict[str, object], note: Callable[[str], None]) -> Cache:
    """Let everything that is compiled from now on go to a folder below `root`; return it, for `seal`.

    `facts` are what the artefacts hang on, as JSON. `note` is told in a line of a folder that cannot be used.
    Raises `UsageError` where nothing can be written.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    place = cache_root(root)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _turn(place, key):
            cache = _choose(place, key, note)
    except OSError as error:
        raise UsageError(f"--cache-dir {root}: cannot be used: {error.strerror or error}") from error
    for variable, name in VARIABLES.items():
        os.environ[variable] = str(cache.folder / name)
    return cache


def seal(cache: Cache, note: Callable[[str], None]) -> None:
    """Record what is in a folder, if something was added; from now on it counts as complete.

    Where other processes have come it is left as it is, and `note` is told in a line of a disk that does not take it.
    """
    folder = cache.folder
    try:
        with _turn(folder.parent, folder.name.partition("-")[0]):
            if (folder / LOCK).read_bytes() != cache.token:
                return
            digests = {name: digest for name, digest in _digests(folder).items() if _is_lasting(name)}
            if _sealed(folder) != digests:
                staging = folder / f".{SEAL}"
                staging.write_text(json.dumps(digests, indent=1) + "\n")
                os.replace(staging, folder / SEAL)
    except OSError as error:
        note(f"--cache-dir: {folder} cannot be sealed, so the next start compiles again: {error.strerror or error}")


@contextlib.contextmanager
def _turn(root: Path, key: str) -> Iterator[None]:
    """Let the processes that choose or seal a folder of a key do so one after another."""
    with open(root / f"{key}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _choose(root: Path, key: str, note: Callable[[str], None]) -> Cache:
    """Return a folder of a key that is what was sealed, else a new one; what is neither whole nor in use is removed."""
    chosen = None
    for folder in sorted(root.glob(f"{key}-*/")):
        if chosen and (folder / SEAL).exists():
            continue
        lock, alone = _lock(folder)
        sealed = _sealed(folder)
        found = {} if sealed is None else _digests(folder)
        if sealed is not None and sealed.items() <= found.items():
            for stranger in found.keys() - sealed.keys() if alone else ():  # added since, and never checked
                (folder / stranger).unlink()
            chosen = Cache(folder, lock, _come(lock, alone))
            continue
        os.close(lock)
        if alone or sealed is not None:  # else another process is filling it
            state, fate = "incomplete" if sealed is None else "damaged", "removed" if alone else "ignored"
            note(f"--cache-dir: {folder} is {state}, and {fate}")
        if alone:
            shutil.rmtree(folder, ignore_errors=True)
    return chosen or _new(root, key)


def _new(root: Path, key: str) -> Cache:
    for number in itertools.count():
        folder = root / f"{key}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    for name in VARIABLES.values():
        (folder / name).mkdir()
    lock, alone = _lock(folder)
    return Cache(folder, lock, _come(lock, alone))


def _lock(folder: Path) -> tuple[int, bool]:
    """Return a descriptor that holds the folder's lock, shared, and whether no other process does.

    Only for a process whose turn it is: between the two kinds of lock there is none.
    """
    lock, alone = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock, alone


def _come(lock: int, alone: bool) -> bytes | None:
    """Name this process in the lock file, so that those who were alone learn of it; return the name if it is alone."""
    token = uuid.uuid4().bytes
    os.pwrite(lock, token, 0)
    return token if alone else None


def _sealed(folder: Path) -> dict[str, object] | None:
    """Return what was sealed, None if nothing was, or if the seal is no longer readable."""
    try:
        content = json.loads((folder / SEAL).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the artefacts that can be read, by its name below the folder."""
    digests = {}
    for kind in VARIABLES.values():
        for parent, _, names in os.walk(folder / kind):
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(OSError):  # gone meanwhile, or it counts as gone
                    if path.is_file():
                        with path.open("rb") as file:
                            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _is_lasting(name: str) -> bool:
    """Return whether a file is no lock, and none that Inductor or Triton is about to give another name."""
    return not name.endswith((".lock", ".tmp")) and "/tmp.pid_" not in name
