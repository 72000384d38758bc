#!/usr/bin/env python3
"""Time int4 and int8 weights on one GPU beside what its memory allows, and check that they say what they should.

scripts/run scripts/bench_packed.py --json results.json                      stages, steps, the embedded model
scripts/run scripts/bench_packed.py --sweep --models llama-2-7b              try launch shapes first, use the best
scripts/run scripts/bench_packed.py --no-steps --text stories=tinystories.txt --text stories15M.bin=tinystories.txt

A sweep times the four linears of Llama-2-7B's layers as a chain in a CUDA graph, with weights of their own for each of
32 layers. Steps are as in `bench_kernels`, with an int8 head. A text is read through the kernels in steps of 16 tokens
and through PyTorch from the same quantized weights; the greedy tokens of 64 steps of one token are compared with
those that steps of 16 give for the same text.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_kernels
import torch
import torch.nn.functional as F
from bench_kernels import DEVICE, DTYPE, Decoder
from torch import Tensor, nn

from fastgen.kernels import fused, packed_linear, reference
from fastgen.kernels.packed import PackedLinear
from fastgen.kernels.packed_linear import Shape
from fastgen.load import LoadedModel, load_model, use_kernels
from fastgen.model import Transformer
from fastgen.shapes import shape as model_shape

CASES = (
    ("llama-2-7b", 4), ("llama-2-7b", 8), ("llama-3-8b", 4), ("llama-3-8b", 8), ("llama-3.2-1b", 4),
    ("llama-2-70b", 4),
)  # fmt: skip
SWEEP = {
    (4, 1): [(2, 160, 1), (2, 128, 1), (2, 200, 1), (1, 72, 3), (1, 104, 2), (4, 160, 1)],
    (8, 1): [(1, 160, 1), (1, 200, 1), (2, 160, 1), (2, 216, 1), (1, 104, 2), (1, 72, 3)],
    (4, 8): [(2, 190, 1), (4, 210, 1), (1, 112, 2), (2, 112, 2)],
    (8, 8): [(2, 190, 1), (1, 190, 1), (1, 112, 2)],
    (4, 16): [(2, 190, 1), (1, 190, 1)],
    (8, 16): [(1, 190, 1), (2, 220, 1)],
}
"""Tiles, KiB of shared memory and programs on a multiprocessor that are tried, by bits and tokens."""
LAYERS = 32
GREEDY = 64


def random_packed(out: int, width: int, bits: int) -> PackedLinear:
    """A linear whose weights are random bits, with scales that keep activations in range."""
    tiles, units = -(-out // 16), -(-width // 128)
    size = 512 if bits == 8 else 268
    words = torch.randint(-(2**31), 2**31 - 1, (tiles, units, size), dtype=torch.int32, device=DEVICE)
    scales = None
    if bits == 8:
        scales = (torch.rand(tiles, 16, device=DEVICE) * width**-0.5 / 60).to(DTYPE).view(torch.int32)
    else:
        values = (torch.rand(tiles, units, 16, device=DEVICE) * width**-0.5 / 4).to(DTYPE)
        words[:, :, 256:264] = values.view(torch.int32)
        zeros = torch.randint(4, 12, (tiles, units, 16), dtype=torch.uint8, device=DEVICE)
        words[:, :, 264:] = zeros.view(torch.int32)
    return PackedLinear(words, scales, None, out_features=out, in_features=width, dtype=DTYPE)


def sweep(bits: int, limit: float) -> list[dict[str, Any]]:
    """Time the chain in every shape, keep the best in `packed_linear.SHAPES`, and return what was measured."""
    config = model_shape("llama-2-7b")
    rows = []
    calls = {tokens: bench_kernels.stage_calls(config, tokens, fused) for tokens in (1, 8, 16)}
    names = [name for name in calls[1] if name != "head"]
    weights = [[random_packed(*calls[1][name][1], bits) for name in names] for _ in range(LAYERS)]
    size = sum(weight.words.nbytes for layer in weights for weight in layer)
    for index, tokens in enumerate((1, 8, 16)):
        timed = []
        for tiles, memory, programs in SWEEP[bits, tokens]:
            registers = min(168, 65536 // (256 * programs) // 8 * 8)
            choose(bits, index, Shape(tiles, memory, programs, 1000, registers))

            def chain(tokens: int = tokens) -> None:
                for layer in weights:
                    for name, weight in zip(names, layer, strict=True):
                        calls[tokens][name][0](weight)

            seconds = statistics.median(bench_kernels.replay_times(chain, 8))
            timed.append((seconds, packed_linear.SHAPES[bits][index]))
            rows.append({
                "bits": bits, "tokens": tokens, "shape": timed[-1][1], "us": seconds * 1e6,
                "share": size / seconds / 1e9 / limit,
            })  # fmt: skip
            print(f"{rows[-1]}", flush=True)
        choose(bits, index, min(timed)[1])
    return rows


def choose(bits: int, index: int, shape: Shape) -> None:
    """Replace one of the three shapes of a format."""
    shapes = list(packed_linear.SHAPES[bits])
    shapes[index] = shape
    packed_linear.SHAPES[bits] = (shapes[0], shapes[1], shapes[2])


def random_decoder(name: str, bits: int) -> Decoder:
    """A decode step of a model with random packed weights and an int8 head."""
    config = replace(model_shape(name), tie_embeddings=False)
    with torch.device("meta"):
        model = Transformer(config, fused)
    model = model.to(DTYPE)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            packed = random_packed(module.out_features, module.in_features, 8 if path == "lm_head" else bits)
            model.set_submodule(path, packed)
    for path, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=DTYPE, device=DEVICE)
                value = value.fill_(1.0) if "norm" in path else value.normal_(0, 0.02)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.allocate_cache(1, bench_kernels.CAPACITY)
    return Decoder(model.to(DEVICE))


def bench_stages(name: str, bits: int, limit: float) -> dict[str, Any]:
    """Time every stage as a chain over weights that exceed the L2 cache."""
    results = {}
    for stage, (call, size) in bench_kernels.stage_calls(model_shape(name), 1, fused).items():
        width = 8 if stage == "head" else bits
        count = max(3, min(32, (2 << 30) * 8 // (size[0] * size[1] * width)))
        weights = [random_packed(*size, width) for _ in range(count)]
        times = bench_kernels.replay_times(lambda: [call(weight) for weight in weights], 10)  # noqa: B023
        seconds = statistics.median(times) / count
        read = weights[0].words.nbytes
        results[stage] = {"bytes": read, "us": seconds * 1e6, "share": read / seconds / 1e9 / limit}
    return results


def read_text(model: LoadedModel, tokens: list[int], stages: Any, width: int) -> Tensor:
    """Return the logits [tokens, V] in fp32 of a text that is read `width` tokens at a time."""
    transformer = model.transformer
    device = model.placement.device
    transformer.allocate_cache(1, len(tokens) + width)
    keys = torch.arange(len(tokens) + width, device=device)
    logits = []
    for start in range(0, len(tokens), width):
        part = torch.tensor([tokens[start : start + width]], device=device)
        positions = torch.arange(start, start + part.shape[1], device=device)[None]
        length = torch.tensor([start + part.shape[1]], device=device)
        hidden = transformer(part, positions, keys[: start + part.shape[1]], length)
        logits.append(stages.head(hidden, transformer.norm, transformer.lm_head)[0].float())
    return torch.cat(logits)


def perplexity(logits: list[Tensor], texts: list[list[int]]) -> float:
    """Return the perplexity of texts by the logits after each of their tokens."""
    losses = [
        F.cross_entropy(found[:-1], torch.tensor(text[1:], device=found.device), reduction="sum")
        for found, text in zip(logits, texts, strict=True)
    ]
    return float((sum(losses[1:], losses[0]) / sum(len(text) - 1 for text in texts)).exp())


def check_text(source: str, text: Path, quant: str, windows: int) -> dict[str, Any]:
    """Read a text through the kernels and through PyTorch, and compare greedy tokens of 1 and 16 at a time."""
    model = load_model(source, device=DEVICE.type, dtype="bf16", quant=quant)
    width = min(256, model.config.max_seq_len - GREEDY)
    ids = model.tokenizer.encode(text.read_text()[: 8 * width * windows])
    edges = range(0, min(len(ids), (windows + 1) * width), width)
    texts = [ids[a:b] for a, b in pairwise(edges)]
    use_kernels(model, "reference", compile=False)
    slow = perplexity([read_text(model, each, reference, 16) for each in texts], texts)
    use_kernels(model, "fused", compile=False)
    fast = perplexity([read_text(model, each, fused, 16) for each in texts], texts)
    greedy = texts[0][:8]
    while len(greedy) < GREEDY:
        greedy.append(int(read_text(model, greedy, fused, 1)[-1].argmax()))
    alone, together = read_text(model, greedy, fused, 1), read_text(model, greedy, fused, 16)
    return {
        "model": source, "text": text.name, "quant": quant, "tokens": sum(map(len, texts)), "reference": slow,
        "kernels": fast, "ratio": fast / slow, "greedy_equal": torch.equal(alone.argmax(-1), together.argmax(-1)),
        "bits_equal": torch.equal(alone, together),
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Measure what is asked for, print it, write JSON after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({name for name, _ in CASES}))
    parser.add_argument("--sweep", action="store_true", help="try launch shapes first")
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--text", action="append", default=[], metavar="MODEL=FILE", help="texts to read")
    parser.add_argument("--windows", type=int, default=16, help="windows of 256 tokens of a text (default 16)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no part after this time (default 300)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    fused.prepare(DEVICE)
    begun, limit = time.perf_counter(), bench_kernels.read_limit()
    results: dict[str, Any] = {"environment": bench_kernels.environment(), "read_gb_s": limit}

    def part(name: str, measure: Callable[[], Any]) -> None:
        if time.perf_counter() - begun < options.seconds:
            results[name] = measure()
            print(f"{name}: {results[name]}", flush=True)
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")

    if options.sweep:
        for bits in (4, 8):
            part(f"sweep int{bits}", lambda: sweep(bits, limit))  # noqa: B023
    results["shapes"] = packed_linear.SHAPES
    for name, bits in () if options.no_steps else CASES:
        if name in options.models:
            part(f"{name} int{bits}", lambda: bench_kernels.bench_step(random_decoder(name, bits), limit))  # noqa: B023
            part(f"{name} int{bits} stages", lambda: bench_stages(name, bits, limit))  # noqa: B023
    for pair in options.text:
        source, _, text = pair.partition("=")
        for quant in ("int4", "int8"):
            part(f"{pair} {quant}", lambda: check_text(source, Path(text), quant, options.windows))  # noqa: B023


if __name__ == "__main__":
    main()
