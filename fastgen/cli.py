"""What all commands share: flags as fields of frozen dataclasses, phases on stderr, and how a command ends.

A command's configuration is a frozen dataclass that inherits the groups of flags below and adds its own; each flag
is declared in exactly one place, its default with it. The module imports no torch, so that `--help` and usage
errors answer at once. The answer goes to stdout, everything else to stderr.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.metadata
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from fastgen.errors import INTERRUPTED, CapacityError, FastgenError, UsageError
from fastgen.options import GenerationOptions, SamplingOptions
from tp.watch import process_watch

Config = TypeVar("Config")


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
    cache_dir: str | None = flag(
        None, "with --compile: keep what is compiled in this folder (default: the user's cache)", metavar="DIR"
    )


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

    quant: str | None = flag(None, "quantize the weights at load", choices=("int8", "int4", "q8_0"))
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
class ModelFlags(SourceFlags, QuantFlags, ComputeFlags, RankFlags):
    """A model to generate with."""

    kv_cache: str | None = flag(None, "format of the KV cache", choices=("int8",))
    kernels: str = flag(
        "auto",
        "what runs the model's stages (default auto: fused with --compile)",
        choices=("auto", "reference", "fused"),
    )
    fail_on_recompile: bool = flag(False, "with --compile: end with an error if anything compiles after the start")
    max_seq_len: int | None = flag(
        None, "tokens that the KV cache holds (default: what is needed)", type=int, metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """Models that are a shape alone, with random weights."""

    shape: tuple[str, ...] = flag(
        (),
        "a model of a published shape, as llama-3-8b, or for training of dim=256,layers=4,heads=8",
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


UNBUILT = ("kv_cache",)
"""Flags that exist from the start and are refused until what they name is built."""


SHOW_CURSOR = b"\x1b[?25h\n"


def drafts(config: SpeculationFlags) -> int | str | None:
    """Return how many tokens to draft, or "auto"; None where nobody drafts. Raises `UsageError` for other words."""
    if config.draft in (None, "none"):
        refuse(config, ["speculate", "accept"], "only with a --draft")
        return None
    if config.speculate != "auto" and not config.speculate.isdecimal():
        raise UsageError(f"--speculate {config.speculate}: expected a number of tokens, or auto")
    return config.speculate if config.speculate == "auto" else int(config.speculate)


REPEATED = ("append", "extend")
"""Actions of argparse whose flags are tuples."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized"):
            for word in message.split():
                close = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.75)
                if word.startswith("--") and close:
                    message += f"; did you mean {close[0]}?"
        self.exit(UsageError.exit_status, f"{self.prog}: {message} (--help lists all flags)\n")


