"""Text from a prompt, streamed: `python -m fastgen.generate --prompt "Once upon a time"`.

The text goes to stdout, phases and figures to stderr. Works with no argument at all.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen import cli, flags
from fastgen.errors import INTERRUPTED, ModelFileError, UsageError
from tp.watch import process_watch

if TYPE_CHECKING:
    from fastgen.completion import Completion
    from fastgen.engine import Engine, Timings
    from fastgen.load import LoadedModel
    from fastgen.options import GenerationOptions
    from fastgen.report import Metrics

PROG = "fastgen.generate"

ACCEPTED = "\x1b[32m{}\x1b[39m"
"""What --show-accepted puts around a token that was drafted: ECMA-48's green, and back to the default colour."""

UNPROVEN = (
    "prompt", "prompt_file", "chat", "system", "num_samples", "echo", "stream", "stop", "ignore_eos", "max_seq_len",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "accept", "compare_plain", "show_accepted",
    "profile", "cache_dir", "fail_on_recompile",
)  # fmt: skip
"""Flags without an effect on --check-lossless."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(flags.EngineFlags, flags.SamplingFlags, flags.ChatFlags, flags.OutputFlags):
    """The flags of `fastgen.generate`."""

    prompt: str = flags.flag("Once upon a time", "the text to continue; - reads stdin", metavar="TEXT")
    prompt_file: str | None = flags.flag(None, "a file with the text to continue", metavar="FILE")
    chat: bool = flags.flag(False, "the prompt is a message: put it into the model's chat template")
    num_samples: int = flags.flag(1, "texts to generate (with a --temperature they differ)", type=int, metavar="N")
    ignore_eos: bool = flags.flag(False, "go on past the model's end-of-text tokens")
    echo: bool = flags.flag(False, "print the prompt before the text")
    stream: bool = flags.flag(True, "print the text as it comes (default)", negation="no-stream")
    profile: str | None = flags.flag(None, "write a trace of the generation, for ui.perfetto.dev", metavar="FILE")
    compare_plain: bool = flags.flag(False, "with --draft: generate without it first, and print the speed-up")
    show_accepted: bool = flags.flag(False, "with --draft: colour the tokens that were drafted")
    check_lossless: int = flags.flag(
        0, "with --draft: generate no text, but compare N greedy ones with plain decoding's", type=int, metavar="N"
    )
    interactive: bool = flags.flag(False, "gpt-fast's name for a chat")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(GenerateConfig, argv, prog=PROG, description="Generate text from a prompt.")
    if config.interactive:
        raise UsageError("--interactive: run python -m fastgen.chat, which takes the same model and sampling flags")
    if config.num_samples < 1:
        raise UsageError(f"--num-samples {config.num_samples}: expected at least 1")
    if config.system is not None and not config.chat:
        raise UsageError("--system: only with --chat")
    check_speculation(config)
    options = flags.generation_options(config, ignore_eos=config.ignore_eos)
    leads = process_watch().place.leads
    prompt = read_prompt(config) if leads else ""

    from fastgen import session

    phases = cli.Phases()
    session.check_draft(config, phases)
    model = session.load(config, phases)
    if config.check_lossless:
        return _check_lossless(model, config, phases)
    prompt = model.ranks.share(prompt)
    tokens = encode_prompt(model, config, prompt)
    plain = _plain(model, config, options, tokens, phases) if config.compare_plain else None
    engine = session.make_engine(
        config, model, phases, batch=config.num_samples, max_seq_len=_room(model, config, tokens)
    )
    engine.encode([tokens] * engine.batch)
    session.warm_up(engine, options, phases, cache_dir=config.cache_dir)
    with _profile(config.profile if leads else None):
        completions, interrupted = _generate(engine, config, options, tokens, prompt)
    if completions and leads:
        metrics = _measure(engine, completions, phases, plain)
        _report(model, config, prompt, completions, metrics)
    session.check_recompiles(config, engine)
    return INTERRUPTED if interrupted else 0


def read_prompt(config: GenerateConfig) -> str:
    """Return the prompt's text from the flag, a file or stdin; one newline at a file's end is dropped.

    Raises:
        ModelFileError: the file cannot be read or is not UTF-8.
    """
    if config.prompt_file is None and config.prompt != "-":
        return config.prompt
    try:
        if config.prompt_file is None and sys.stdin is None:
            raise UsageError("--prompt -: stdin is closed")
        if config.prompt_file is None:
            text = sys.stdin.buffer.read().decode()
        else:
            text = Path(config.prompt_file).read_bytes().decode()
    except OSError as error:
        raise ModelFileError(f"--prompt-file {config.prompt_file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"the prompt is not UTF-8 at byte {error.start}; convert it first") from error
    return text.removesuffix("\n")


def encode_prompt(model: "LoadedModel", config: GenerateConfig, prompt: str) -> list[int]:
    """Return the prompt's token ids, through the chat template with `--chat`."""
    if not config.chat:
        return model.tokenizer.encode(prompt)
    from fastgen.completion import encode_chat

    messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    return encode_chat(model.tokenizer, [*messages, {"role": "user", "content": prompt}])


