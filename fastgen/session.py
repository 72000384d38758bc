"""What commands have in common once their flags are parsed: a loaded model, an engine that is ready, a document.

Commands import it inside functions, since it imports torch.
"""

import dataclasses
from pathlib import Path

from fastgen import cli, flags, report
from fastgen.compile_cache import seal, use_cache
from fastgen.device import choose_placement, describe
from fastgen.engine import Engine
from fastgen.errors import RecompiledError, UsageError
from fastgen.hub_id import commit_of
from fastgen.load import LoadedModel, check_kernels, load_model, locate, resolve, use_kernels
from fastgen.options import GenerationOptions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from tp.dist import SINGLE, Ranks, join


def find(config: flags.SourceFlags, phases: cli.Phases, name: str | None = None) -> Path:
    """Return the path of the model that the flags name (or `name`), downloaded with progress if it has to be."""
    revision = config.revision if name in (None, config.model) else None
    ranks = join_ranks(config)[0] if isinstance(config, flags.RankFlags) else SINGLE
    place = locate(name or config.model, revision=revision, offline=config.offline)
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
    return resolve(name or config.model, revision=revision, offline=config.offline)


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
    if config.timeout < 1:
        raise UsageError(f"--timeout {config.timeout}: expected at least 1 second")
    ranks, device = join(config.device, config.timeout)
    if ranks.world == 1:
        flags.refuse(config, ["timeout", "check_ranks"], "only under torchrun, with several processes")
    return ranks, device


def make_engine(
    config: flags.EngineFlags, model: LoadedModel, phases: cli.Phases, *, batch: int = 1, max_seq_len: int | None = None
) -> Engine:
    """Return the engine that the flags ask for: with a draft, which is loaded here, one that speculates."""
    draft, count = draft_of(config, phases), flags.drafts(config)
    if draft is None or count is None:
        return Engine(model, batch=batch, max_seq_len=max_seq_len, compile=config.compile)
    speculation = Speculation(draft=draft, count=count, accept=config.accept)
    return SpeculativeEngine(model, speculation, batch=batch, max_seq_len=max_seq_len, compile=config.compile)


def draft_of(config: flags.EngineFlags, phases: cli.Phases) -> LoadedModel | str | None:
    """Return the draft that the flags name, loaded if it is a model, or None."""
    if flags.drafts(config) is None:
        return None
    name = str(config.draft)
    return name if name == "ngram" or name.startswith("self:") else load_draft(config, phases)


def load_draft(config: flags.EngineFlags, phases: cli.Phases) -> LoadedModel:
    """Load the model that --draft names, to where the target is and in its precision, with the format of its own."""
    name = "stories-draft" if config.draft == "embedded" else str(config.draft)
    path = find(config, phases, name)
    with phases.phase("draft", name) as advance:
        ranks, device = join_ranks(config)
        draft = load_model(
            path, offline=config.offline, device=device, dtype=config.dtype, progress=advance, ranks=ranks
        )
    use_kernels(draft, config.kernels, compile=config.compile)
    return draft


def warm_up(engine: Engine, options: GenerationOptions, phases: cli.Phases, *, cache_dir: str | None = None) -> None:
    """Compile what the engine needs, with progress and what to expect; does nothing without --compile.

    What is compiled is kept in `cache_dir`, or where Triton and PyTorch keep it. Raises `UsageError` where that
    cannot be written.
    """
    if not engine.compiled:
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
        "rank": [model.ranks.rank, model.ranks.world],
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
