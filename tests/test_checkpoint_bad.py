"""Checkpoints that are missing, damaged, hostile or contradictory: one typed error each, which names the place.

A memory map would turn some of these into SIGBUS, which ends pytest itself; a hang ends in the timeout.
"""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.errors import ModelFileError
from tests.bad_files import FILE_CASES
from tests.bad_hf_folders import HF_CASES, MODEL
from tests.checkpoint_writers import LLAMA, write_gguf, write_hf, write_llama2c, write_torch
from tests.large_files import LARGE_CASES

pytestmark = pytest.mark.timeout(20)

CASES = HF_CASES | FILE_CASES | LARGE_CASES


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_one_typed_error_that_names_the_place(tmp_path: Path, case: str) -> None:
    build, expected = CASES[case]
    path = build(tmp_path)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert caught.value.exit_status == 3
    assert path.name in message, message
    assert len(message.splitlines()) <= 3, message
    assert len(message) < 7000, len(message)
    for part in expected:
        assert part in message, message


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["record", "legacy"])
def test_a_hostile_pickle_executes_nothing(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "executed"
    folder = write_torch(tmp_path / "model", LLAMA, {})
    if place == "record":
        torch.save({"a": Hostile(marker)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)
    assert not marker.exists()


def write_single(form: str, root: Path) -> tuple[Path, Path]:
    """Return the path to open, and the file of weights, of a model in `form`."""
    if form == "safetensors":
        return (folder := write_hf(root / "model", LLAMA, MODEL)), folder / "model.safetensors"
    if form == "torch":
        return (folder := write_torch(root / "model", LLAMA, MODEL)), folder / "pytorch_model.bin"
    path = (write_gguf if form == "gguf" else write_llama2c)(root / "model.bin", LLAMA, MODEL)
    return path, path


FORMS = ["safetensors", "torch", "gguf", "llama2c"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere_is_an_error_when_it_is_opened(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    near_ends = [*range(0, 64, 5), *range(len(whole) - 64, len(whole) - 32, 9)]  # GGUF may end in 31 bytes of padding
    for length in {*near_ends, *range(0, len(whole) - 32, len(whole) // 64)}:
        file.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=file.name):
            open_checkpoint(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1024, len(whole) // 16):  # a zip's directory, at the end, is read when opening
        file.write_bytes(whole)
        tensors = open_checkpoint(path).tensors
        os.truncate(file, length)
        failures = 0
        for tensor in tensors.values():
            try:
                tensor[:]
            except ModelFileError as error:
                assert file.name in str(error)
                failures += 1
        assert failures, f"cut to {length} of {len(whole)} bytes"


@pytest.mark.parametrize("form", FORMS)
def test_random_damage_is_a_typed_error_or_harmless(tmp_path: Path, form: str) -> None:
    path, file = write_single(form, tmp_path)
    whole = file.read_bytes()
    dice = random.Random(0)
    headers = [dice.randrange(min(len(whole), 3000)) for _ in range(150)]
    ends = [len(whole) - 1 - dice.randrange(2000) for _ in range(100)]
    for place in headers + ends:
        damaged = bytearray(whole)
        damaged[place : place + dice.choice((1, 4, 8))] = dice.randbytes(dice.choice((0, 1, 4, 8, 30)))
        file.write_bytes(damaged)
        try:
            for tensor in open_checkpoint(path).tensors.values():
                tensor[:2]
        except ModelFileError as error:
            assert file.name in str(error)
