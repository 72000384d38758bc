"""Which of a repository's files a model is read from; the rest (pickles, code, other forms of it) is not fetched."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastgen.checkpoint.hf import WEIGHTS, read_shards
from fastgen.checkpoint.names import shortened
from fastgen.errors import ModelFileError
from fastgen.tokenizer.open import NAMES
from fastgen.tokenizer.save import FILES

DESCRIPTIONS = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json")
WHOLE, SHARDED = WEIGHTS[:2]  # the kinds of weights that are fetched


def needed_files(
    repo: str, names: Sequence[str], fetch: Callable[[str], Path], file: str | None = None, tokenizer: bool = False
) -> tuple[list[str], str]:
    """Return the files of a repository that a model is read from, and the one of them to open, "" for their folder.

    Args:
        repo: its id, for messages.
        names: of all files that it has.
        fetch: called with the name of the weights' index, where it has one; returns the path of that file.
        file: the one that was asked for by its name.
        tokenizer: the model's tokenizer alone is wanted.

    Raises:
        ModelFileError: there is nothing in it that can be loaded, or too much to choose from.
    """
    beside = [name for name in names if name in FILES or name in DESCRIPTIONS]
    if file is not None:
        if file not in names:
            raise ModelFileError(f"{repo}: has no {file}, but {shortened(_ending(names, '.gguf'))}")
        return [file], file
    if tokenizer:
        if not set(NAMES) & set(beside):
            expected = ", ".join(NAMES)
            raise ModelFileError(f"{repo}: has no tokenizer among {shortened(names)}; expected one of {expected}")
        return beside, ""
    weights = _weights(repo, names, fetch)
    if weights and "config.json" not in names:
        raise ModelFileError(f"{repo}: has weights, but no config.json, which says what the model is")
    if weights:
        return beside + weights, ""
    ggufs = _ending(names, ".gguf")
    if len(ggufs) == 1:
        return ggufs, ggufs[0]
    if ggufs:
        raise ModelFileError(
            f"{repo}: has {len(ggufs)} GGUF files; name one, as in {repo}/{ggufs[0]}: {shortened(ggufs)}"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise ModelFileError(
            f"{repo}: has its weights as pickles alone ({shortened(pickles)}), which are not downloaded; "
            f"to trust them all the same: hf download {repo} --local-dir DIR, then --model DIR"
        )
    raise ModelFileError(f"{repo}: has no weights among {shortened(names)}")


def _weights(repo: str, names: Sequence[str], fetch: Callable[[str], Path]) -> list[str]:
    """Return the safetensors files that are the model, in the order of `find_weights`, none if there are none.

    Only an index knows what its shards are called.
    """
    if WHOLE in names:
        return [WHOLE]
    if SHARDED in names:
        shards = sorted(set(read_shards(fetch(SHARDED)).values()))
        strange = [name for name in shards if name not in names or not name.endswith(".safetensors")]
        if strange:
            raise ModelFileError(f"{repo}: {SHARDED} names what is no safetensors file of it: {shortened(strange)}")
        return [SHARDED, *shards]
    others = _ending(names, ".safetensors")
    if len(others) > 1:
        raise ModelFileError(f"{repo}: has {len(others)} safetensors files and no {SHARDED}: {shortened(others)}")
    return others


def _ending(names: Sequence[str], end: str) -> list[str]:
    """Return the files that have this ending and lie in no folder of the repository."""
    return [name for name in names if name.endswith(end) and "/" not in name]
