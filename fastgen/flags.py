"""The flags that commands share: groups of fields of frozen dataclasses, and what follows from them.

A command's configuration is a frozen dataclass that inherits the groups below and adds flags of its own; each flag is
declared in exactly one place, its default with it. The module imports no torch, so that `--help` and usage errors
answer at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastgen.compile_cache import cache_root
from fastgen.errors import UsageError
from fastgen.options import GenerationOptions, SamplingOptions, check_speculation

QUANTS = ("int8", "int4", "q8_0")
"""What weights can be quantized to."""


def flag(default: Any, text: str, *, aliases: Sequence[str] = (), negation: str = "", **argparse_options: Any) -> Any:
    """Declare a flag as a dataclass field.

    `aliases` are further names for it (gpt-fast's), `negation` is the flag that switches it off.
    """
    metadata = {"help": text, "aliases": tuple(aliases), "negation": negation, "argparse": argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionFlags:
    """In which precision."""

    dtype: str | None = flag(None, "precision (default: bf16 where it is native)", choices=("bf16", "fp16", "fp32"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementFlags(PrecisionFlags):
    """Where to compute, in which precision."""

    device: str | None = flag(None, "cuda, cuda:N or cpu (default: cuda where there is one)", metavar="D")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeFlags(PlacementFlags):
    """How to compute."""

    compile: bool = flag(False, "compile with torch.compile", aliases=["compile-prefill"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """How text becomes tokens."""

    tokenizer: str | None = flag(None, "a tokenizer's file, folder or hub id, if not the model's own", metavar="PATH")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedFlags:
    """What random choices follow from."""

    seed: int = flag(0, "of all random choices: same seed, same result", type=int, metavar="S")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFlags(TokenizerFlags):
    """Which model."""

    model: str = flag(
        "stories",
        "a folder, a file, a hub id (OWNER/NAME), or a built-in name: stories (default), smollm2",
        aliases=["checkpoint-path"],
        metavar="M",
    )
    revision: str | None = flag(None, "the hub's revision of --model", metavar="R")
    offline: bool = flag(False, "never ask the network")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantFlags:
    """In which form its weights are."""

    quant: str | None = flag(None, "quantize the weights at load", choices=QUANTS)
    group_size: int = flag(128, "int4: weights that share a scale", choices=(32, 64, 128, 256))
    symmetric: bool = flag(False, "int4: without zero points", negation="asymmetric")
    keep: str | None = flag(None, "formats of single weights, as in lm_head=bf16,layers.0=int8", metavar="RULES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankFlags(PlacementFlags):
    """How several processes, started by torchrun, work together."""

    timeout: float = flag(
        60.0, "under torchrun: seconds after which a rank that stalls ends the run", type=float, metavar="S"
    )
    check_ranks: bool = flag(False, "under torchrun: compare tokens and logits of all ranks at every step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFlags:
    """What runs a model's stages."""

    kernels: str = flag(
        "auto",
        "what runs the model's stages (default auto: fused with --compile)",
        choices=("auto", "reference", "fused"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(SourceFlags, QuantFlags, ComputeFlags, RankFlags, KernelFlags):
    """A model to generate with."""

    kv_cache: str | None = flag(None, "format of the KV cache", choices=("int8",))
    fail_on_recompile: bool = flag(False, "with --compile: end with an error if anything compiles after the start")
    max_seq_len: int | None = flag(
        None, "tokens that the KV cache holds (default: what is needed)", type=int, metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """Models that are a shape alone, with random weights."""

    shape: tuple[str, ...] = flag(
        (),
        "a model of a published shape, as llama-3-8b (to measure: or llama-3-8b:int4), or for training of "
        "dim=256,layers=4,heads=8",
        action="append",
        metavar="S",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationFlags:
    """Draft-and-target decoding."""

    draft: str | None = flag(
        None,
        "who drafts: a model, embedded (the draft of stories), ngram (the text itself), self:N (the model's own first "
        "N layers) or none (default)",
        aliases=["draft-checkpoint-path"],
        metavar="M",
    )
    speculate: str = flag("auto", "tokens to draft a round, or auto (default)", aliases=["speculate-k"], metavar="K")
    accept: str = flag(
        "coupled",
        "which drafts stay: coupled gives plain decoding's text (default), leviathan its distribution",
        choices=("coupled", "leviathan"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFlags(ModelFlags, SpeculationFlags):
    """A model to generate with, and who drafts for it."""

    cache_dir: str | None = flag(
        None, "with --compile: keep what is compiled in this folder (default: the user's cache)", metavar="DIR"
    )

    def __post_init__(self) -> None:
        if not self.compile:
            refuse(self, ["fail_on_recompile", "cache_dir"], "only with --compile")
        if self.cache_dir is not None:
            cache_root(self.cache_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags(SeedFlags):
    """How tokens are chosen, and when to stop."""

    temperature: float = flag(0.0, "0 takes the likeliest token (default)", type=float, metavar="T")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 = all", type=int, metavar="K")
    top_p: float = flag(1.0, "sample from the likeliest tokens that hold this probability", type=float, metavar="P")
    min_p: float = flag(0.0, "drop tokens below this share of the likeliest one's probability", type=float, metavar="P")
    repetition_penalty: float = flag(1.0, "above 1: tokens of the text become less likely", type=float, metavar="R")
    max_new_tokens: int = flag(200, "tokens to generate at most (default 200)", type=int, metavar="N")
    stop: tuple[str, ...] = flag((), "end the text here; may be given several times", action="append", metavar="TEXT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags:
    """What a conversation begins with."""

    system: str | None = flag(None, "the system message of a chat", metavar="TEXT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderFlags:
    """Where a command that makes a model puts it."""

    out: str | None = flag(None, "the folder to write, a Hugging Face model", metavar="DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFlags:
    """Texts to learn from, or to measure on."""

    text: tuple[str, ...] = flag(
        (), "UTF-8 files; for training, lines of <|endoftext|> divide documents", action="extend", nargs="+",
        metavar="FILE",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowFlags:
    """How a text is read that a model is measured on."""

    window: int = flag(512, "tokens that are read together (default 512)", type=int, metavar="N")
    stride: int | None = flag(None, "tokens between windows (default: the window)", type=int, metavar="N")
    chunk: int | None = flag(
        None,
        "tokens of a window that the model takes at a time (default: all; kernels take up to 16)",
        type=int,
        metavar="N",
    )
    max_tokens: int | None = flag(None, "measure on so many of the first tokens", type=int, metavar="N")

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What a command prints."""

    json: bool = flag(False, "print one JSON document as the last line of stdout")
    debug: bool = flag(False, "show tracebacks")


def generation_options(config: SamplingFlags, *, ignore_eos: bool = False) -> GenerationOptions:
    """Return what these flags ask for; raises `UsageError` for a value out of its range."""
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return GenerationOptions(
        max_new_tokens=config.max_new_tokens,
        stop=config.stop,
        ignore_eos=ignore_eos,
        sampling=SamplingOptions(**{name: getattr(config, name) for name in names}),
    )


def drafts(config: SpeculationFlags) -> int | str | None:
    """Return how many tokens to draft, or "auto"; None where nobody drafts.

    Raises `UsageError` for what is wrong with any model, before one is loaded.
    """
    if config.draft in (None, "none"):
        refuse(config, ["speculate", "accept"], "only with a --draft")
        return None
    if config.speculate != "auto" and not config.speculate.isdecimal():
        raise UsageError(f"--speculate {config.speculate}: expected a number of tokens, or auto")
    count = config.speculate if config.speculate == "auto" else int(config.speculate)
    check_speculation(config.draft, count, config.accept)
    return count


def refuse(config: object, names: Sequence[str], reason: str) -> None:
    """Raise `UsageError` if one of these flags was given another value than its default: it would have no effect."""
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, entry.name)
        if entry.name in names and value != entry.default:
            name = entry.metadata["negation"] if value is False else entry.name
            raise UsageError(f"--{name.replace('_', '-')}: {reason}")