def check_speculation(config: GenerateConfig) -> None:
    """Raise `UsageError` for flags of speculation that contradict or do nothing."""
    if flags.drafts(config) is None:
        flags.refuse(config, ["compare_plain", "show_accepted", "check_lossless"], "only with a --draft")
    if config.compare_plain and config.num_samples > 1:
        raise UsageError("--compare-plain: compares one text; leave --num-samples out")
    if config.show_accepted and (config.num_samples > 1 or config.json or not config.stream):
        raise UsageError("--show-accepted: colours one text as it comes: without --num-samples, --json, --no-stream")
    if config.check_lossless < 0:
        raise UsageError(f"--check-lossless {config.check_lossless}: expected a number of texts")
    if config.check_lossless:
        flags.refuse(config, UNPROVEN, "not with --check-lossless, which writes greedy texts of its own")


def _room(model: "LoadedModel", config: GenerateConfig, tokens: list[int]) -> int:
    """Return the tokens that the KV cache is to hold."""
    return config.max_seq_len or max(2, min(len(tokens) + config.max_new_tokens, model.config.max_seq_len))


def _plain(
    model: "LoadedModel", config: GenerateConfig, options: "GenerationOptions", tokens: list[int], phases: cli.Phases
) -> tuple["Timings", tuple[int, ...]]:
    """Return the times and tokens of plain decoding."""
    from fastgen import session
    from fastgen.engine import Engine

    engine = Engine(model, max_seq_len=_room(model, config, tokens), compile=config.compile)
    session.warm_up(engine, options, phases, cache_dir=config.cache_dir)
    with phases.phase("plain"):
        (completion,) = engine.generate([tokens], options)
    return engine.timings, completion.tokens


def _check_lossless(model: "LoadedModel", config: GenerateConfig, phases: cli.Phases) -> int:
    """Compare texts with plain decoding's, print what came of it, and return the exit status."""
    from fastgen import session
    from fastgen.lossless import own_prompts, prove

    count, draft = flags.drafts(config), session.draft_of(config, model, phases)
    assert draft is not None and count is not None, "checked with the flags"
    prompts, proofs = own_prompts(model, config.check_lossless), []
    counts = (*range(1, 9), "auto") if count == "auto" else (count,)
    lines = sys.stderr if config.json else sys.stdout
    for proof in prove(model, draft, prompts, counts=counts, new_tokens=config.max_new_tokens, compile=config.compile):
        proofs.append(proof)
        lines.write(
            f"drafts {proof.count}: {proof.texts} texts, {proof.tokens} tokens, {len(proof.differences)} texts differ\n"
        )
        for found in proof.differences:
            lines.write(
                f"  text {found.text} from token {found.place}: the two best are {found.gap:.3g} apart, rounding "
                f"{found.noise:.3g}{'' if found.explained else ': NOT EXPLAINED'}\n"
            )
    unexplained = sum(not found.explained for proof in proofs for found in proof.differences)
    lines.write("lossless\n" if not unexplained else f"{unexplained} differences that rounding does not explain\n")
    if config.json:
        document = session.document(PROG, config, model) | {
            "lossless": not unexplained,
            "proofs": [dataclasses.asdict(proof) for proof in proofs],
        }
        sys.stdout.write(json.dumps(document) + "\n")
    return 1 if unexplained else 0


def _generate(
    engine: "Engine", config: GenerateConfig, options: "GenerationOptions", tokens: list[int], prompt: str
) -> tuple[list["Completion"], bool]:
    """Return the completions, and whether Ctrl-C cut them short; a single one is printed as it comes."""
    from fastgen.completion import TextStream

    live = config.stream and engine.batch == 1 and not config.json
    if live and config.echo:
        sys.stdout.write(prompt)
    streams: list[TextStream] = []
    interrupted, shown = False, 0
    try:
        with cli.interruptible():
            for piece in engine.stream([tokens] * engine.batch, options, streams=streams):
                shown += len(piece.text)
                if live:
                    accepted = config.show_accepted and piece.drafted
                    sys.stdout.write(ACCEPTED.format(piece.text) if accepted else piece.text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    completions = [stream.completion() for stream in streams]
    if live:
        rest = "".join(completion.text[shown:] for completion in completions)  # held back for a stop string
        sys.stdout.write(f"{rest}\n")
    elif not config.json:
        for number, completion in enumerate(completions, 1):
            title = f"--- sample {number}\n" if engine.batch > 1 else ""
            sys.stdout.write(f"{title}{prompt if config.echo else ''}{completion.text}\n")
    sys.stdout.flush()
    return completions, interrupted


def _profile(path: str | None) -> contextlib.AbstractContextManager[None]:
    from fastgen.report import profile

    return profile(Path(path)) if path else contextlib.nullcontext()


def _measure(
    engine: "Engine",
    completions: list["Completion"],
    phases: cli.Phases,
    plain: tuple["Timings", tuple[int, ...]] | None,
) -> "Metrics":
    from fastgen.report import compared, measure

    metrics = measure(
        engine,
        completions,
        load_seconds=phases.seconds["load"],
        compile_seconds=phases.seconds.get("compile", 0.0),
    )
    return compared(metrics, *plain, completions[0].tokens) if plain else metrics


def _report(
    model: "LoadedModel", config: GenerateConfig, prompt: str, completions: list["Completion"], metrics: "Metrics"
) -> None:
    from fastgen import report, session

    sys.stderr.write(report.summary(model, metrics) + "\n")
    if not config.json:
        return
    document = session.document(PROG, config, model) | {
        "samples": [
            {
                "prompt": prompt,
                "prompt_tokens": list(completion.prompt_tokens),
                "text": completion.text,
                "tokens": list(completion.tokens),
                "finish_reason": completion.finish_reason or "interrupted",
            }
            for completion in completions
        ],
        "metrics": dataclasses.asdict(metrics),
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
