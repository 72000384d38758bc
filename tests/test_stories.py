"""The embedded pair is what its cards say: small, coherent, and of one mind on stories that neither was trained on."""

import json
from pathlib import Path

import pytest
import torch

from fastgen.completion import GenerationOptions
from fastgen.engine import Engine
from fastgen.kernels.causal import CausalStages
from fastgen.load import LoadedModel, load_model
from fastgen.model import Transformer
from fastgen.training.objective import measure
from fastgen.training.tokens import encode_documents, read_documents
from fastgen.training.windows import side_by_side

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "fastgen" / "assets"
HELD_OUT = ROOT / "tests" / "data" / "stories_held_out.txt"
"""The last stories of the training text, from the part that was kept for validation."""


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    """The target and its draft, in fp32 on the CPU."""
    target, draft = (load_model(ASSETS / name, device="cpu", dtype="fp32") for name in ("stories", "stories-draft"))
    return target, draft


def parameters(model: LoadedModel) -> int:
    return sum(parameter.numel() for parameter in model.transformer.parameters())


def causal(model: LoadedModel) -> Transformer:
    """The model for whole texts, apart from the one that the engine uses."""
    twin = Transformer(model.config, stages=CausalStages(model.config.n_kv_heads))
    twin.load_state_dict(model.transformer.state_dict())
    return twin


def test_the_pair_is_small_and_shares_a_tokenizer(pair: tuple[LoadedModel, LoadedModel]) -> None:
    target, draft = pair
    assert parameters(target) <= 4_500_000 and parameters(draft) <= 1_000_000
    assert 2048 <= target.tokenizer.vocab_size <= 4096
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (ASSETS / "stories" / name).read_bytes() == (ASSETS / "stories-draft" / name).read_bytes()
    assert {model.checkpoint.dtype for model in pair} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12_000_000


def test_the_pair_agrees_on_stories_that_it_was_not_trained_on(pair: tuple[LoadedModel, LoadedModel]) -> None:
    tokens = encode_documents(read_documents([HELD_OUT]), pair[0].tokenizer)
    rows = side_by_side(tokens, 512)
    target, draft = (causal(model) for model in pair)
    sums, count = measure(draft, target, rows)
    _, divergence, agreement = (sums / count).tolist()
    assert agreement >= 0.75 and divergence < 0.35
    loss = measure(target, None, rows).sums.item() / count
    stated = json.loads((ROOT / "scripts" / "results" / "stories.json").read_text())["shipped"][HELD_OUT.name]
    assert loss == pytest.approx(stated["target_loss"], abs=1e-3)
    assert agreement == pytest.approx(stated["agreement"], abs=2e-3)


def test_the_target_tells_a_story_to_its_end(pair: tuple[LoadedModel, LoadedModel]) -> None:
    engine = Engine(pair[0], max_seq_len=400)
    story = engine.generate(["Once upon a time"], GenerationOptions(max_new_tokens=300))[0]
    assert story.text.startswith(", there was a little girl named Lily. She loved to play outside in the sunshine.")
    assert story.finish_reason == "stop" and story.text.endswith(".") and len(story.tokens) > 100


def test_the_readme_and_the_cards_say_what_was_measured(pair: tuple[LoadedModel, LoadedModel]) -> None:
    found = json.loads((ROOT / "scripts" / "results" / "stories.json").read_text())
    target, draft, shipped = found["target"]["last"], found["draft"]["last"], found["shipped"][HELD_OUT.name]
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size == found["asset_bytes"]
    readme = (ROOT / "README.md").read_text()
    foreign = found["shipped"]["tinystories-v2-head.txt"]
    figures = [
        *(f"{parameters(model):,}" for model in pair), f"{found['draft']['validation_tokens']:,}",
        f"{target['loss']:.4f}", f"{draft['loss']:.4f}", f"{draft['agreement']:.1%}", f"{shipped['target_loss']:.4f}",
        f"{shipped['draft_loss']:.4f}", f"{shipped['agreement']:.1%}", f"{size / 1e6:.2f} MB",
        f"{sum(found['seconds'].values()):.0f} s on one H200", f"{foreign['agreement']:.1%}",
        f"{foreign['target_loss']:.4f} | {foreign['draft_loss']:.4f}",
    ]  # fmt: skip
    assert not [figure for figure in figures if figure not in readme]
    for sample in found["samples"][:2]:
        assert sample in readme.replace("\n> ", " ")
    for name, said in (("stories", f"{shipped['target_loss']:.4f}"), ("stories-draft", f"{shipped['agreement']:.1%}")):
        card = (ASSETS / name / "README.md").read_text()
        assert said in card and f"{len(found['openings'])} openings" in card


def test_transformers_reads_the_pair_alike(pair: tuple[LoadedModel, LoadedModel]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = HELD_OUT.read_text()[:300]
    for name, ours in zip(("stories", "stories-draft"), pair, strict=True):
        tokens = AutoTokenizer.from_pretrained(ASSETS / name)(text).input_ids
        assert tokens == ours.tokenizer.encode(text)
        theirs = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)
        positions = torch.arange(len(tokens))[None]
        logits = causal(ours)(torch.tensor([tokens]), positions, positions[0], torch.tensor([len(tokens)]))
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens])).logits
        torch.testing.assert_close(ours.transformer.logits(logits), expected, rtol=1e-4, atol=2e-3)
