"""What commands have in common once their flags are parsed: a loaded model, an engine that is ready, a document.

Commands import it inside functions, since it imports torch.
"""

import dataclasses
from pathlib import Path

from fastgen import cli, flags, report
from fastgen.checkpoint.detect import open_checkpoint
from fastgen.compile_cache import seal, use_cache
from fastgen.device import choose_placement, describe
from fastgen.engine import Engine
from fastgen.errors import RecompiledError, UsageError
from fastgen.hub_id import commit_of
from fastgen.load import LoadedModel, check_kernels, load_model, locate, resolve, use_kernels
from fastgen.options import GenerationOptions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from tp.dist import BACKEND_TIMEOUT, SINGLE, Ranks, join
from tp.plan import check_split


def find(config: flags.SourceFlags, phases: cli.Phases, name: str | None = None) -> Path:
    """Return the path of the model that the flags name (or `name`), downloaded with progress if it has to be."""
    name = config.model if name is None else name
    revision = config.revision if name == config.model else None
    ranks = join_ranks(config)[0] if isinstance(config, flags.RankFlags) else SINGLE
    place = locate(name, revision=revision, offline=config.offline)
    if not ranks.any(not isinstance(place, Path)):
        assert isinstance(place, Path), "no rank has to download"
        return place
    with phases.phase("download", getattr(place, "title", "")) as advance:
        if not isinstance(place, Path) and ranks.place.local == 0:
            place = place.run(advance)
        ranks.wait()
    if isinstance(place, Path):
        return place
    # The others of this machine find it in the cache: of the commit that was fetched, should the branch have moved.
    return resolve(name, revision=revision, offline=config.offline)


def load(config: flags.ModelFlags, phases: cli.Phases, name: str | None = None) -> LoadedModel:
    """Load the model that the flags name (or `name`), with progress."""
    path = find(config, phases, name)
    with phases.phase("load", name or config.model) as advance:
        ranks, device = join_ranks(config)
        check_kernels(config.kernels, choose_placement(device=device, dtype=config.dtype))
        model = load_model(
            path,
            offline=config.offline,
            tokenizer=config.tokenizer,
            device=device,
            dtype=config.dtype,
            quant=config.quant,
            group_size=config.group_size,
            symmetric=config.symmetric,
            keep=config.keep,
            progress=advance,
            ranks=ranks,
            check_ranks=config.check_ranks,
        )
    phases.note(model.checkpoint.notes)
    use_kernels(model, config.kernels, compile=config.compile)
    return model


def join_ranks(config: flags.RankFlags) -> tuple[Ranks, str | None]:
    """Join the processes that torchrun started, if it did; returns them, and the device that this one computes on."""
    longest = BACKEND_TIMEOUT.total_seconds()
    if not 1 <= config.timeout <= longest:
        raise UsageError(f"--timeout {config.timeout:g}: expected 1 to {longest:.0f} seconds")
    ranks, device = join(config.device, config.timeout)
    if ranks.world == 1:
        flags.refuse(config, ["timeout", "check_ranks"], "only under torchrun, with several processes")
    return ranks, device


def make_engine(
    config: flags.EngineFlags, model: LoadedModel, phases: cli.Phases, *, batch: int = 1, max_seq_len: int | None = None
) -> Engine:
    """Return the engine that the flags ask for: with a draft, which is loaded here, one that speculates."""
    draft, count = draft_of(config, model, phases), flags.drafts(config)
    if draft is None or count is None:
        return Engine(model, batch=batch, max_seq_len=max_seq_len, compile=config.compile)
    speculation = Speculation(draft=draft, count=count, accept=config.accept)
    return SpeculativeEngine(model, speculation, batch=batch, max_seq_len=max_seq_len, compile=config.compile)


def check_draft(config: flags.EngineFlags, phases: cli.Phases) -> None:
    """Find the model that --draft names, if it does, and raise what it is refused for by its headers alone.

    Comes before the target is loaded, which may take minutes.
    """
    name = _drafting_model(config)
    if name is None:
        return
    draft, ranks = open_checkpoint(find(config, phases, name)), join_ranks(config)[0]
    try:
        check_split(draft.config, draft.formats, ranks.world)
    except UsageError as error:
        raise UsageError(f"--draft {name}: {error}, or choose another draft") from None