def parse(config: type[Config], argv: Sequence[str] | None, *, prog: str, description: str) -> Config:
    """Return the command's configuration; usage errors and `--help` end the process."""
    parser = Parser(prog=f"python -m {prog}", description=description, allow_abbrev=False)
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        names = [f"--{name.replace('_', '-')}" for name in (entry.name, *entry.metadata["aliases"])]
        options = {"default": entry.default, "help": entry.metadata["help"], **entry.metadata["argparse"]}
        if "choices" in options:
            options.setdefault("type", type(options["choices"][0]))
        elif entry.type is bool:
            options.setdefault("action", "store_true")
        if options.get("action") in REPEATED:
            options["default"] = None
        group = parser.add_mutually_exclusive_group() if entry.metadata["negation"] else parser
        group.add_argument(*names, dest=entry.name, **options)
        if entry.metadata["negation"]:
            group.add_argument(
                f"--{entry.metadata['negation']}",
                dest=entry.name,
                action="store_false",
                help=f"the opposite of {names[0]}",
            )
    parser.add_argument("--version", action="version", version=_version())
    known = {option for action in parser._actions for option in action.option_strings}
    words = sys.argv[1:] if argv is None else argv
    values = vars(parser.parse_args([_dashed(word, known) for word in words]))
    for name in UNBUILT:
        if values.get(name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')}: not built yet; leave it out")
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        if entry.metadata["argparse"].get("action") in REPEATED:
            values[entry.name] = tuple(values[entry.name] or ())
    return config(**values)


def refuse(config: object, names: Sequence[str], reason: str) -> None:
    """Raise `UsageError` if one of these flags was given another value than its default: it would have no effect."""
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        if entry.name in names and getattr(config, entry.name) != entry.default:
            raise UsageError(f"--{entry.name.replace('_', '-')}: {reason}")


def _dashed(word: str, known: Container[str]) -> str:
    """Accept underscores in flags (`--max_new_tokens`); what is no flag of ours is left alone, it may be a value."""
    name, equals, value = word.partition("=")
    dashed = name.replace("_", "-")
    return dashed + equals + value if dashed in known else word


def _version() -> str:
    found = []
    for package in ("fastgen", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def run(command: Callable[[], int], *, prog: str, every_rank_speaks: bool = False) -> NoReturn:
    """End the process with the command's status; a user's error is its message alone, unless `--debug` is given.

    Ctrl-C ends it at once, except where the command is `interruptible`: outside of that there is nothing to save, and
    libraries swallow a KeyboardInterrupt that reaches them while they are imported.

    Of several processes under torchrun only rank 0 prints, unless `every_rank_speaks`.
    """
    signal.signal(signal.SIGINT, _leave)
    _mend_streams()
    try:
        with process_watch():
            sys.exit(_run(command, prog, silence=not every_rank_speaks and "--debug" not in sys.argv))
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(INTERRUPTED)  # leaving torch the usual way takes a second, and more on a busy machine


def _run(command: Callable[[], int], prog: str, *, silence: bool) -> int:
    try:
        process_watch().begin(silence=silence)
        status = command()
        sys.stdout.flush()
    except FastgenError as error:
        if "--debug" in sys.argv:
            raise
        status = _fail(prog, error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        # Wherever memory ends, it ends the same way; PyTorch's CPU allocator has no error type of its own.
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        status = _fail(prog, CapacityError("out of memory; use a smaller model, --max-seq-len or --dtype bf16"))
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0  # whoever read stdout has seen enough
        if error.errno == errno.ENOSPC:
            sys.stderr.write(f"{prog}: stdout cannot be written: no space left\n")
            status = CapacityError.exit_status
    return status


def _fail(prog: str, error: FastgenError) -> int:
    """Say what went wrong, and return the exit status; where this happened to one rank of several, another says it."""
    if process_watch().fail(error.exit_status, str(error)):
        sys.stderr.write(f"{prog}: {error}\n")
    return error.exit_status


def _leave(number: int, frame: object) -> NoReturn:
    """End the process at once, with the cursor that a progress bar may have hidden."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), SHOW_CURSOR)
    os._exit(INTERRUPTED)


def _mend_streams() -> None:
    """Let closed streams swallow what is written, and a narrow encoding show what it has no characters for."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (it stays open for the process's life)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside, where the command keeps what it has so far."""
    if process_watch().connected:
        with process_watch().interruptible():
            yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Phases:
    """The phases of a command on stderr: a live line on a terminal, one plain line each elsewhere."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[Callable[[int, int], None]]:
        """Show that `name` is under way; yields a function (done, total) that moves its bar."""
        start = time.perf_counter()
        process_watch().at(name)
        if sys.stderr.isatty():
            with _bar(f"{name} {detail}") as show:
                yield partial(_advance, name, show)
        else:
            yield partial(_advance, name, None)
        self.seconds[name] = time.perf_counter() - start
        sys.stderr.write(f"{name:<10} {detail}  {self.seconds[name]:.1f} s\n")

    def note(self, lines: Sequence[str]) -> None:
        """Say what the user should know."""
        for line in lines:
            sys.stderr.write(f"{'note':<10} {line}\n")


def _advance(name: str, show: Callable[[int, int], None] | None, done: int, total: int) -> None:
    process_watch().at(name)
    if show:
        show(done, total)


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
