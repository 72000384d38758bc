"""Quantizes a model once, for every later run: `python -m quantize.run --model M --quant int4 --out DIR`.

The folder that it writes is a Hugging Face model in compressed-tensors' form, which all commands and transformers load.
It is there when it is complete: an interrupt leaves what was there before. With `--measure TEXT` the result is compared
with the original on a text; the figures are kept in `quantize.json` beside the weights.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen import cli, flags
from fastgen.errors import ModelFileError, UsageError
from tp.watch import process_watch

if TYPE_CHECKING:
    import torch

    from fastgen.checkpoint.lazy import Checkpoint
    from fastgen.tokenizer.base import Tokenizer
    from quantize.folder import Job, LinearReport

PROG = "quantize.run"
REPORT = "quantize.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(
    flags.SourceFlags, flags.QuantFlags, flags.PlacementFlags, flags.FolderFlags, flags.WindowFlags, flags.OutputFlags
):
    """The flags of `quantize.run`."""

    method: str = flags.flag("rtn", "how the integers are chosen: rtn, round to nearest", choices=("rtn",))
    measure: str | None = flags.flag(None, "compare the result with the original on this text", metavar="FILE")
    overwrite: bool = flags.flag(False, "replace the folder --out if quantize.run wrote it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(QuantizeConfig, argv, prog=PROG, description="Quantize a model's weights into a new folder.")
    if not process_watch().place.leads:
        return 0  # the folder does not depend on how many ranks will read it, and one process writes it
    if config.out is None or config.quant is None:
        raise UsageError("--quant FORMAT and --out DIR are needed: what to make, and where to write it")
    target = Path(config.out)
    _check_target(target, Path(config.model), overwrite=config.overwrite)
    text = read_text(config.measure) if config.measure else None

    from fastgen.manifest import write_manifest
    from fastgen.model_folder import require_space
    from fastgen.staged import staged_folder
    from quantize.folder import write_folder

    phases = cli.Phases()
    job, tokenizer, files = _plan(config, phases)
    tokens = None if text is None else _measured_tokens(config, text, job, tokenizer)
    require_space(target, job.bytes())
    with staged_folder(target) as folder:
        with phases.phase("quantize", config.model) as advance:
            linears = write_folder(folder, job, advance)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        report = _report(config, job, linears)
        if tokens is not None:
            report["measured"] = _measure(config, folder, tokens, phases)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        write_manifest(folder)
    sys.stdout.write(table(linears, report) + f"\nwritten to {target}\n")
    if config.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 0


def read_text(name: str) -> str:
    """Return a UTF-8 file's text; raises `ModelFileError` if it cannot be read."""
    try:
        return Path(name).read_bytes().decode()
    except OSError as error:
        raise ModelFileError(f"--measure {name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"--measure {name}: not UTF-8 at byte {error.start}; convert it first") from error


def table(linears: Sequence["LinearReport"], report: dict[str, object]) -> str:
    """Return what became of every layer, the error of its worst linear with it, and of the whole, as aligned lines."""
    lines = [f"{'part':<12}{'formats':<34}{'bytes':>14}{'bits':>8}{'error':>9}"]
    for name, rows in _by_layer(linears).items():
        size = sum(row.bytes for row in rows)
        bits = 8 * size / sum(8 * row.bytes / row.bits for row in rows)
        formats = ", ".join(dict.fromkeys(row.format for row in rows))
        worst = max(row.relative_error for row in rows)
        lines.append(f"{name:<12}{formats:<34}{size:>14,}{bits:>8.3f}{worst:>9.2%}")
    lines.append(
        f"{'linears':<46}{sum(row.bytes for row in linears):>14,}{report['effective_bits']:>8.3f}\n"
        f"{'all weights':<46}{report['bytes']:>14,}  (from {report['source_bytes']:,})"
    )
    measured = report.get("measured")
    if isinstance(measured, dict):
        lines.append(
            f"perplexity {measured['perplexity']:.4f}, of the original {measured['original_perplexity']:.4f}; "
            f"KL {measured['mean_kl']:.6f}; top-1 agreement {measured['top1_agreement']:.2%}"
        )
    return "\n".join(lines)


def _by_layer(linears: Sequence["LinearReport"]) -> dict[str, list["LinearReport"]]:
    layers: dict[str, list[LinearReport]] = {}
    for row in linears:
        layers.setdefault(".".join(row.name.split(".")[:2]), []).append(row)
    return layers


def _plan(config: QuantizeConfig, phases: cli.Phases) -> tuple["Job", "Tokenizer", dict[str, bytes]]:
    """Return what is to be written: the job, and the tokenizer with its files by name."""
    from fastgen.checkpoint.detect import open_checkpoint
    from fastgen.device import DTYPES, choose_placement
    from fastgen.load import make_scheme
    from fastgen.model_folder import tokenizer_files
    from fastgen.session import find
    from quantize.folder import Job

    scheme = make_scheme(config.quant, group_size=config.group_size, symmetric=config.symmetric, keep=config.keep)
    assert scheme is not None, "--quant is given"
    checkpoint = open_checkpoint(find(config, phases))
    if checkpoint.formats:
        raise UsageError(f"--model {config.model}: is quantized already; give the model that it was made from")
    job = Job(
        checkpoint=checkpoint,
        formats=scheme.formats(checkpoint.config),
        dtype=DTYPES[config.dtype] if config.dtype else _plain_dtype(checkpoint),
        device=choose_placement(config.device).device,
    )
    return job, *tokenizer_files(config, checkpoint)


def _plain_dtype(checkpoint: "Checkpoint") -> "torch.dtype":
    """Return what the tensors that stay plain are written in: the source's own dtype; where that was dequantized, what
    the scales of its linears have, not the float32 that it was computed in."""
    from quantize.linear import scale_dtype

    return scale_dtype(checkpoint.dtype) if checkpoint.dequantized else checkpoint.dtype


def _measured_tokens(config: QuantizeConfig, text: str, job: "Job", tokenizer: "Tokenizer") -> list[int]:
    """Return the tokens to measure on; what cannot be measured is refused before any work."""
    from fastgen.scoring import check_windows

    tokens = tokenizer.encode(text)[: config.max_tokens]
    limit = job.config.max_seq_len
    check_windows(len(tokens), width=min(config.window, limit), stride=config.stride, limit=limit)
    return tokens


def _check_target(target: Path, model: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` for a target inside the model's folder, or one that is there, unless it may be replaced."""
    from fastgen.manifest import NAME

    if model.is_dir() and model.resolve() in target.resolve().parents:
        raise UsageError(f"--out {target}: lies in the model's own folder; name another place")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"--out {target}: exists already; --overwrite replaces it")
    if not (target / NAME).is_file() or not (target / REPORT).is_file():
        raise UsageError(f"--out {target}: is no folder that quantize.run wrote, and is never replaced; name another")


def _report(config: QuantizeConfig, job: "Job", linears: Sequence["LinearReport"]) -> dict[str, object]:
    from fastgen.hub_id import commit_of
    from fastgen.report import SCHEMA_VERSION, versions

    weights = {name.removesuffix(".weight"): tensor for name, tensor in job.tensors().items()}
    parameters = sum(weights[row.name].shape[0] * weights[row.name].shape[1] for row in linears)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": PROG,
        "config": dataclasses.asdict(config),
        "source": {
            "path": job.checkpoint.path.name,
            "format": job.checkpoint.format,
            "revision": commit_of(job.checkpoint.path),
        },
        "versions": versions(),
        "bytes": job.bytes(),
        "source_bytes": sum(tensor.nbytes for tensor in job.checkpoint.tensors.values()),
        "effective_bits": 8 * sum(row.bytes for row in linears) / parameters,  # of the linears alone
        "linears": [dataclasses.asdict(row) for row in linears],
    }


def _measure(config: QuantizeConfig, folder: Path, tokens: list[int], phases: cli.Phases) -> dict[str, object]:
    """Return how the model in `folder` compares with the original on a text."""
    from fastgen.load import load_model
    from fastgen.scoring import score
    from fastgen.session import find

    original = load_model(find(config, phases), tokenizer=config.tokenizer, device=config.device, dtype=config.dtype)
    model = load_model(folder, device=config.device, dtype=config.dtype)
    width = min(config.window, model.config.max_seq_len)
    with phases.phase("measure", f"{len(tokens)} tokens") as advance:
        scores = score(model, tokens, width=width, stride=config.stride, against=original, progress=advance)
        plain = score(original, tokens, width=width, stride=config.stride)
    return dataclasses.asdict(scores) | {"window": width, "original_perplexity": plain.perplexity}


if __name__ == "__main__":
    cli.run(main, prog=PROG)