def draft_of(config: flags.EngineFlags, model: LoadedModel, phases: cli.Phases) -> LoadedModel | str | None:
    """Return who drafts for `model` by the flags, loaded if it is a model, or None."""
    name = _drafting_model(config)
    if name is not None:
        return load_draft(name, config, model, phases)
    return None if flags.drafts(config) is None else config.draft


def load_draft(name: str, config: flags.EngineFlags, target: LoadedModel, phases: cli.Phases) -> LoadedModel:
    """Load a draft to where the target is and in its precision, with the format of its own.

    If it has no tokenizer, it takes the target's.
    """
    path = find(config, phases, name)
    with phases.phase("draft", name) as advance:
        ranks, device = join_ranks(config)
        draft = load_model(
            path,
            offline=config.offline,
            spare_tokenizer=target.tokenizer,
            device=device,
            dtype=config.dtype,
            progress=advance,
            ranks=ranks,
        )
    if draft.tokenizer is target.tokenizer:
        phases.note([f"--draft {name} has no tokenizer of its own and takes the model's"])
    use_kernels(draft, config.kernels, compile=config.compile)
    return draft


def _drafting_model(config: flags.EngineFlags) -> str | None:
    """Return the model that --draft names, None where nobody drafts, or no model does."""
    name = None if flags.drafts(config) is None else config.draft
    if name is None or name == "ngram" or name.startswith("self:"):
        return None
    return "stories-draft" if name == "embedded" else name


def warm_up(engine: Engine, options: GenerationOptions, phases: cli.Phases, *, cache_dir: str | None = None) -> None:
    """Compile what the engine needs, with progress and what to expect; without --compile only measure for `auto`.

    What is compiled is kept in `cache_dir`, or where Triton and PyTorch keep it. Raises `UsageError` where that
    cannot be written.
    """
    if not engine.compiled:
        if isinstance(engine, SpeculativeEngine) and engine.pace is None:
            with phases.phase("measure", "what drafts cost"):
                engine.warm_up(options)
        return

    def note(line: str) -> None:
        phases.note([line])

    cache = None if cache_dir is None else use_cache(cache_dir, compile_facts(engine, options), note)
    with phases.phase("compile", "(first run 10 to 120 s, later a few)") as advance:
        engine.warm_up(options, advance)
    if cache:
        seal(cache, note)


def compile_facts(engine: Engine, options: GenerationOptions) -> dict[str, object]:
    """Return what compiled kernels hang on, as JSON.

    Not how long the cache is, which follows from the prompt: kernels that hang on it are added to the others.
    """
    return {
        "model": _model_facts(engine.model),
        "speculation": _speculation_facts(engine.speculation) if isinstance(engine, SpeculativeEngine) else None,
        "batch": engine.batch,
        "sampling": dataclasses.asdict(options.sampling.structure()),
        "logprobs": options.logprobs,
        "device": describe(engine.device),
        "versions": report.versions(),
    }


def _model_facts(model: LoadedModel) -> dict[str, object]:
    return {
        "config": dataclasses.asdict(model.config),
        "format": model.format,
        "dtype": str(model.placement.dtype),
        "kernels": model.transformer.stages.attend.__module__,
        "rank": [model.ranks.rank, model.ranks.world, model.ranks.linked],
    }


def _speculation_facts(speculation: Speculation) -> dict[str, object]:
    draft = speculation.draft
    return {
        "draft": draft if isinstance(draft, str) else _model_facts(draft),
        "count": speculation.count,
        "accept": speculation.accept,
    }


def check_recompiles(config: flags.ModelFlags, engine: Engine) -> None:
    """Raise `RecompiledError` if --fail-on-recompile is given and something was compiled after `warm_up`."""
    if config.fail_on_recompile and engine.recompiles:
        raise RecompiledError(f"--fail-on-recompile: {engine.recompiles} graph(s) were compiled after the start")


def document(prog: str, config: flags.ModelFlags, model: LoadedModel) -> dict[str, object]:
    """Return what every command's JSON document begins with; the README has the schema."""
    return {
        "schema_version": report.SCHEMA_VERSION,
        "command": prog,
        "config": dataclasses.asdict(config),
        "model": model_entry(model),
        "device": describe(model.placement.device),
        "versions": report.versions(),
    }


def model_entry(model: LoadedModel) -> dict[str, object]:
    """Return what a document says of a model: where it is from, and of the hub's the hash of the revision."""
    path = model.checkpoint.path
    return {"path": str(path), "format": model.checkpoint.format, "revision": commit_of(path)}
