"""Models of the Hugging Face hub by their ids: from the local cache, else downloaded into it.

    place = locate("HuggingFaceTB/SmolLM2-135M")     # the cache answers without asking the network
    folder = place if isinstance(place, Path) else place.run(progress)

The library's cache, its environment variables (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT) and its
stored token count. One request, which fails at once where there is no network, tells the revision's hash and the
files' sizes; only the files that are needed are fetched, all of that one commit, and never a pickle. A connection that
breaks is taken up where it broke, a run that was stopped goes on with the files that it lacks. Several processes of a
host (torchrun) take turns: the first downloads, the others find it done.

What a bare id means, the repository decides, not what happens to be in the cache: of several GGUF files one may have
been fetched by its name. So the cache alone answers where it has weights that say themselves that they are complete.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from fastgen.checkpoint.hf import INDEX, WEIGHTS, find_weights, read_shards
from fastgen.errors import CapacityError, ModelFileError, NetworkError, UsageError
from fastgen.hub_files import needed_files
from fastgen.hub_id import COMMIT, ID
from fastgen.tokenizer.open import NAMES

ANSWER_SECONDS = 5.0  # for the first request; the library's own retries would take 24 s to say that nobody is there
MARGIN = 64 << 20  # bytes of disk that a download leaves free

Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and all that there will be."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one commit that are needed and not in the cache yet."""

    repo: str
    revision: str | None  # as it was asked for
    commit: str
    files: tuple[str, ...]
    opened: str  # the one of them that is the model; "": the folder is
    bytes: int  # still to come

    @property
    def title(self) -> str:
        """What is going to be fetched, in a few words."""
        return f"{self.repo}: {len(self.files)} files, {self.bytes / 1e6:.1f} MB"

    def run(self, progress: Progress | None = None) -> Path:
        """Fetch the files, and return the path that `locate` would.

        Raises:
            NetworkError: the hub did not give them; the files that came are kept.
            CapacityError: the disk is full.
        """
        with _explained(self.repo, self.revision), _turn(self.repo):
            folder = snapshot_download(
                self.repo,
                revision=self.commit,
                allow_patterns=[glob.escape(name) for name in self.files],
                tqdm_class=_bar(progress or (lambda done, total: None), self.bytes),
            )
            _note_commit(Path(folder), self.revision or constants.DEFAULT_REVISION)
        return Path(folder, self.opened)


def locate(
    name: str, *, revision: str | None = None, offline: bool = False, tokenizer: bool = False
) -> Path | Download:
    """Return where the model `name` is in the cache, or what is to be downloaded; `tokenizer`: that alone.

    Raises:
        UsageError: `name` is no id.
        NetworkError: it is not in the cache, and the hub cannot be asked, does not have it or does not give it.
        CapacityError: the disk has no room for it.
        ModelFileError: there is nothing in it that can be loaded.
    """
    matched = ID.fullmatch(name)
    if matched is None:
        raise UsageError(f"{name}: no id of a model on the hub; expected OWNER/NAME")
    repo, file = matched["repo"], matched["file"]
    try:
        validate_repo_id(repo)  # the hub's own rules are narrower
    except HFValidationError as error:
        raise UsageError(f"{name}: no id of a model on the hub: {error}") from error
    snapshot = _snapshot(repo, revision)
    found = snapshot and _cached(snapshot, file, tokenizer=tokenizer)
    if found is not None:
        return found
    hint = _hint(snapshot) if snapshot and not (file or tokenizer) else ""
    if offline or constants.HF_HUB_OFFLINE:
        asked = f" in revision {revision}" if revision else ""
        raise NetworkError(
            f"{repo}: not in the cache{asked} ({constants.HF_HUB_CACHE}), and offline; fetch it once online{hint}"
        )
    with _explained(repo, revision, hint):
        info = HfApi().model_info(repo, revision=revision, timeout=ANSWER_SECONDS, files_metadata=True)
        commit = info.sha or ""
        if COMMIT.fullmatch(commit) is None:
            raise NetworkError(f"{repo}: {_endpoint()} gives no hash of the revision, but {commit!r:.50}")
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        files, opened = needed_files(
            repo, sorted(sizes), lambda name: Path(hf_hub_download(repo, name, revision=commit)), file, tokenizer
        )
    missing = [name for name in files if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)]
    download = Download(
        repo=repo,
        revision=revision,
        commit=commit,
        files=tuple(files),
        opened=opened,
        bytes=sum(sizes[name] for name in missing),
    )
    if not missing:
        folder = Path(str(try_to_load_from_cache(repo, files[0], revision=commit))).parent
        with contextlib.suppress(OSError):  # of a cache that can only be read
            _note_commit(folder, revision or constants.DEFAULT_REVISION)
        return folder / opened
    _require_space(download)
    return download


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the cache, if there is one, with whatever files."""
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, ValueError):
        return None


def _cached(folder: Path, file: str | None, *, tokenizer: bool) -> Path | None:
    """Return what is to be opened of a snapshot, if everything that is needed is there."""
    if file is not None:
        return folder / file if (folder / file).exists() else None
    if tokenizer:
        return folder if any((folder / name).exists() for name in NAMES) else None
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Return whether a snapshot surely has all that a model is read from; an interrupted download leaves less."""
    if not (folder / "config.json").exists() or not any((folder / name).exists() for name in NAMES):
        return False
    try:
        weights = find_weights(folder)
        names = set(read_shards(weights).values()) if weights.name.endswith(INDEX) else {weights.name}
    except ModelFileError:
        return False
    return weights.name in WEIGHTS and all((folder / name).exists() for name in names)


