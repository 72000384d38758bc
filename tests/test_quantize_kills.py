"""`quantize.run` killed at any moment, or on too small a disk: the old folder or the new, and nothing beside it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgen.errors import CapacityError
from fastgen.load import load_model
from fastgen.manifest import verify_manifest
from quantize.run import main

COMMAND = [sys.executable, "-m", "quantize.run", "--model", "stories", "--device", "cpu", "--overwrite"]
KILLS = 50


def quantize(target: Path, quant: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--quant", quant, "--out", str(target)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_kills_leave_the_old_folder_or_the_new(tmp_path: Path) -> None:
    target, chance = tmp_path / "out", random.Random(0)
    start = time.perf_counter()
    assert quantize(target, "int8").wait() == 0
    duration = time.perf_counter() - start
    kills = 0
    while kills < KILLS:
        start = time.perf_counter()
        process = quantize(target, ("int4", "int8")[kills % 2])
        # Half of the kills fall into the last third, where files are written, synced and renamed.
        try:
            process.wait(duration * (chance.uniform(0.6, 1.05) if kills % 2 else chance.uniform(0, 1)))
            duration = time.perf_counter() - start  # it was faster than the last one that was let run
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert not verify_manifest(target), f"kill {kills}"
        load_model(target, device="cpu")
    assert quantize(target, "int4").wait() == 0
    assert load_model(target, device="cpu").format.startswith("int4")
    assert os.listdir(tmp_path) == ["out"], "a rerun leaves no temporary files"


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many KiB."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(tmp_path)],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("small_disk", range(200, 3200, 300), indirect=True)
def test_small_disks_are_refused_or_filled_without_a_trace(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", "stories", "--quant", "int4", "--device", "cpu", "--out", str(small_disk / "out")]
    with pytest.raises(CapacityError, match="nothing was written"):
        main(flags)
    monkeypatch.setattr("fastgen.model_folder.require_space", lambda target, needed: None)
    with pytest.raises(CapacityError):
        main(flags)
    assert not os.listdir(small_disk)


@pytest.mark.long
@pytest.mark.parametrize("small_disk", range(5000, 9000, 1000), indirect=True)
def test_disks_with_room_for_one_folder_keep_the_old_one(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = small_disk / "out"
    flags = ["--model", "stories", "--device", "cpu", "--out", str(target)]
    assert main([*flags, "--quant", "int4"]) == 0
    for _ in range(2):
        with pytest.raises(CapacityError):
            main([*flags, "--quant", "int8", "--overwrite"])
        assert not verify_manifest(target)
        assert os.listdir(small_disk) == ["out"]
        monkeypatch.setattr("fastgen.model_folder.require_space", lambda target, needed: None)
