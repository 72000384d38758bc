"""The folder of compiled kernels: what is whole is used again, anything else is ignored with a line."""

import os
from pathlib import Path

import pytest

from fastgen.compile_cache import SEAL, seal, use_cache
from fastgen.errors import UsageError

FACTS = {"model": "a", "versions": {"torch": "1"}}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "elsewhere")


def fill(folder: Path) -> Path:
    """Write what a compilation leaves."""
    kernel = Path(os.environ["TRITON_CACHE_DIR"]) / "hash" / "kernel.cubin"
    kernel.parent.mkdir()
    kernel.write_bytes(b"binary" * 100)
    assert kernel.is_relative_to(folder)
    return kernel


def test_a_sealed_folder_is_used_again_and_says_nothing(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = use_cache(tmp_path, FACTS, notes.append)
    kernel = fill(folder)
    seal(folder)
    assert use_cache(tmp_path, FACTS, notes.append) == folder
    assert kernel.exists()
    assert not notes
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(folder)


def test_other_facts_have_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = use_cache(tmp_path, FACTS, print)
    seal(folder)
    assert use_cache(tmp_path, FACTS | {"format": "int4"}, print) != folder


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_folder_is_ignored_with_a_line(tmp_path: Path, damage: str) -> None:
    notes: list[str] = []
    folder = use_cache(tmp_path, FACTS, notes.append)
    kernel = fill(folder)
    seal(folder)
    if damage == "gone":
        kernel.unlink()
    else:
        kernel.write_bytes(b"Binary" + b"binary" * 99 if damage == "changed" else b"bin")
    other = use_cache(tmp_path, FACTS, notes.append)
    assert not kernel.exists()
    assert len(notes) == 1 and "damaged" in notes[0] and str(folder) in notes[0]
    seal(other)
    assert use_cache(tmp_path, FACTS, notes.append) == other
    assert len(notes) == 1, "what was damaged is gone"


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_folder_whose_seal_is_missing_or_unreadable_is_ignored_and_left_alone(
    tmp_path: Path, content: bytes | None
) -> None:
    notes: list[str] = []
    folder = use_cache(tmp_path, FACTS, notes.append)
    kernel = fill(folder)
    if content is not None:
        (folder / SEAL).write_bytes(content)
    assert use_cache(tmp_path, FACTS, notes.append) != folder
    assert kernel.exists(), "another process may be writing there"
    assert len(notes) == 1 and "incomplete" in notes[0]


def test_files_that_were_added_after_the_seal_are_not_trusted(tmp_path: Path) -> None:
    folder = use_cache(tmp_path, FACTS, print)
    seal(folder)
    kernel = fill(folder)
    assert use_cache(tmp_path, FACTS, print) == folder
    assert not kernel.exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--cache-dir .*file: cannot be written"):
        use_cache(tmp_path / "file", FACTS, print)
