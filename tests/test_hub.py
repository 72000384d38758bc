"""The hub, simulated by a server on this machine: what is fetched, kept, gone on with, refused, and said."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

from fastgen import hub, load
from fastgen.errors import CapacityError, ModelFileError, NetworkError, UsageError
from fastgen.hub_files import needed_files
from fastgen.hub_id import commit_of, is_id
from tests.checkpoint_writers import LLAMA, make_model, write_hf, write_sharded_safetensors
from tests.fake_hub import COMMIT, LATER, REPO, FakeHub, serve
from tests.vocabularies import small_byte_level

INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository of a sharded model, its tokenizer, and much that nobody needs."""
    folder = write_sharded_safetensors(tmp_path_factory.mktemp("repo") / "model", LLAMA, make_model(LLAMA))
    tokenizer = json.loads(small_byte_level())
    tokenizer["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": []}
    tokenizer["added_tokens"] = []
    clutter = {"pytorch_model.bin": b"\x80\x02", "README.md": b"#", "training_args.bin": b"\x80", "run.py": b"1/0"}
    return contents(folder) | {"tokenizer.json": json.dumps(tokenizer).encode()} | clutter


@pytest.fixture
def server(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    constants = huggingface_hub.constants
    with serve(files) as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield fake


def fetch(name: str = REPO, **options: object) -> Path:
    place = hub.locate(name, **options)
    return place if isinstance(place, Path) else place.run()


def test_a_model_is_fetched_once_and_then_found_without_a_request(server: FakeHub) -> None:
    seen: list[tuple[int, int]] = []
    place = hub.locate(REPO)
    assert not isinstance(place, Path)
    needed = [name for name in server.files if name.endswith((".json", ".safetensors"))]
    assert sorted(place.files) == sorted(needed)
    assert place.bytes == sum(len(server.files[name]) for name in needed if name != INDEX), "the index is read before"
    assert (place.commit, place.revision) == (COMMIT, None)
    folder = place.run(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (place.bytes, place.bytes) and seen == sorted(seen)
    assert sorted(server.asked("GET")) == sorted(needed), "no pickle, no code, no README"
    assert (folder.name, commit_of(folder), commit_of(folder / "config.json")) == (COMMIT, COMMIT, COMMIT)
    server.requests.clear()
    assert hub.locate(REPO) == hub.locate(REPO, offline=True) == hub.locate(REPO, revision=COMMIT) == folder
    assert not server.requests


def test_a_fetched_model_loads_and_its_revision_is_recorded(server: FakeHub) -> None:
    from fastgen.session import model_entry

    model = load.load_model(REPO, device="cpu", dtype="fp32")
    assert torch.equal(model.transformer.norm.weight, make_model(LLAMA)["model.norm.weight"])
    assert model_entry(model)["revision"] == COMMIT
    assert model_entry(load.load_model("stories", device="cpu"))["revision"] is None


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = next(name for name in server.files if name.endswith("1-of-00003.safetensors"))
    server.cut[shard] = 10_000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    assert (fetch() / shard).read_bytes() == server.files[shard]
    ranges = [asked for verb, path, asked in server.requests if verb == "GET" and path.endswith(shard)]
    assert ranges == ["", "bytes=10000-"]


def test_a_run_that_was_stopped_goes_on_with_the_files_that_it_lacks(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shard = next(name for name in server.files if name.endswith("1-of-00003.safetensors"))
    server.cut[shard] = 10_000

    def stopped(seconds: float) -> None:  # when the library pauses before it tries again
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    with pytest.raises(NetworkError, match="not in the cache"):
        hub.locate(REPO, offline=True)
    kept = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert shard not in kept
    server.requests.clear()
    folder = fetch()
    assert set(server.asked("GET")) == {path.name for path in folder.iterdir()} - kept
    assert all(path.read_bytes() == server.files[path.name] for path in folder.iterdir())


def test_only_what_is_missing_is_counted(server: FakeHub) -> None:
    folder = fetch()
    shard = next(folder.glob("*1-of-00003.safetensors"))
    shard.unlink()
    place = hub.locate(REPO)
    assert not isinstance(place, Path)
    assert place.bytes == len(server.files[shard.name])


def test_a_tokenizer_alone_is_fetched_alone(server: FakeHub) -> None:
    path = load.resolve_tokenizer(REPO)
    assert (path / "tokenizer.json").exists() and not list(path.glob("*.safetensors"))
    with pytest.raises(NetworkError):
        hub.locate(REPO, offline=True)


def test_errors_of_the_hub_are_a_line_each(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**options: object) -> str:
        with pytest.raises(NetworkError) as caught:
            fetch(**{"name": REPO} | options)
        assert caught.value.exit_status == 5
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such model" in said(name="someone/else") and "HF_TOKEN" in said(name="someone/else")
    assert "--revision v2: someone/tiny-llama has no such branch" in said(revision="v2")
    assert "offline" in said(offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline" in said()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.gated = True
    assert "gated" in said()
    server.gated, server.status = False, 503
    assert f"{server.url} answers 503" in said()


@pytest.mark.parametrize("name", ["a--b/c", "own/model.git", "o/m-"])
def test_ids_that_the_hub_refuses_are_a_line(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: no id of a model on the hub: "):
        hub.locate(name)


def test_a_mirrors_password_is_not_printed(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    address = server.url.replace("://", "://me:secret@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(NetworkError) as error:
        hub.locate("nobody/there")
    assert "secret" not in str(error.value)


def test_a_token_opens_a_gated_model(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (fetch() / "config.json").exists()


def test_nobody_there_is_said_at_once_and_after_one_attempt(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(NetworkError, match=r"cannot be reached \(ConnectError\)"):
            fetch()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
        with pytest.raises(NetworkError, match=r"cannot be reached \(ReadTimeout\)"):
            fetch()


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(CapacityError, match=r"needs 0\.\d MB, .* has 0\.1 MB free; nothing was fetched"):
        hub.locate(REPO)
    assert server.asked("GET") == [INDEX], "which names the shards"


def test_a_disk_that_fills_up_is_said_too(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CapacityError, match="is full; the files that came are kept"):
        fetch()


def test_a_cache_that_can_only_be_read_serves_and_is_said(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    server.files = {"a.gguf": b"GGUF"}
    file = fetch()
    monkeypatch.setattr(hub, "_note_commit", refused)
    assert hub.locate(REPO) == file
    server.files = {"b.gguf": b"GGUF", **server.files}
    monkeypatch.setattr(hub, "_turn", refused)
    with pytest.raises(CapacityError, match="cannot be written: Read-only file system; let HF_HUB_CACHE name another"):
        fetch(f"{REPO}/b.gguf")


def test_what_a_repository_must_have() -> None:
    def needed(*names: str, file: str | None = None) -> list[str]:
        return needed_files("a/b", sorted(names), Path, file)[0]

    both = needed("model.safetensors", "consolidated.safetensors", "config.json", "original/consolidated.00.pth")
    assert both == ["config.json", "model.safetensors"]
    assert needed("gptq_model-4bit.safetensors", "quantize_config.json", "config.json") == [
        "config.json",
        "quantize_config.json",
        "gptq_model-4bit.safetensors",
    ]
    assert needed("a.Q4_K_M.gguf", "config.json") == ["a.Q4_K_M.gguf"]
    assert needed("a.gguf", "b.gguf", file="b.gguf") == ["b.gguf"]
    for names, file, words in (
        (("a.gguf", "b.gguf"), None, "2 GGUF files; name one, as in a/b/a.gguf"),
        (("a.gguf",), "c.gguf", "has no c.gguf, but a.gguf"),
        (("a.safetensors", "b.safetensors", "config.json"), None, "2 safetensors files and no model.safetensors.index"),
        (("model.safetensors", "tokenizer.json"), None, "has weights, but no config.json"),
        (("pytorch_model.bin", "config.json"), None, "pickles alone .*not downloaded"),
        (("README.md",), None, "no weights among README.md"),
    ):
        with pytest.raises(ModelFileError, match=words):
            needed(*names, file=file)
    with pytest.raises(ModelFileError, match=r"no tokenizer among a\.gguf"):
        needed_files("a/b", ["a.gguf"], Path, tokenizer=True)


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_id("meta-llama/Llama-3.2-1B") and is_id("a/b/c.Q4_0.gguf")
    for name in ("stories", "./a/b", "/a/b", "a/b/c", "../a/b", "models/x", "a/", "a b/c", "a/b\n", "-a/b", "~/b"):
        assert not is_id(name), name
    assert load.locate("./no/such") == load.locate(Path("no/such")) == Path("no/such")
    with pytest.raises(ModelFileError, match="no such file or folder"):
        load.load_model(Path("no/such"))
    with pytest.raises(UsageError, match="--revision main: stories is no model of the hub"):
        load.locate("stories", revision="main")
    with pytest.raises(UsageError, match="no id"):
        hub.locate("../../etc/passwd")


def test_smollm2_is_looked_for_in_the_cache_then_on_the_hub_then_in_the_package(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").touch()
    monkeypatch.setattr(load, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(package)]))
    assert load.locate("smollm2") == package / "model.gguf", "not on this hub"
    monkeypatch.setattr(load, "SMOLLM2", REPO)
    place = load.locate("smollm2")
    assert not isinstance(place, Path) and place.repo == REPO
    assert load.locate("smollm2", offline=True) == package / "model.gguf"
    folder = place.run()
    assert load.locate("smollm2", offline=True) == load.locate("smollm2") == folder
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match="not installed"):
        load.locate("smollm2", offline=True)


RANK = """
import sys
from pathlib import Path
from fastgen import hub
place = hub.locate(sys.argv[1])
print(place if isinstance(place, Path) else place.run())
"""


def test_processes_of_one_host_fetch_a_model_once(server: FakeHub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_HUB_CACHE", None)
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, REPO], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len(found) == 1 and COMMIT in found.pop()
    weights = [name for name in server.asked("GET") if name.endswith(".safetensors")]
    assert sorted(weights) == sorted(set(weights)), "each file once"


def test_a_folder_in_the_cache_that_lacks_a_shard_is_not_taken_for_complete(server: FakeHub, tmp_path: Path) -> None:
    folder = fetch()
    whole = write_hf(tmp_path / "other", LLAMA, make_model(LLAMA))
    assert hub._has_weights(folder) and not hub._has_weights(whole), "no tokenizer there"
    next(folder.glob("*2-of-00003.safetensors")).unlink()
    assert not hub._has_weights(folder)


def test_a_gguf_that_was_fetched_by_its_name_is_not_taken_for_the_model(server: FakeHub) -> None:
    sound = server.files
    server.files = {**sound, "other.gguf": b"GGUF"}
    file = fetch(f"{REPO}/other.gguf")
    assert (file.name, file.read_bytes(), file.parent.name) == ("other.gguf", b"GGUF", COMMIT)
    assert hub.locate(f"{REPO}/other.gguf", offline=True) == file
    with pytest.raises(
        NetworkError, match=r"not in the cache.*, or give the path of what the cache has: .*other\.gguf"
    ):
        hub.locate(REPO, offline=True)
    folder = fetch()
    assert (folder / "config.json").exists() and folder == hub.locate(REPO, offline=True)
    assert load.load_model(REPO, device="cpu").checkpoint.format == "hugging face"


def test_of_several_ggufs_the_one_in_the_cache_is_not_chosen(server: FakeHub) -> None:
    server.files = {"a.gguf": b"GGUF", "b.gguf": b"GGUF"}
    fetch(f"{REPO}/b.gguf")
    with pytest.raises(ModelFileError, match="2 GGUF files; name one"):
        hub.locate(REPO)


def test_the_only_gguf_of_a_repository_is_the_model(server: FakeHub) -> None:
    server.files = {"a.gguf": b"GGUF", "config.json": b"{}", "README.md": b"#"}
    assert fetch() == fetch(f"{REPO}/a.gguf") == hub.locate(f"{REPO}/a.gguf", offline=True)
    assert server.asked("GET") == ["a.gguf"]


def test_a_safetensors_file_of_an_odd_name_counts_before_a_gguf(server: FakeHub, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", LLAMA, make_model(LLAMA))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit.safetensors")
    server.files = contents(folder) | {"a.gguf": b"GGUF", "tokenizer.json": server.files["tokenizer.json"]}
    fetch(f"{REPO}/a.gguf")
    assert load.load_model(REPO, device="cpu").checkpoint.format == "hugging face"
    assert not hub._has_weights(fetch()), "the repository may have more such files than the cache"
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert load.open_checkpoint(folder).format == "hugging face"


def test_all_files_are_of_the_commit_that_the_branch_was_when_it_was_asked(server: FakeHub) -> None:
    place = hub.locate(REPO)
    assert not isinstance(place, Path)
    server.later = {name: data + b" " if name.endswith(".json") else b"other" for name, data in server.files.items()}
    folder = place.run()
    assert folder.name == COMMIT
    assert all(path.read_bytes() == server.files[path.name] for path in folder.iterdir())
    server.requests.clear()
    assert hub.locate(REPO) == hub.locate(REPO, offline=True) == hub.locate(REPO, revision=COMMIT) == folder
    assert not server.requests, "what was fetched is the branch, as far as the cache knows"
    assert hub.locate(REPO, revision=LATER) != folder


def test_shards_are_fetched_by_the_names_that_the_index_gives(server: FakeHub) -> None:
    index = json.loads(server.files[INDEX])
    odd = {name: f"part {number}.safetensors" for number, name in enumerate(sorted(set(index["weight_map"].values())))}
    index["weight_map"] = {tensor: odd[name] for tensor, name in index["weight_map"].items()}
    renamed = {odd.get(name, name): data for name, data in server.files.items()}
    server.files = renamed | {INDEX: json.dumps(index).encode(), "model-9-of-9.safetensors": b""}
    folder = fetch()
    assert {path.name for path in folder.glob("*.safetensors")} == set(odd.values())
    loaded = load.load_model(REPO, device="cpu", dtype="fp32")
    assert torch.equal(loaded.transformer.norm.weight, make_model(LLAMA)["model.norm.weight"])
    assert hub.locate(REPO, offline=True) == folder


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "run.py", "gone.safetensors", "sub/x.safetensors"])
def test_an_index_fetches_no_file_but_safetensors_of_the_repository(server: FakeHub, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    server.files = {**server.files, INDEX: json.dumps(index).encode(), "sub/x.safetensors": b""}
    with pytest.raises(ModelFileError, match=r"no plain file name|names what is no safetensors file"):
        hub.locate(REPO)
    assert server.asked("GET") == [INDEX]


def test_a_hub_that_gives_no_commit_is_refused(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_hub.COMMIT", "../../elsewhere")
    with pytest.raises(NetworkError, match=r"gives no hash of the revision, but '\.\./\.\./elsewhere'"):
        hub.locate(REPO)
