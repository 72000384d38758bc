"""The folder of compiled kernels: what is whole is used again, what is not is ignored with a line, and nobody removes
or seals what another process may be writing."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgen.compile_cache import LOCK, SEAL, Cache, seal, use_cache
from fastgen.errors import UsageError

FACTS = {"model": "a", "versions": {"torch": "1"}}

OTHER_PROCESS = """
import sys
from fastgen.compile_cache import seal, use_cache
cache = use_cache(sys.argv[1], {"model": "a", "versions": {"torch": "1"}}, print)
print(cache.folder, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path.with_name("elsewhere")))


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, notes: list[str]) -> Callable[[], Cache]:
    """Choose a folder as a process does that starts; its descriptors count as another process's until `end`."""
    return lambda: use_cache(str(tmp_path), FACTS, notes.append)


def end(cache: Cache) -> None:
    """Do what the end of a process does."""
    os.close(cache.lock)


def fill(cache: Cache, name: str = "hash") -> Path:
    """Write what a compilation leaves."""
    kernel = Path(os.environ["TRITON_CACHE_DIR"]) / name / "kernel.cubin"
    kernel.parent.mkdir()
    kernel.write_bytes(b"binary" * 100)
    assert kernel.is_relative_to(cache.folder)
    return kernel


def sealed_names(cache: Cache) -> set[str]:
    return set(json.loads((cache.folder / SEAL).read_text()))


