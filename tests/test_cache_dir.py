"""`--cache-dir` in the commands: refused early where it can do no good, and other kernels have another folder."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgen import bench, chat, generate, session, train
from fastgen.cli import Phases
from fastgen.compile_cache import SEAL, use_cache
from fastgen.engine import Engine
from fastgen.errors import UsageError
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from tests.models import random_model


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path.with_name("elsewhere")))


BAD_FLAGS = {
    "--cache-dir x": "--cache-dir: only with --compile",
    "--compile --cache-dir=": "--cache-dir '': expected a folder",
    "--compile --cache-dir=~nosuchuser/x": "--cache-dir ~nosuchuser/x: no path",
    "--compile --cache-dir=a\tb": "without spaces",
    "--compile --cache-dir=a'b": "without spaces, quotes",
    "--compile --cache-dir=a\\b": "without spaces, quotes and backslashes",
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be loaded."""

    def load(*arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(session, "load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("flags", BAD_FLAGS)
@pytest.mark.parametrize("command", [generate, chat])
def test_a_folder_that_nothing_can_be_kept_in_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, command: object
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        command.main(flags.split(" "))  # type: ignore[attr-defined]
    assert BAD_FLAGS[flags] in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model")
def test_a_proof_that_uses_no_folder_refuses_one() -> None:
    with pytest.raises(UsageError, match="--cache-dir: not with --check-lossless"):
        generate.main(["--compile", "--cache-dir", "x", "--draft", "ngram", "--check-lossless", "2"])


@pytest.mark.parametrize("command", [bench, train])
def test_commands_that_keep_nothing_do_not_take_the_flag(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        command.main(["--cache-dir", "x"])  # type: ignore[attr-defined]
    assert "unrecognized arguments: --cache-dir x" in capsys.readouterr().err


def test_every_fact_makes_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, object] = {}

    def add(name: str, engine: Engine, options: GenerationOptions | None = None) -> None:
        facts[name] = session.compile_facts(engine, options or GenerationOptions())

    def speculating(**changes: object) -> Engine:
        return SpeculativeEngine(model, Speculation(**({"draft": "ngram", "count": 3} | changes)))  # type: ignore[arg-type]

    model = random_model()
    add("plain", Engine(model))
    add("size", Engine(random_model(n_layers=3)))
    add("batch", Engine(model, batch=2))
    add("sampling", Engine(model), GenerationOptions(sampling=SamplingOptions(temperature=0.5)))
    add("log-probabilities", Engine(model), GenerationOptions(logprobs=True))
    add("n-grams", speculating())
    add("number of drafts", speculating(count=4))
    add("rule", speculating(accept="leviathan"))
    add("draft of its own layers", speculating(draft="self:1"))
    add("draft of its own", speculating(draft=random_model(seed=1)))
    add("smaller draft", speculating(draft=random_model(seed=1, n_layers=1)))

    quantized = random_model()
    monkeypatch.setattr(type(quantized), "format", "int8")
    add("format", Engine(quantized))
    add("dtype", Engine(random_model(dtype="bf16")))
    monkeypatch.undo()

    for rank, linked in ((0, False), (1, False), (1, True)):
        ranks = SimpleNamespace(rank=rank, world=2, linked=linked)
        add(f"rank {rank} of 2, linked: {linked}", Engine(dataclasses.replace(random_model(), ranks=ranks)))  # type: ignore[arg-type]

    kernels = random_model()

    class Fused:
        def __getattr__(self, name: str) -> object:
            return self.attend if name == "attend" else getattr(model.transformer.stages, name)

        @staticmethod
        def attend(*arguments: object) -> None:
            """Of another module."""

    kernels.transformer.stages = Fused()  # type: ignore[assignment]
    add("kernels", Engine(kernels))

    with monkeypatch.context() as patch:
        patch.setattr(session, "describe", lambda device: "another GPU")
        add("device", Engine(model))
    with monkeypatch.context() as patch:
        patch.setattr(session.report, "versions", lambda: {"torch": "1.0"})
        add("versions", Engine(model))

    folders = {name: use_cache(str(tmp_path), entry, print).folder.name[:16] for name, entry in facts.items()}
    assert len(set(folders.values())) == len(folders), folders
    assert session.compile_facts(Engine(random_model(seed=5)), GenerationOptions()) == facts["plain"]


class CompilingEngine(Engine):
    """An engine whose compilation is the writing of one file."""

    compiled = True  # type: ignore[assignment]

    def warm_up(self, options: object = None, progress: object = None) -> None:
        with contextlib.suppress(FileExistsError):
            Path(os.environ["TRITON_CACHE_DIR"], "kernel").touch(exist_ok=False)
            type(self).compilations += 1

    compilations = 0


def test_a_warm_up_keeps_what_it_compiled_for_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        engine, options = CompilingEngine(random_model()), GenerationOptions()
        session.warm_up(engine, options, Phases(), cache_dir=str(tmp_path))
    assert CompilingEngine.compilations == 1
    (seal_file,) = tmp_path.glob(f"*/{SEAL}")
    assert list(json.loads(seal_file.read_text())) == ["triton/kernel"]
    assert "note" not in capsys.readouterr().err


def test_a_warm_up_whose_folder_cannot_be_sealed_is_good_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def block_seal(engine: Engine, *arguments: object) -> None:
        Path(os.environ["TRITON_CACHE_DIR"]).with_name(SEAL).mkdir()

    monkeypatch.setattr(CompilingEngine, "warm_up", block_seal)
    session.warm_up(CompilingEngine(random_model()), GenerationOptions(), Phases(), cache_dir=str(tmp_path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "cannot be sealed" in line
