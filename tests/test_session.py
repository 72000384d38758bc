"""What flags say reaches the models that they are about; a draft that cannot be had is refused before all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import chat, cli, generate, session
from fastgen.errors import UsageError
from fastgen.generate import GenerateConfig
from fastgen.load import ASSETS, LoadedModel, load_model
from tests.checkpoint_writers import LLAMA, make_model, write_hf, write_llama2c, write_meta
from tests.models import random_model
from tests.vocabularies import small_sentencepiece
from tp.dist import Ranks
from tp.place import Place

CONFIG = LLAMA | {"vocab_size": 512, "max_position_embeddings": 256}


class TwoRanks(Ranks):
    """The first of two processes, the other of which sees what it sees."""

    def __init__(self) -> None:
        super().__init__(Place(rank=0, world=2, local=0))

    def any(self, value: bool) -> bool:
        return value


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun, with two processes."""
    monkeypatch.setattr(session, "join", lambda device, timeout: (TwoRanks(), device))


def config(**given: Any) -> GenerateConfig:
    return GenerateConfig(**({"device": "cpu", "dtype": "fp32"} | given))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without a tokenizer, which lies in a folder of its own."""
    path = tmp_path_factory.mktemp("target")
    (path / "words").mkdir()
    (path / "words" / "tokenizer.model").write_bytes(small_sentencepiece())
    return write_hf(path / "model", CONFIG, make_model(CONFIG))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "hf": lambda folder: write_hf(folder / "draft", CONFIG, make_model(CONFIG, seed=1)),
    "llama2.c": lambda folder: write_llama2c(folder / "draft.bin", CONFIG, make_model(CONFIG, seed=1)),
    "meta": lambda folder: write_meta(folder / "draft", CONFIG, make_model(CONFIG, seed=1)),
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_draft_without_a_tokenizer_takes_the_targets(
    form: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = str(target.parent / "words")
    flags = ["--model", str(target), "--tokenizer", words, "--device", "cpu", "--dtype", "fp32", "--max-new-tokens"]
    draft = WRITERS[form](tmp_path)
    assert generate.main([*flags, "8"]) == 0
    plain = capsys.readouterr().out
    assert generate.main([*flags, "8", "--draft", str(draft), "--speculate", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and f"--draft {draft} has no tokenizer of its own" in err


def test_a_draft_with_a_tokenizer_keeps_it(capsys: pytest.CaptureFixture) -> None:
    target = random_model()
    draft = session.load_draft("stories-draft", config(draft="embedded"), target, cli.Phases())
    assert draft.tokenizer is not target.tokenizer and draft.tokenizer.vocab_size == 2048
    assert "no tokenizer" not in capsys.readouterr().err


def test_a_targets_tokenizer_that_is_too_large_for_the_draft_is_refused(tmp_path: Path) -> None:
    small = CONFIG | {"vocab_size": 100}
    draft = write_hf(tmp_path / "draft", small, make_model(small))
    with pytest.raises(
        UsageError, match=r"--draft .*/draft: it has no tokenizer, and 100 rows .* for the model's 258 "
    ):
        session.load_draft(str(draft), config(draft=str(draft)), random_model(), cli.Phases())


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_draft_has_the_precision_of_the_target(name: str, dtype: torch.dtype) -> None:
    draft = session.load_draft("stories-draft", config(draft="embedded", dtype=name), random_model(), cli.Phases())
    assert draft.placement.dtype == draft.transformer.embedding.weight.dtype == dtype


def test_ranks_are_compared_where_that_was_asked_for(two_ranks: None) -> None:
    for asked in (False, True):
        model = session.load(config(model="stories", check_ranks=asked), cli.Phases())
        assert model.transformer.vocabulary._check is asked


def refuse_to_load(*arguments: object, **options: object) -> LoadedModel:
    raise AssertionError("the target is loaded")


@pytest.mark.parametrize("command", [generate.main, chat.main])
def test_a_draft_that_cannot_be_split_is_refused_before_the_target_is_loaded(
    command: Callable[[list[str]], int], two_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_head = CONFIG | {"num_attention_heads": 1, "num_key_value_heads": 1}
    draft = write_hf(tmp_path / "draft", one_head, make_model(one_head))
    monkeypatch.setattr(session, "load_model", refuse_to_load)
    told = rf"--draft {draft}: .* 2 processes, .* it has 1\nStart 1 or fewer, or choose another draft$"
    with pytest.raises(UsageError, match=told) as error:
        command(["--device", "cpu", "--draft", str(draft)])
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("draft", ["embedded", "stories", "ngram", "self:2", "none", None])
def test_a_draft_that_can_be_split_is_none_to_refuse(draft: str | None, two_ranks: None) -> None:
    session.check_draft(config(draft=draft), cli.Phases())


def test_no_name_is_not_the_models_name() -> None:
    assert session.find(config(), cli.Phases()) == ASSETS / "stories"
    assert session.find(config(), cli.Phases(), "") == Path()


@pytest.mark.parametrize("timeout", ["inf", "-inf", "nan", "1e300", "0.5", "604801"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout: str) -> None:
    with pytest.raises(UsageError, match=r"--timeout \S+: expected 1 to 604800 seconds"):
        session.join_ranks(config(timeout=float(timeout)))


def test_both_engines_of_a_comparison_keep_what_they_compile_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str | None] = []
    monkeypatch.setattr(session, "warm_up", lambda *given, cache_dir=None: folders.append(cache_dir))
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)  # where it is kept is all that is asked
    flags = ["--device", "cpu", "--dtype", "fp32", "--draft", "self:1", "--speculate", "1", "--max-new-tokens", "2"]
    assert generate.main([*flags, "--compare-plain", "--compile", "--cache-dir", str(tmp_path)]) == 0
    assert folders == [str(tmp_path)] * 2


def test_a_model_without_a_tokenizer_still_says_how_to_name_one(target: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer names one elsewhere"):
        load_model(target, device="cpu")
