"""What a training run leaves on disk: one folder, a complete Hugging Face model at every save.

    config.json, generation_config.json, model.safetensors, tokenizer files    what generate and transformers load
    training.json            the run: what it was asked for, its losses and validations
    loss.png                 the curve, where matplotlib is installed
    training_state.safetensors    until the run is done: fp32 weights and moments, to go on from
    fastgen-manifest.json    sizes and hashes of all these, which a run checks before it goes on

The folder changes as a whole (`fastgen.staged`): a run that dies while it saves leaves the last good one. What others
have put into it stays.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fastgen import manifest
from fastgen.checkpoint.hf_save import save_hf, save_tensors, write_json
from fastgen.checkpoint.safetensors_file import read_safetensors
from fastgen.errors import ModelFileError, UsageError
from fastgen.json_file import read_json
from fastgen.staged import staged_folder
from fastgen.training.curve import can_draw, draw_curve
from fastgen.training.identity import Settings, first_difference
from fastgen.training.trainer import Trainer, Validation
from fastgen.training.vocabulary import write_tokenizer

STATE, RECORD, CURVE = "training_state.safetensors", "training.json", "loss.png"
MAX_RECORD = 100_000_000  # bytes; a loss of every step takes about 20


@dataclass(frozen=True)
class Progress:
    """How far a run has come, beside its weights and losses: what it measured, in how many seconds of training."""

    validations: list[Validation]
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of one run.

    `settings` is all that the run's losses depend on; a run goes on only under the same.
    """

    path: Path
    settings: Settings
    tokenizer: Mapping[str, bytes]
    save_dtype: torch.dtype

    def save(self, trainer: Trainer, progress: Progress, *, finished: bool) -> None:
        """Put the run as it is now in place of what the folder held; errors as in `staged_folder`."""
        with staged_folder(self.path) as folder:
            save_hf(folder, trainer.model.config, dict(trainer.model.named_parameters()), self.save_dtype)
            write_tokenizer(folder, self.tokenizer)
            record = {"settings": self.settings, "finished": finished, "losses": trainer.losses, **asdict(progress)}
            write_json(folder / RECORD, record)
            if can_draw():
                draw_curve(folder / CURVE, trainer.losses, progress.validations, self.path.name)
            if not finished:
                state = {name: tensor.cpu() for name, tensor in trainer.state().items()}
                save_tensors(folder / STATE, state, {"format": "pt"})
            manifest.write_manifest(folder)
            self._carry_over(folder)

    def resume(self, trainer: Trainer) -> Progress:
        """Bring the trainer to where the saved run stopped, and return what else the run had come to.

        Raises:
            UsageError: no run was interrupted here, or it ran under other settings.
            ModelFileError: what it saved is damaged, or not of this model.
        """
        check_unfinished(self.path)
        if damage := manifest.find_damage(self.path):
            raise ModelFileError(
                f"{self.path}: the saved run is damaged: {damage[0]}\nStart a new run with another --out"
            )
        record = read_json(self.path / RECORD, limit=MAX_RECORD)
        self._check_settings(record)
        losses, progress = _read_record(record, self.path / RECORD)
        tensors = read_safetensors(self.path / STATE)
        found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        wanted = {name: f"{torch.float32} {list(shape)}" for name, shape in trainer.state_shapes().items()}
        for name in (*wanted, *found):
            if found.get(name) != wanted.get(name):
                raise ModelFileError(
                    f"{self.path / STATE}: {name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
                )
        state = {name: tensor[()] for name, tensor in tensors.items()}
        steps = {tensor.item() for name, tensor in state.items() if name.endswith(".step")}
        if steps != {len(losses)}:
            raise ModelFileError(f"{self.path / STATE}: after {steps} steps, but {RECORD} has {len(losses)} losses")
        trainer.restore(state, losses)
        return progress

    def _check_settings(self, record: Mapping[str, object]) -> None:
        before = record.get("settings")
        if not isinstance(before, dict):
            raise ModelFileError(f"{self.path / RECORD}: says nothing about the settings of the run")
        if difference := first_difference(before, self.settings):
            raise UsageError(
                f"--resume: the run in {self.path} began with {difference.name} {difference.before}, "
                f"not {difference.now}\n"
                "Go on with what it began with, or train on from its weights: --init-from and another --out"
            )

    def _carry_over(self, folder: Path) -> None:
        """Give the new `folder` what others have put into the old one, as links to the same files."""
        if not self.path.is_dir():
            return
        for path in self.path.iterdir():
            if path.name in (STATE, CURVE) or (folder / path.name).exists():
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, folder / path.name, symlinks=True, copy_function=_link)
            else:
                _link(path, folder / path.name)


def check_new(path: Path) -> None:
    """Raise `UsageError` if `path` is taken, by a run that could go on or by anything else."""
    if (path / STATE).exists():
        raise UsageError(f"--out {path}: holds an unfinished run; add --resume to go on, or name another folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--out {path}: exists; name another folder, or remove it first")
    if path.is_mount():
        raise UsageError(f"--out {path}: is a mount point, which cannot be replaced as a whole; name a folder in it")


def check_unfinished(path: Path) -> None:
    """Raise `UsageError` if `path` holds no run that could go on."""
    if not (path / STATE).exists():
        raise UsageError(f"--resume: {path} holds no unfinished run; start one without --resume")


def _link(source: str | Path, target: str | Path) -> None:
    """Let `target` be the file `source`, or a copy of it where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _read_record(record: Mapping[str, object], path: Path) -> tuple[list[float], Progress]:
    """Return the losses and the progress in a run's record; raises `ModelFileError` for anything else in them."""
    losses, entries, seconds = (record.get(name) for name in ("losses", "validations", "seconds"))
    if not isinstance(losses, list) or not losses or not all(isinstance(loss, float) for loss in losses):
        raise ModelFileError(f"{path}: losses are no list of numbers")
    if not isinstance(seconds, float) or not isinstance(entries, list):
        raise ModelFileError(f"{path}: seconds are {seconds!r:.100}, validations {entries!r:.100}")
    names = {field.name for field in fields(Validation)}
    for entry in entries:
        numbers = isinstance(entry, dict) and all(isinstance(value, int | float | None) for value in entry.values())
        if not numbers or entry.keys() != names:
            raise ModelFileError(f"{path}: {entry!r:.100} is no validation, expected {', '.join(sorted(names))}")
    return losses, Progress([Validation(**entry) for entry in entries], seconds)
