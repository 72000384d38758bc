"""Models of the Hugging Face hub by their ids: from the local cache, else downloaded into it.

    place = locate("HuggingFaceTB/SmolLM2-135M")     # the cache answers without asking the network
    folder = place if isinstance(place, Path) else place.run(progress)

The library's cache, its environment variables (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT) and its
stored token count. One request, which fails at once where there is no network, tells the revision's hash and the
files' sizes; only the files that are needed are fetched, and never a pickle. A connection that breaks is taken up where
it broke, a run that was stopped goes on with the files that it lacks. Several processes of a host (torchrun) take
turns: the first downloads, the others find it done.
"""

import contextlib
import errno
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
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

from fastgen.checkpoint.hf import INDEX, find_weights, read_shards
from fastgen.errors import CapacityError, ModelFileError, NetworkError, UsageError
from fastgen.hub_id import ID
from fastgen.tokenizer.open import NAMES
from fastgen.tokenizer.save import FILES

ANSWER_SECONDS = 5.0  # for the first request; the library's own retries would take 24 s to say that nobody is there
MARGIN = 64 << 20  # bytes of disk that a download leaves free

DESCRIPTIONS = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and all that there will be."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one commit that are needed and not in the cache yet."""

    repo: str
    revision: str | None  # as it was asked for
    commit: str
    files: tuple[str, ...]
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
                revision=self.revision,
                allow_patterns=list(self.files),
                tqdm_class=_bar(progress or (lambda done, total: None), self.bytes),
            )
        return Path(folder)


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
    found = _cached(repo, revision, file, tokenizer=tokenizer)
    if found is not None:
        return found
    if offline or constants.HF_HUB_OFFLINE:
        asked = f" in revision {revision}" if revision else ""
        raise NetworkError(
            f"{repo}: not in the cache{asked} ({constants.HF_HUB_CACHE}), and offline; fetch it once online"
        )
    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision, timeout=ANSWER_SECONDS, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    files = _needed(repo, sorted(sizes), file, tokenizer=tokenizer)
    commit = info.sha or ""
    missing = [name for name in files if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)]
    download = Download(
        repo=repo, revision=revision, commit=commit, files=tuple(files), bytes=sum(sizes[name] for name in missing)
    )
    _require_space(download)
    return download


def _cached(repo: str, revision: str | None, file: str | None, *, tokenizer: bool) -> Path | None:
    """Return the path in the cache, if everything that is needed is there."""
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except (LocalEntryNotFoundError, ValueError):
        return None
    if file is not None:
        return folder / file if (folder / file).exists() else None
    if tokenizer:
        return folder if any((folder / name).exists() for name in NAMES) else None
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Return whether a snapshot has all that a model is read from; an interrupted download leaves less."""
    ggufs = list(folder.glob("*.gguf"))
    if len(ggufs) == 1 and ggufs[0].exists():
        return True
    if not (folder / "config.json").exists() or not any((folder / name).exists() for name in NAMES):
        return False
    try:
        weights = find_weights(folder)
        names = set(read_shards(weights).values()) if weights.name.endswith(INDEX) else {weights.name}
    except ModelFileError:
        return False
    return all((folder / name).exists() for name in names)


def _needed(repo: str, names: Sequence[str], file: str | None, *, tokenizer: bool) -> list[str]:
    """Return the files of a repository that a model, or its tokenizer, is read from."""
    beside = [name for name in names if name in FILES or name in DESCRIPTIONS]
    ggufs = [name for name in names if name.endswith(".gguf") and "/" not in name]
    if file is not None:
        if file not in names:
            raise ModelFileError(f"{repo}: has no {file}, but {_listed(ggufs)}")
        return [file]
    if tokenizer:
        return beside
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    if not weights:
        weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if weights:
        return beside + weights
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelFileError(
            f"{repo}: has {len(ggufs)} GGUF files; name one, as in {repo}/{ggufs[0]}: {_listed(ggufs)}"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise ModelFileError(
            f"{repo}: has its weights as pickles alone ({_listed(pickles)}), which are not downloaded; "
            f"to trust them all the same: hf download {repo} --local-dir DIR, then --model DIR"
        )
    raise ModelFileError(f"{repo}: has no weights among {_listed(names)}")


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


@contextlib.contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the library's errors into ours, in a line or two."""
    parts = urlsplit(constants.ENDPOINT)
    endpoint = parts._replace(
        netloc=parts.netloc.rpartition("@")[2]
    ).geturl()  # a mirror's password is nobody's business
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
            "again when it can, or give a folder"
        ) from error
    except OSError as error:
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
