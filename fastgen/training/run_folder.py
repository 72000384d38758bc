"""What a training run leaves on disk: one folder, a complete Hugging Face model at every save.

    config.json, generation_config.json, model.safetensors, tokenizer files    what generate and transformers load
    training.json            the run: what it was asked for, its losses and validations
    loss.png                 the curve, where matplotlib is installed
    training_state.safetensors    until the run is done: fp32 weights and moments, to go on from

The folder changes as a whole (`fastgen.staged`): a run that dies while it saves leaves the last good one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastgen.checkpoint.hf_save import save_hf, save_tensors, write_json
from fastgen.checkpoint.safetensors_file import read_safetensors
from fastgen.errors import ModelFileError, UsageError
from fastgen.json_file import read_json
from fastgen.staged import staged_folder
from fastgen.training.curve import can_draw, draw_curve
from fastgen.training.trainer import Trainer, Validation
from fastgen.training.vocabulary import write_tokenizer

STATE, RECORD, CURVE = "training_state.safetensors", "training.json", "loss.png"

Settings = Mapping[str, object]


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of one run.

    `settings` is all that the run's losses depend on; a run goes on only under the same.
    """

    path: Path
    settings: Settings
    tokenizer: Mapping[str, bytes]
    save_dtype: torch.dtype

    def save(self, trainer: Trainer, validations: Sequence[Validation], *, finished: bool) -> None:
        """Put the run as it is now in place of what the folder held; errors as in `staged_folder`."""
        with staged_folder(self.path) as folder:
            save_hf(folder, trainer.model.config, dict(trainer.model.named_parameters()), self.save_dtype)
            write_tokenizer(folder, self.tokenizer)
            record = {
                "settings": self.settings,
                "finished": finished,
                "losses": trainer.losses,
                "validations": [asdict(entry) for entry in validations],
            }
            write_json(folder / RECORD, record)
            if can_draw():
                draw_curve(folder / CURVE, trainer.losses, validations, self.path.name)
            if not finished:
                state = {name: tensor.cpu() for name, tensor in trainer.state().items()}
                save_tensors(folder / STATE, state, {"format": "pt"})

    def resume(self, trainer: Trainer) -> list[Validation]:
        """Bring the trainer to where the saved run stopped, and return the validations so far.

        Raises:
            UsageError: no run was interrupted here, or it ran under other settings.
            ModelFileError: what it saved is damaged or not of this model.
        """
        if not (self.path / STATE).exists():
            raise UsageError(f"--resume: {self.path} holds no unfinished run; start one without --resume")
        record = read_json(self.path / RECORD)
        self._check_settings(record)
        losses, validations = record.get("losses"), record.get("validations")
        tensors = read_safetensors(self.path / STATE)
        wanted = {f"model.{name}": parameter.shape for name, parameter in trainer.model.named_parameters()}
        wrong = [name for name, shape in wanted.items() if name not in tensors or tensors[name].shape != tuple(shape)]
        if wrong or not isinstance(losses, list) or not isinstance(validations, list):
            raise ModelFileError(f"{self.path}: the saved run is damaged or of another model: {wrong or RECORD}")
        trainer.restore({name: tensor[()] for name, tensor in tensors.items()}, losses)
        return [Validation(**entry) for entry in validations]

    def _check_settings(self, record: Mapping[str, object]) -> None:
        before = record.get("settings")
        if not isinstance(before, dict):
            raise ModelFileError(f"{self.path / RECORD}: says nothing about the settings of the run")
        settings = json.loads(json.dumps(dict(self.settings)))  # tuples are lists there
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            name = changed[0]
            raise UsageError(
                f"--resume: the run in {self.path} began with {name} {before.get(name)}, not {settings[name]}\n"
                "Go on with the same flags, or start a new run with another --out"
            )


def check_new(path: Path) -> None:
    """Raise `UsageError` if `path` is taken, by a run that could go on or by anything else."""
    if (path / STATE).exists():
        raise UsageError(f"--out {path}: holds an unfinished run; add --resume to go on, or name another folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--out {path}: exists; name another folder, or remove it first")
