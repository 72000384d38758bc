"""What this machine has and what a model would need here: `python -m fastgen.doctor --model M`.

Every line is OK, WARN or FAIL, with the fix below it. With `--model`, a table of what each format of the weights
takes and how fast it can be at best, from the file's headers alone. The exit status is 1 if a line says FAIL, else 0.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastgen import cli, flags
from fastgen.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    import torch

    from fastgen.checkpoint.lazy import Checkpoint
    from fastgen.diagnosis import Finding

PROG = "fastgen.doctor"
CAPTION = (
    "tok/s and TP N: the most that one device like this, or N of them, can decode: the bandwidth above over the\n"
    "weights that each reads in a step. Reading the KV cache and communication come on top; - stands where the heads\n"
    "do not divide."
)


def _shared(name: str, default: Any = dataclasses.MISSING) -> Any:
    """Return one of the flags that other commands take with a model, perhaps with another default."""
    entry = {field.name: field for field in dataclasses.fields(flags.ModelFlags)}[name]
    chosen = entry.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=chosen, metadata=entry.metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(flags.OutputFlags):
    """The flags of `fastgen.doctor`."""

    model: str | None = _shared("model", None)
    device: str | None = _shared("device")
    max_seq_len: int | None = _shared("max_seq_len")
    group_size: int = _shared("group_size")
    smoke_test: bool = flags.flag(True, "compile a model of two layers (default)", negation="no-smoke-test")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(DoctorConfig, argv, prog=PROG, description="Check this machine, and what a model needs on it.")
    from fastgen.checkpoint.detect import open_checkpoint
    from fastgen.device import choose_placement
    from fastgen.diagnosis import FAIL, OK, Finding, check_compile, examine
    from fastgen.kernels.bandwidth import measure_read_bandwidth

    device = choose_placement(config.device).device
    checkpoint = open_checkpoint(_path(config.model)) if config.model else None
    context = _context(config, checkpoint)
    out = sys.stderr if config.json else sys.stdout
    findings: list[Finding] = []

    def add(finding: Finding) -> None:
        findings.append(finding)
        _show(finding, out)

    for finding in examine():
        add(finding)
    bandwidth = measure_read_bandwidth(device)
    add(Finding(OK, "bandwidth", f"{bandwidth:.1f} GB/s read on {device}"))
    if config.smoke_test:
        with cli.Phases().phase("compiling", "two layers (first run 20 to 60 s, later a few)"):
            finding = check_compile(device)
        add(finding)
    needs = _needs(config, checkpoint, context, device, bandwidth) if checkpoint else None
    if needs:
        out.write(f"\n{_table(needs)}\n{CAPTION}\n")
    if config.json:
        _print_document(config, findings, bandwidth, needs)
    return int(any(finding.status == FAIL for finding in findings))


def _path(name: str) -> Path:
    """Return where a model is; nothing is downloaded, so one of the hub must be in the cache."""
    from fastgen.load import locate

    place = locate(name)
    if not isinstance(place, Path):
        raise ModelFileError(f"--model {name}: not in the cache; fastgen.generate would download {place.title}")
    return place


def _context(config: DoctorConfig, checkpoint: "Checkpoint | None") -> int:
    """Return for how many tokens the KV cache is counted: as asked, or all that the model was made for."""
    limit = checkpoint.config.max_seq_len if checkpoint else 0
    if checkpoint and config.max_seq_len is not None and not 1 <= config.max_seq_len <= limit:
        raise UsageError(f"--max-seq-len {config.max_seq_len}: expected 1 to {limit}, which the model was made for")
    return config.max_seq_len or limit


def _show(finding: "Finding", out: TextIO) -> None:
    out.write(f"{finding.status:<4}  {finding.name:<9}  {finding.text}\n")
    if finding.fix:
        out.write(f"{'':<17}fix: {finding.fix}\n")
    out.flush()


def _needs(
    config: DoctorConfig, checkpoint: "Checkpoint", context: int, device: "torch.device", bandwidth: float
) -> dict[str, Any]:
    """Return what the model takes in every format, and what it leaves of this device, as a JSON object."""
    from fastgen.costs import WORLD_SIZES, costs
    from fastgen.diagnosis import available_bytes

    available = available_bytes(device)
    rows = costs(checkpoint.config, group_size=config.group_size)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "parameters": rows[0].parameters,
        "context": context,
        "available_bytes": available,
        "formats": [
            {
                "format": row.format,
                "bits_per_parameter": row.bits_per_parameter,
                "weight_bytes": row.weight_bytes,
                "kv_bytes_per_token": row.kv_bytes_per_token,
                "kv_bytes": row.kv_bytes_per_token * context,
                "fits": row.memory_bytes(context) <= available,
                "fitting_tokens": row.fitting_tokens(available),
                "read_bytes": row.read_bytes,
                "tokens_per_second": {size: row.tokens_per_second(bandwidth, size) for size in WORLD_SIZES},
            }
            for row in rows
        ],
    }


def _table(needs: dict[str, Any]) -> str:
    """Return what the model needs as lines of aligned text."""
    from fastgen.report import aligned

    context = needs["context"]
    head = ["format", "bits", "weights", "KV/token", f"KV at {context}", "together", "fits here", "tok/s"]
    rows = [head + [f"TP {size}" for size in list(needs["formats"][0]["read_bytes"])[1:]]]
    for row in needs["formats"]:
        room = row["fitting_tokens"]
        rows.append(
            [
                row["format"],
                f"{row['bits_per_parameter']:.2f}",
                *map(_size, (row["weight_bytes"], row["kv_bytes_per_token"], row["kv_bytes"])),
                _size(row["weight_bytes"] + row["kv_bytes"]),
                "yes" if row["fits"] else f"{room} tokens" if room else "no",
                *("-" if speed is None else f"{speed:.1f}" for speed in row["tokens_per_second"].values()),
            ]
        )
    title = (
        f"{needs['path']} ({needs['format']}): {needs['parameters'] / 1e6:.1f}M parameters; "
        f"{_size(needs['available_bytes'])} available"
    )
    return f"{title}\n{aligned(rows)}"


def _size(count: int) -> str:
    """Return bytes in the unit (of 1000) in which they are read best."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _print_document(
    config: DoctorConfig, findings: list["Finding"], bandwidth: float, needs: dict[str, Any] | None
) -> None:
    from fastgen import report

    document = {
        "schema_version": report.SCHEMA_VERSION,
        "command": PROG,
        "config": dataclasses.asdict(config),
        "versions": report.versions(),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "read_limit_gb_per_second": bandwidth,
        "model": needs,
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