def _hint(folder: Path) -> str:
    """Return the way to weights in the cache that may be all of the repository's, or not."""
    alone = [*folder.glob("*.gguf"), *folder.glob("*.safetensors")]
    return f", or give the path of what the cache has: {alone[0]}" if alone else ""


def _note_commit(folder: Path, revision: str) -> None:
    """Let the cache know which commit a branch or tag is, now that all of it that is needed is there.

    The library does this itself only where it resolves the name once more, which may have moved since.
    """
    if revision == folder.name:
        return
    note = folder.parent.parent / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    partial.write_text(folder.name)
    partial.replace(note)


def _require_space(download: Download) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < download.bytes + MARGIN:
        raise CapacityError(
            f"{download.repo}: needs {download.bytes / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free; nothing was "
            "fetched. Free some space, or let HF_HUB_CACHE name another disk"
        )


@contextlib.contextmanager
def _turn(repo: str) -> Iterator[None]:
    """Wait until no other process of this host downloads the same model."""
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"fastgen--{repo.replace('/', '--')}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process is gone
        yield


def _endpoint() -> str:
    """Return the address of the hub; a mirror's password is nobody's business."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, hint: str = "") -> Iterator[None]:
    """Turn the library's errors into ours, in a line or two."""
    endpoint = _endpoint()
    try:
        yield
    except GatedRepoError as error:
        raise NetworkError(
            f"{repo}: gated, its owner decides who may fetch it; ask on {endpoint}/{repo}, then log in: hf auth login, "
            "or HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise NetworkError(f"--revision {revision}: {repo} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise NetworkError(
            f"{repo}: no folder here, and no such model on {endpoint}, or a private one; to log in: hf auth login, "
            "or HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        raise NetworkError(f"{repo}: {endpoint} answers {status}; try again later, or give a folder") from error
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        cause = error.__cause__ or error
        raise NetworkError(
            f"{repo}: no folder here, not in the cache, and {endpoint} cannot be reached ({type(cause).__name__}); run "
            f"again when it can, or give a folder{hint}"
        ) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CapacityError(
                f"{repo}: {constants.HF_HUB_CACHE} cannot be written: {error.strerror}; let HF_HUB_CACHE name another "
                "folder"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityError(
            f"{repo}: the disk of {constants.HF_HUB_CACHE} is full; the files that came are kept"
        ) from error


def _bar(progress: Progress, total: int) -> type[tqdm]:
    """Return a class for the library's progress bars, which shows nothing and reports bytes to `progress`."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts = kwargs.get("unit") == "B"
            self._done = 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._counts:
                progress(min(self._done, total), total)
            return super().update(n)

    return Bar
