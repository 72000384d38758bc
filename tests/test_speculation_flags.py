"""Speculation as users meet it: flags that say what they do, figures, colours, the proof on their own pair."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

from fastgen import chat, flags, generate
from fastgen.errors import UsageError
from fastgen.lossless import Difference, Proof, own_prompts, prove
from fastgen.speculation import AUTO, require_same_vocabulary
from tests.checkpoint_writers import LLAMA, make_model, write_hf
from tests.models import random_model
from tests.vocabularies import small_sentencepiece

HERE = ["--device", "cpu", "--dtype", "fp32"]
STORY = [*HERE, "--max-new-tokens", "40"]


def text(capsys: pytest.CaptureFixture, *flags: str) -> str:
    assert generate.main([*STORY, *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("quant", [[], ["--quant", "int4"], ["--quant", "int8"]], ids=["plain", "int4", "int8"])
def test_the_story_is_the_same_whoever_drafts(quant: list[str], capsys: pytest.CaptureFixture) -> None:
    expected = text(capsys, *quant)
    assert len(expected.split()) > 20
    for draft in ("embedded", "self:3") if quant else ("embedded", "ngram", "self:3", "none"):
        assert text(capsys, "--draft", draft, *quant) == expected


def test_sampled_samples_are_the_same_and_leviathans_are_others(capsys: pytest.CaptureFixture) -> None:
    sampled = ["--temperature", "0.9", "--seed", "4", "--num-samples", "2"]
    expected = text(capsys, *sampled)
    assert text(capsys, *sampled, "--draft", "embedded", "--speculate", "4") == expected
    assert text(capsys, *sampled, "--draft", "embedded", "--speculate", "4", "--accept", "leviathan") != expected


def test_figures_are_printed_and_documented(capsys: pytest.CaptureFixture) -> None:
    flags = ["--draft", "embedded", "--speculate", "3", "--compare-plain", "--json"]
    document = json.loads(text(capsys, *flags))
    found = document["metrics"]["speculation"]
    assert found["rounds"] == sum(found["accepted"].values()) == found["arms"]["model 3"]
    assert 0.5 < found["acceptance"] <= 1 and len(found["acceptance_by_place"]) == 3
    assert found["draft_ms"] > 0 and found["verify_ms"] > 0 and found["plain_ms_per_token"] > 0
    assert found["same_text"] is True and found["speedup"] > 0
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in found)
    generate.main([*STORY, *flags[:-1]])
    summary = capsys.readouterr().err
    assert "accepted over" in summary and "model 3 x" in summary and "the same text" in summary


def test_accepted_tokens_are_coloured(capsys: pytest.CaptureFixture) -> None:
    coloured = text(capsys, "--draft", "embedded", "--speculate", "3", "--show-accepted")
    assert coloured.count("\x1b[32m") == coloured.count("\x1b[39m") > 15
    assert coloured.replace("\x1b[32m", "").replace("\x1b[39m", "") == text(capsys)


def test_the_proof_runs_on_the_users_own_pair(capsys: pytest.CaptureFixture) -> None:
    out = text(capsys, "--draft", "embedded", "--speculate", "3", "--check-lossless", "3")
    assert out == "drafts 3: 3 texts, 120 tokens, 0 texts differ\nlossless\n"
    found = text(capsys, "--draft", "ngram", "--speculate", "2", "--check-lossless", "2", "--json")
    document = json.loads(found)
    assert document["command"] == "fastgen.generate" and document["lossless"] is True
    (proof,) = document["proofs"]
    assert (proof["count"], proof["texts"], proof["tokens"], proof["differences"]) == (2, 2, 80, [])


@pytest.mark.parametrize(("noise", "status"), [(0.01, 1), (0.5, 0)], ids=["not explained", "explained"])
def test_the_status_says_whether_the_proof_failed(
    noise: float, status: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Difference(text=1, place=7, gap=0.5, noise=noise)
    proof = Proof(count=3, rows=2, texts=2, tokens=80, acceptance=0.5, launches={}, differences=(found,))
    monkeypatch.setattr("fastgen.lossless.prove", lambda *given, **options: iter([proof]))
    check = [*STORY, "--draft", "ngram", "--speculate", "3", "--check-lossless", "2"]
    assert generate.main(check) == status
    out = capsys.readouterr().out
    assert "1 texts differ\n  text 1 from token 7: " in out
    assert ("NOT EXPLAINED" in out, out.endswith("\nlossless\n")) == (status == 1, status == 0)
    assert generate.main([*check, "--json"]) == status
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["lossless"] is (status == 0)
    assert json.loads(line)["proofs"][0]["differences"] == [{"text": 1, "place": 7, "gap": 0.5, "noise": noise}]


def test_the_proofs_texts_are_as_long_as_the_model_has_room_for() -> None:
    target = random_model(max_seq_len=20)
    (proof,) = prove(target, "ngram", own_prompts(target, 2), counts=(3,))
    assert (proof.texts, proof.tokens, proof.differences) == (2, 2 * (20 - 8), ())
    with pytest.raises(UsageError, match="begins texts with 8 tokens, and the model has room for 8"):
        own_prompts(random_model(max_seq_len=8), 1)


GROUPS = (flags.SourceFlags, flags.QuantFlags, flags.RankFlags)
HEEDED = {
    *(field.name for group in GROUPS for field in dataclasses.fields(group)),
    *("compile", "kernels", "kv_cache", "draft", "speculate", "check_lossless", "max_new_tokens", "json", "debug"),
    "interactive",  # refused itself
}
"""Flags of `fastgen.generate` that mean something beside --check-lossless."""


@pytest.mark.parametrize(
    "entry",
    [field for field in dataclasses.fields(generate.GenerateConfig) if field.name not in HEEDED],
    ids=lambda field: field.name,
)
def test_the_proof_refuses_flags_that_it_does_not_heed(entry: dataclasses.Field) -> None:
    value: object = "leviathan"  # a choice of --accept, and as good as any word for the others
    if isinstance(entry.default, bool):
        value = not entry.default
    elif isinstance(entry.default, int | float):
        value = entry.default + 1
    others = {"draft": "ngram", "speculate": "3", "check_lossless": 1, "compile": True}
    given = generate.GenerateConfig(**others, **{entry.name: value})
    name = entry.metadata["negation"] or entry.name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^--{name}: not with --check-lossless, which writes .* of its own$"):
        generate.check_speculation(given)


def test_the_proof_finds_what_is_not_lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen import rounds
    from fastgen.acceptance import accept_equal

    target = random_model()
    prompts = own_prompts(target, 5)
    assert len({tuple(prompt) for prompt in prompts}) == 5
    for proof in prove(target, random_model(1), prompts, counts=(1, 4, AUTO), new_tokens=16):
        assert (proof.texts, proof.tokens, proof.differences) == (5, 80, ())
    monkeypatch.setattr(
        rounds, "accept_equal", lambda choices, drafts, limit: accept_equal(choices, choices[:, :-1], limit)
    )
    (proof,) = prove(target, random_model(1), prompts, counts=(3,), new_tokens=16)
    assert len(proof.differences) == 5
    assert not any(difference.explained for difference in proof.differences)


REFUSED = {
    "--speculate 3": "--speculate: only with a --draft",
    "--accept leviathan": "--accept: only with a --draft",
    "--draft none --compare-plain": "--compare-plain: only with a --draft",
    "--draft ngram --speculate often": "--speculate often: expected a number of tokens, or auto",
    "--draft ngram --speculate 99": "--speculate 99: expected 1 to 15 tokens a round",
    "--draft ngram --accept leviathan": "--accept leviathan: needs a fixed --speculate K",
    "--draft self:x": "--draft self:x: expected self:N",
    "--draft self:0": "--draft self:0: expected self:N",
    "--draft=": '--draft "": expected a model, embedded, ngram, self:N or none',
    "--draft ngram --check-lossless 2 --no-stream": "--no-stream: not with --check-lossless",
    "--draft self:99": "--draft self:99: expected a model, ngram, none, or self:N with N from 1 to 7",
    "--draft ngram --compare-plain --num-samples 2": "--compare-plain: compares one text",
    "--draft ngram --show-accepted --json": "--show-accepted: colours one text as it comes",
    "--draft ngram --check-lossless -1": "--check-lossless -1: expected a number of texts",
}


@pytest.mark.parametrize("given", REFUSED)
def test_flags_that_contradict_or_do_nothing_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if given != "--draft self:99":  # how many layers there are, the model says
        monkeypatch.setattr("fastgen.session.load", None)
    with pytest.raises(UsageError, match=REFUSED[given]):
        generate.main([*STORY, *given.split()])


@pytest.mark.parametrize("given", ["--draft=", "--draft self:x", "--draft ngram --speculate 99"])
def test_a_chat_refuses_them_before_a_model_is_loaded(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.session.load", None)
    with pytest.raises(UsageError, match=REFUSED[given]):
        chat.main([*HERE, *given.split()])


@pytest.mark.parametrize(("ours", "theirs"), [(258, 260), (260, 258)])
def test_a_vocabulary_that_only_begins_like_the_other_is_another(ours: int, theirs: int) -> None:
    target, draft = random_model(vocab_size=260), random_model(1, vocab_size=260)
    for model, size in ((target, ours), (draft, theirs)):
        model.tokenizer.vocab_size = size
        model.tokenizer.special = model.tokenizer.special | {"<a>": 258, "<b>": 259}
    both = [repr("<a>"), "nothing"]
    there, here = both if theirs > ours else both[::-1]
    with pytest.raises(UsageError, match=f"token 258 is {there} there, {here} in the model"):
        require_same_vocabulary(target, draft)


def test_a_chat_speculates(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAMA | {"vocab_size": 512, "max_position_embeddings": 256}
    path = write_hf(tmp_path / "model", config, make_model(config))
    (path / "tokenizer.model").write_bytes(small_sentencepiece())
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    answers = []
    for given in ([], ["--draft", "ngram", "--speculate", "3"], ["--draft", str(path)]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Say yes.\nAgain.\n"))
        assert chat.main([*HERE, "--model", str(path), "--max-new-tokens", "12", *given]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] and answers[0].count("\n") >= 2
