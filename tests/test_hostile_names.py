"""Thirty file names that lead out of a model's folder, to what is no file, or nowhere: none is opened.

Behind every one that leads anywhere stands a sound file with the very tensors that the index asks for, so a name that
was followed would load.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.errors import ModelFileError
from tests.bad_hf_folders import MODEL
from tests.checkpoint_writers import LLAMA, write_sharded_safetensors

NORM = "model.norm.weight"
Make = Callable[[Path], object]


def nothing(path: Path) -> None:
    """The name is hostile as it stands."""


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


PLAIN = "no plain file name"
NAMES: dict[str, tuple[object, Make, str]] = {
    # the name in the index, what is made of the path `odd` in the folder, and what the error must say
    "a parent": ("../outside.safetensors", nothing, PLAIN),
    "a grandparent": ("../../outside.safetensors", nothing, PLAIN),
    "a parent by a detour": ("sub/../../outside.safetensors", nothing, PLAIN),
    "a parent behind a dot": ("./../outside.safetensors", nothing, PLAIN),
    "a parent by Windows' separator": ("..\\outside.safetensors", nothing, PLAIN),
    "a sibling by a dot": ("./model-00001-of-00003.safetensors", nothing, PLAIN),
    "a folder below": ("sub/inner.safetensors", nothing, PLAIN),
    "an absolute name": ("/etc/passwd", nothing, PLAIN),
    "an absolute name twice": ("//etc/passwd", nothing, PLAIN),
    "a drive": ("C:\\outside.safetensors", nothing, PLAIN),
    "a share": ("\\\\server\\outside.safetensors", nothing, PLAIN),
    "an address": ("https://example.com/model.safetensors", nothing, PLAIN),
    "a file address": ("file:///etc/passwd", nothing, PLAIN),
    "memory": ("/proc/self/mem", nothing, PLAIN),
    "a device": ("/dev/zero", nothing, PLAIN),
    "the folder": (".", nothing, PLAIN),
    "the folder above": ("..", nothing, PLAIN),
    "nothing": ("", nothing, PLAIN),
    "a NUL": ("model\0.safetensors", nothing, PLAIN),
    "a NUL at the end": ("model-00001-of-00003.safetensors\0.txt", nothing, PLAIN),
    "null": (None, nothing, PLAIN),
    "a number": (7, nothing, PLAIN),
    "a list": (["model-00001-of-00003.safetensors"], nothing, PLAIN),
    "half a surrogate": ("\ud800.safetensors", nothing, "not there"),
    "a home": ("~", nothing, "not there"),
    "a variable": ("$HOME", nothing, "not there"),
    "a percent": ("%2e%2e%2foutside.safetensors", nothing, "not there"),
    "a name without an end": ("x" * 5000, nothing, "not there"),
    "a stream": ("-", nothing, "not there"),
    "a link out": ("odd", lambda odd: odd.symlink_to("../outside.safetensors"), "leads out"),
    "a link out by its full name": ("odd", lambda odd: odd.symlink_to(odd.parents[1] / "outside.safetensors"), "out"),
    "a link to a link out": (
        "odd", lambda odd: [(odd.parent / "b").symlink_to("../outside.safetensors"), odd.symlink_to("b")], "leads out",
    ),
    "a link to a device": ("odd", lambda odd: odd.symlink_to("/dev/zero"), "leads out"),
    "a link to itself": ("odd", lambda odd: odd.symlink_to("odd"), "not there"),
    "a link to nothing": ("odd", lambda odd: odd.symlink_to("gone"), "not there"),
    "a FIFO": ("odd", os.mkfifo, "not a regular file"),
    "a socket": ("odd", socket_at, "cannot be opened"),
    "a folder": ("odd", os.mkdir, "not a regular file"),
}  # fmt: skip


def test_there_are_thirty() -> None:
    assert len(NAMES) >= 30


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", NAMES)
def test_a_hostile_name_in_an_index_opens_nothing(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make, words = NAMES[case]
    folder = write_sharded_safetensors(tmp_path / "model", LLAMA, MODEL)
    save_file(MODEL, tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    save_file(MODEL, folder / "sub" / "inner.safetensors")
    monkeypatch.chdir(folder)
    make(folder / "odd")
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": shards | {NORM: name}}))
    with pytest.raises(ModelFileError, match=words) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and len(message.splitlines()) == 1 and len(message) < 1000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
def test_a_fifo_in_a_files_place_does_not_wait(tmp_path: Path, name: str) -> None:
    folder = write_sharded_safetensors(tmp_path / "model", LLAMA, MODEL)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(folder)