@contextlib.contextmanager
def other_process(root: Path) -> Iterator[Path]:
    """Let another process use a folder; yields which, and kills the process."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.kill()


def test_a_sealed_folder_is_used_again_and_says_nothing(start: Callable[[], Cache], notes: list[str]) -> None:
    cache = start()
    kernel = fill(cache)
    seal(cache, notes.append)
    end(cache)
    again = start()
    assert again.folder == cache.folder
    assert kernel.exists()
    assert not notes
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(again.folder)


def test_other_facts_have_a_folder_of_their_own(tmp_path: Path, start: Callable[[], Cache]) -> None:
    cache = start()
    seal(cache, print)
    assert use_cache(str(tmp_path), FACTS | {"format": "int4"}, print).folder != cache.folder


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_folder_is_removed_with_a_line(start: Callable[[], Cache], notes: list[str], damage: str) -> None:
    cache = start()
    kernel = fill(cache)
    seal(cache, notes.append)
    end(cache)
    if damage == "gone":
        kernel.unlink()
    else:
        kernel.write_bytes(b"Binary" + b"binary" * 99 if damage == "changed" else b"bin")
    other = start()
    assert not kernel.exists()
    assert len(notes) == 1 and "damaged" in notes[0] and str(cache.folder) in notes[0]
    seal(other, notes.append)
    end(other)
    assert start().folder == other.folder
    assert len(notes) == 1, "what was damaged is gone"


def test_a_damaged_folder_that_another_process_uses_is_left_alone(
    start: Callable[[], Cache], notes: list[str]
) -> None:  # fmt: skip
    cache = start()
    kernel = fill(cache)
    seal(cache, notes.append)
    kernel.write_bytes(b"bin")
    assert start().folder != cache.folder
    assert kernel.exists()
    assert len(notes) == 1 and "damaged, and ignored" in notes[0]


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
def test_what_a_start_left_that_never_finished_is_removed_with_one_line(
    start: Callable[[], Cache], notes: list[str], content: bytes | None
) -> None:
    cache = start()
    kernel = fill(cache)
    if content is not None:
        (cache.folder / SEAL).write_bytes(content)
    end(cache)
    other = start()
    assert not kernel.exists()
    assert len(notes) == 1 and "incomplete, and removed" in notes[0]
    seal(other, notes.append)
    end(other)
    assert start().folder == other.folder
    assert len(notes) == 1


def test_it_is_removed_too_where_a_whole_folder_comes_first(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str]
) -> None:
    whole, unfinished = start(), start()
    kernel = fill(unfinished)
    seal(whole, notes.append)
    end(unfinished)
    assert start().folder == whole.folder
    assert not kernel.exists() and not unfinished.folder.exists()
    assert len(notes) == 1


def test_a_folder_that_another_process_fills_is_left_to_it(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str]
) -> None:
    with other_process(tmp_path) as folder:
        half = folder / "inductor" / "kernel.so"
        half.write_text("half")
        assert start().folder != folder
        assert half.exists()
        assert not notes
    start()
    assert not half.exists(), "the lock went with the process"
    assert len(notes) == 1


def test_files_that_were_added_after_the_seal_are_not_trusted(start: Callable[[], Cache]) -> None:
    cache = start()
    seal(cache, print)
    kernel = fill(cache)
    end(cache)
    assert start().folder == cache.folder
    assert not kernel.exists()


def test_a_whole_folder_is_shared_and_nothing_in_it_removed_meanwhile(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str]
) -> None:
    cache = start()
    seal(cache, notes.append)
    end(cache)
    with other_process(tmp_path) as folder:
        assert folder == cache.folder
        added = folder / "triton" / "kernel.cubin"
        added.write_text("half")
        shared = start()
        assert shared.folder == folder
        assert added.exists()
        seal(shared, notes.append)
        assert not sealed_names(shared), "the other process may be writing what is there"
    seal(shared, notes.append)
    assert not sealed_names(shared), "it may have been stopped in the middle of a file"
    end(start())
    assert added.exists(), "who came second still uses the folder"
    end(shared)
    assert start().folder == folder
    assert not added.exists()
    assert not notes


def test_a_process_that_others_joined_seals_nothing_more(start: Callable[[], Cache], notes: list[str]) -> None:
    cache = start()
    seal(cache, notes.append)
    end(start())
    fill(cache)
    seal(cache, notes.append)
    assert not sealed_names(cache)


def test_what_a_lonely_process_adds_is_sealed_as_well(start: Callable[[], Cache], notes: list[str]) -> None:
    cache = start()
    first = fill(cache, "first")
    seal(cache, notes.append)
    end(cache)
    again = start()
    second = fill(again, "second")
    seal(again, notes.append)
    end(again)
    end(start())
    assert first.exists() and second.exists()


def test_locks_and_files_that_are_still_to_be_renamed_are_not_sealed(start: Callable[[], Cache]) -> None:
    cache = start()
    kernel = fill(cache)
    passing = [
        cache.folder / "triton/hash/tmp.pid_12_b0a4/kernel.cubin",
        cache.folder / "inductor/ab/.12.140737.tmp",
        cache.folder / "inductor/locks/cab.lock",
    ]
    for path in passing:
        path.parent.mkdir(parents=True)
        path.write_text("")
    seal(cache, print)
    assert sealed_names(cache) == {str(kernel.relative_to(cache.folder))}
    for path in passing:
        path.unlink()
    end(cache)
    assert start().folder == cache.folder


def test_a_start_waits_for_another_to_lock_what_it_has_made(tmp_path: Path, start: Callable[[], Cache]) -> None:
    first = start()
    (turn,) = tmp_path.glob("*.lock")
    found: list[Cache] = []
    thread = threading.Thread(target=lambda: found.append(start()))
    with open(turn) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder = first.folder.with_name(first.folder.name[:-1] + "1")
        folder.mkdir()
        thread.start()
        thread.join(0.2)  # long enough for one that would not wait
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            fcntl.flock(file, fcntl.LOCK_UN)
            thread.join()
            assert folder.exists()
    assert found[0].folder not in (first.folder, folder)


def test_cold_starts_at_once_get_folders_of_their_own(start: Callable[[], Cache]) -> None:
    folders: list[Path] = []
    together = threading.Barrier(24)

    def race() -> None:
        together.wait()
        folders.append(start().folder)

    threads = [threading.Thread(target=race) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == together.parties


def test_a_number_that_is_taken_by_no_folder_is_passed_over(tmp_path: Path, start: Callable[[], Cache]) -> None:
    cache = start()
    end(cache)
    os.rename(cache.folder, tmp_path / "elsewhere")
    cache.folder.symlink_to(tmp_path / "nowhere")
    assert start().folder.name.endswith("-1")


@pytest.mark.parametrize("name", ["n" * 5000, "/proc/self/mem", "/etc/passwd", "../lock", "triton", "a\0b"])
@pytest.mark.parametrize("digest", ["0" * 64, None, [1, "x"], {"a": 1}])
def test_a_seal_that_says_nonsense_is_as_good_as_none(
    start: Callable[[], Cache], notes: list[str], name: str, digest: object
) -> None:
    cache = start()
    fill(cache)
    (cache.folder / SEAL).write_text(json.dumps({name: digest}))
    end(cache)
    assert start().folder.exists()
    assert len(notes) == 1 and "damaged" in notes[0]


def test_files_outside_of_the_folder_are_never_as_sealed(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str]
) -> None:
    cache = start()
    kernel = fill(cache)
    seal(cache, notes.append)
    (digest,) = json.loads((cache.folder / SEAL).read_text()).values()
    outside = tmp_path / "outside"
    kernel.rename(outside)
    (cache.folder / SEAL).write_text(json.dumps({str(outside): digest, "../outside": digest}))
    end(cache)
    start()
    assert len(notes) == 1 and "damaged" in notes[0]
    assert outside.exists()


@pytest.mark.parametrize("fault", ["disk full", "seal is a folder", "folder is gone", "all is gone"])
def test_a_folder_that_cannot_be_sealed_is_a_line(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str], fault: str
) -> None:
    cache = start()
    fill(cache)
    match fault:
        case "disk full":
            (cache.folder / f".{SEAL}").symlink_to("/dev/full")
        case "seal is a folder":
            (cache.folder / SEAL).mkdir()
        case "folder is gone":
            cache.folder.rename(tmp_path / "away")
        case "all is gone":
            tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-away"))
    seal(cache, notes.append)
    assert len(notes) == 1 and str(cache.folder) in notes[0] and "the next start compiles again" in notes[0]


def test_a_folder_that_was_put_in_place_of_ours_is_not_sealed(
    tmp_path: Path, start: Callable[[], Cache], notes: list[str]
) -> None:
    cache = start()
    cache.folder.rename(tmp_path / "away")
    other = start()
    assert other.folder == cache.folder
    fill(other)
    seal(cache, notes.append)
    assert not (other.folder / SEAL).exists()


def test_a_file_that_vanishes_while_the_folder_is_read_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], Cache], notes: list[str]
) -> None:
    cache = start()
    lasting, passing = fill(cache, "lasting"), fill(cache, "passing")

    def is_file(path: Path) -> bool:
        if path == passing:
            passing.unlink()
        return True

    monkeypatch.setattr(Path, "is_file", is_file)
    seal(cache, notes.append)
    assert sealed_names(cache) == {str(lasting.relative_to(cache.folder))}
    assert not notes


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UsageError, match=r"--cache-dir .*file.*: cannot be used"):
            use_cache(str(tmp_path / place), FACTS, print)


def test_a_relative_folder_counts_from_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UsageError, match="without spaces"):
        use_cache("here", FACTS, print)
