"""How every command reads its flags, shows its phases, and ends.

A configuration is a frozen dataclass whose fields are flags (`fastgen.flags`). The module imports no torch, so that
`--help` and usage errors answer at once. The answer goes to stdout, everything else to stderr.
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
from typing import NoReturn, TypeVar

from fastgen.errors import INTERRUPTED, CapacityError, FastgenError, UsageError
from tp.watch import process_watch

Config = TypeVar("Config")


SHOW_CURSOR = b"\x1b[?25h\n"


UNBUILT = ("kv_cache",)
"""Flags that exist from the start and are refused until what they name is built."""


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
