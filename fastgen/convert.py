"""Writes any model as a Hugging Face folder: `python -m fastgen.convert --model ANY --to hf --out DIR`.

Tensor by tensor, so that a model of any size needs the memory of its largest one; what is quantized keeps its integers.
`--verify DIR` compares a folder that was written here with the manifest of hashes that lies among its files; exit
status 3 says that something differs.
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
    from fastgen.checkpoint.lazy import Checkpoint

PROG = "fastgen.convert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(flags.SourceFlags, flags.PrecisionFlags, flags.FolderFlags, flags.OutputFlags):
    """The flags of `fastgen.convert`."""

    to: str | None = flags.flag(None, "the form to write: hf, a Hugging Face folder", choices=("hf",))
    verify: str | None = flags.flag(None, "compare this folder with its manifest", metavar="DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(ConvertConfig, argv, prog=PROG, description="Write a model in another form, or check a folder.")
    if not process_watch().place.leads:
        return 0  # one process writes the folder, or looks at it, however many torchrun started
    if config.verify is not None:
        flags.refuse(config, ["to", "out"], "not with --verify")
        return _verify(config, config.verify)
    if config.to is None or config.out is None:
        raise UsageError("--to hf and --out DIR are needed: what to write, and where; or --verify DIR")
    return _convert(config, Path(config.out))


def _verify(config: ConvertConfig, folder: str) -> int:
    from fastgen.manifest import verify_manifest

    problems = verify_manifest(Path(folder))
    if config.json:
        sys.stdout.write(
            json.dumps({"schema_version": 1, "command": PROG, "folder": folder, "problems": problems}) + "\n"
        )
    if problems:
        raise ModelFileError(f"{folder}: {len(problems)} file(s) differ from the manifest\n" + "\n".join(problems))
    sys.stderr.write(f"{folder}: every file is what was written\n")
    return 0


def _convert(config: ConvertConfig, target: Path) -> int:
    from fastgen.checkpoint.hf_export import export_entries, write_export
    from fastgen.device import DTYPES
    from fastgen.hub_id import commit_of
    from fastgen.manifest import write_manifest
    from fastgen.model_folder import require_space
    from fastgen.report import SCHEMA_VERSION
    from fastgen.staged import staged_folder

    if target.exists() or target.is_symlink():
        raise UsageError(f"--out {target}: exists already; name a new folder")
    phases = cli.Phases()
    checkpoint, files = _open(config, phases)
    dtype = DTYPES[config.dtype] if config.dtype else checkpoint.dtype
    entries = export_entries(checkpoint, dtype)
    size = sum(entry.nbytes for entry in entries)
    require_space(target, size)
    with staged_folder(target) as folder:
        with phases.phase("convert", config.model) as advance:
            write_export(folder, checkpoint, dtype, entries, advance)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        write_manifest(folder)
    sys.stdout.write(f"{len(entries)} tensors, {size / 1e6:.1f} MB, written to {target}\n")
    if config.json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "command": PROG,
            "config": dataclasses.asdict(config),
            "source": {
                "path": str(checkpoint.path),
                "format": checkpoint.format,
                "revision": commit_of(checkpoint.path),
            },
            "tensors": len(entries),
            "bytes": size,
        }
        sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _open(config: ConvertConfig, phases: cli.Phases) -> tuple["Checkpoint", dict[str, bytes]]:
    """Return the source, its config completed with what its tokenizer knows, and the tokenizer's files."""
    from fastgen.checkpoint.detect import open_checkpoint
    from fastgen.model_folder import tokenizer_files
    from fastgen.session import find

    checkpoint = open_checkpoint(find(config, phases))
    phases.note(checkpoint.notes)
    tokenizer, files = tokenizer_files(config, checkpoint)
    known = checkpoint.config
    completed = dataclasses.replace(
        known,
        bos_token_id=tokenizer.bos_id if known.bos_token_id is None else known.bos_token_id,
        eos_token_ids=known.eos_token_ids or tuple(sorted(tokenizer.stop_ids)),
    )
    return dataclasses.replace(checkpoint, config=completed), files


if __name__ == "__main__":
    cli.run(main, prog=PROG)
