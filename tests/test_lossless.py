"""Greedy texts with speculation are plain decoding's, token for token, in fp32: the whole proof, and a sample of it.

The whole proof is 1,000 texts of 64 tokens for every number of drafts, for every kind of draft and of target
(`scripts/prove_lossless.py`); a text may differ only where the two best logits lie no further apart than rounding.
"""

import json
from itertools import product
from pathlib import Path

import pytest

from scripts.prove_lossless import DRAFTS, main

PAIRS = [*product(["none"], DRAFTS), ("int8", "embedded"), ("int4", "embedded")]


def prove(folder: Path, quant: str, draft: str, *flags: str) -> list[dict]:
    """Run the cells of a pair and return their records; every difference must be explained."""
    cells = ["--quant", quant, "--drafts", draft, "--output", str(folder / "proof.json"), *flags]
    assert main(cells) == 0
    return json.loads((folder / "proof.json").read_text())["records"]


@pytest.mark.parametrize(("quant", "draft"), [("none", "embedded"), ("none", "ngram"), ("int4", "embedded")])
def test_a_sample_of_texts_is_plain_decodings(quant: str, draft: str, tmp_path: Path) -> None:
    (record,) = prove(tmp_path, quant, draft, "--speculate", "5", "--texts", "20")
    assert (record["texts"], record["tokens"], record["differ"]) == (20, 1280, 0)
    assert record["acceptance"] > 0.03, "drafts were accepted, and could have done harm"


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("quant", "draft"), PAIRS)
def test_a_thousand_texts_are_plain_decodings_at_every_number_of_drafts(quant: str, draft: str, tmp_path: Path) -> None:
    records = prove(tmp_path, quant, draft)
    assert [record["drafts"] for record in records] == [*range(1, 9), "auto"]
    assert {(record["texts"], record["tokens"], record["differ"]) for record in records} == {(1000, 64_000, 0)}
