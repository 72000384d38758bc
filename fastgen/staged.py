"""Files and folders that are there whole or not at all.

What is written goes into a sibling of its target, is synced to disk, and takes the target's name in one step, in
exchange for what was there. An interrupt, a kill or a full disk leaves the old state or the new one. What a killed
process left beside a target goes with the next writing of it.
"""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgen.errors import CapacityError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)

RENAME_EXCHANGE = 2  # of renameat2(2)
AT_FDCWD = -100  # paths count from the working directory


def require_writable(path: Path, flag: str) -> None:
    """Raise `UsageError`, naming `flag`, if no file can be written at `path`; nothing is made."""
    folder = path.absolute().parent
    if not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif path.exists() and not path.is_file():
        problem = "is no regular file"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "permission denied"
    else:
        return
    raise UsageError(f"{flag} {path}: cannot be written: {problem}")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a new, empty folder, which becomes `target` when the block ends without an error.

    Raises:
        CapacityError: the disk is full; `target` is what it was before, as after every other error.
        UsageError: `target` cannot be written for another reason.
    """
    target = target.resolve()
    with _explained(target):
        staging = _claim(target)
        staging.mkdir()
    try:
        with _explained(target, full_disk_only=True):
            yield staging
        with _explained(target):
            for folder, _, names in os.walk(staging):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    _sync(path)
            if target.exists():
                _exchange(staging, target)
            else:
                os.rename(staging, target)
            _sync(target.parent)
    finally:
        _remove(staging)
        _remove_leftovers(target)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes the file `target` when the block ends; errors as in `staged_folder`."""
    target = target.resolve()
    with _explained(target):
        staging = _claim(target)
    try:
        with _explained(target, full_disk_only=True):
            yield staging
        with _explained(target):
            _sync(staging)
            os.replace(staging, target)
            _sync(target.parent)
    finally:
        _remove(staging)
        _remove_leftovers(target)


@contextmanager
def _explained(target: Path, *, full_disk_only: bool = False) -> Iterator[None]:
    """Turn an `OSError` into one that names `target`; around a caller's block, whose others may be about anything, only
    one that says that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CapacityError(
                f"{target}: cannot be written: {error.strerror}; what was there before is untouched\n"
                "Free some space, or write to another disk"
            ) from error
        if full_disk_only:
            raise
        raise UsageError(f"{target}: cannot be written: {error.strerror or error}") from error


def _claim(target: Path) -> Path:
    """Return this process's staging path for `target`, free to be made, in a folder that exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    _remove(staging)
    return staging


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that are gone have left beside `target`, unless it may be all there is of it."""
    if not target.exists():
        return
    pattern = re.compile(re.escape(f".{target.name}.partial-") + r"(\d+)(-old)?")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            _remove(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):
            path.chmod(0o700)  # its files cannot be removed from one that was made read-only
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(staging: Path, target: Path) -> None:
    """Let two folders swap names at once, so that at no moment there is none under `target`.

    Python has no call for it, and some file systems (NFS) have none either: there the old folder steps aside first.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        failed = renameat2(AT_FDCWD, os.fsencode(staging), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE)
        code = ctypes.get_errno()
        if not failed:
            return
        if code not in NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(target))
    aside = staging.with_name(f"{staging.name}-old")
    os.rename(target, aside)
    os.rename(staging, target)
    _remove(aside)
