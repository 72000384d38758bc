#!/usr/bin/env python3
"""The proof that speculation loses nothing, over many cells: `scripts/run scripts/prove_lossless.py --output FILE`.

A cell is a target, a draft and a number of drafts: so many greedy texts with speculation beside plain decoding's, token
for token (`fastgen.lossless`). A cell that FILE holds already, of as many texts, is not run again, so a run that was
ended goes on where it was. `tests/test_lossless.py` runs the same cells.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen import cli
from fastgen.device import describe
from fastgen.load import LoadedModel, load_model, random_model, use_kernels
from fastgen.lossless import Proof, own_prompts, prove
from fastgen.report import versions
from fastgen.speculation import AUTO

COUNTS = (*range(1, 9), AUTO)
DRAFTS = ("embedded", "same", "self", "int8", "int4", "ngram", "random")
NEW_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells, print and write each as it comes; returns 1 if a difference is more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="stories", help="as --model; the embedded draft is that of stories")
    parser.add_argument("--tokenizer")
    parser.add_argument("--quant", nargs="+", choices=("none", "int8", "int4"), default=["none"])
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=list(DRAFTS))
    parser.add_argument("--speculate", nargs="+", default=[str(count) for count in COUNTS])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rows", type=int, help="texts at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", choices=("auto", "reference", "fused"), default="auto")
    parser.add_argument("--output", type=Path, required=True)
    config = parser.parse_args(argv)
    records = json.loads(config.output.read_text())["records"] if config.output.exists() else []
    for row in measure(config, {key(record) for record in records}):
        records.append(row)
        config.output.write_text(json.dumps({"records": records}, indent=1) + "\n")
        print(
            *(f"{name}={row[name]}" for name in ("target", "format", "draft", "drafts", "texts", "differ")), flush=True
        )
    return int(any(record["differ"] > record["explained"] for record in records))


def key(record: dict[str, Any]) -> tuple[object, ...]:
    """Return what tells a cell from others."""
    names = ("target", "quant", "draft", "drafts", "compiled", "texts", "dtype")
    return *(record[name] for name in names), record.get("kernels", "auto")


def measure(config: argparse.Namespace, done: set[tuple[object, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the record of every cell that is not done."""
    for quant in config.quant:
        target = load(config, None if quant == "none" else quant)
        prompts = own_prompts(target, config.texts)
        for name in config.drafts:
            cell = {"target": config.target, "quant": quant, "draft": name, "compiled": config.compile}
            cell |= {"texts": config.texts, "dtype": config.dtype, "kernels": config.kernels}
            counts = [count if count == AUTO else int(count) for count in config.speculate]
            left = [count for count in counts if key(cell | {"drafts": count}) not in done]
            if not left:
                continue
            proofs = prove(
                target, draft_of(name, target, config), prompts, counts=left, new_tokens=NEW_TOKENS, rows=config.rows,
                compile=config.compile,
            )  # fmt: skip
            for proof in proofs:
                yield cell | record(target, proof)


def load(config: argparse.Namespace, quant: str | None) -> LoadedModel:
    """Return the target with weights of some format."""
    place = {"device": config.device, "dtype": config.dtype}
    return ready(load_model(config.target, tokenizer=config.tokenizer, quant=quant, **place), config)


def ready(model: LoadedModel, config: argparse.Namespace) -> LoadedModel:
    """Return the model with the kernels that were asked for."""
    use_kernels(model, config.kernels, compile=config.compile)
    return model


def draft_of(name: str, target: LoadedModel, config: argparse.Namespace) -> LoadedModel | str:
    """Return a kind of draft: the embedded one, the target's own weights (in some format), its first half, text that
    repeats itself, or random weights of its shape."""
    if name == "embedded":
        return ready(load_model("stories-draft", device=config.device, dtype=config.dtype), config)
    if name == "self":
        return f"self:{len(target.transformer.layers) // 2}"
    if name == "ngram":
        return name
    if name == "random":
        stranger = random_model(target.config, target.placement, seed=1)
        return ready(replace(stranger, tokenizer=target.tokenizer), config)
    return load(config, None if name == "same" else name)


def record(target: LoadedModel, proof: Proof) -> dict[str, Any]:
    """Return what a cell gave."""
    differences = proof.differences
    return {
        "format": target.format,
        "drafts": proof.count,
        "rows": proof.rows,
        "tokens": proof.tokens,
        "differ": len(differences),
        "explained": sum(difference.explained for difference in differences),
        "gaps": [[difference.gap, difference.noise] for difference in differences],
        "acceptance": proof.acceptance,
        "launches": proof.launches,
        "device": describe(target.placement.device),
        "versions": versions(),
    }


if __name__ == "__main__":
    cli.run(main, prog="prove_lossless")
