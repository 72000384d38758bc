"""One process a run's folder: a lock beside it, which the kernel takes back however the process ends.

The folder itself cannot be locked, since every save puts another in its place.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgen.errors import UsageError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""File systems without locks (some of clusters): there, two runs in one folder are not noticed."""


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, which need not exist yet, against other runs for as long as the block lasts.

    Raises `UsageError` if another run holds it, or if nothing can be written where it is to be.
    """
    target = folder.resolve()
    path = target.parent / f".{target.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except BlockingIOError as error:
        raise UsageError(f"--out {folder}: another run is writing it; let it end, or name another folder") from error
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written: {error.strerror}; name another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock file `path`; raises `BlockingIOError` where another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        # Between the two calls its last owner may have removed the file: then the lock is on a name of nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
