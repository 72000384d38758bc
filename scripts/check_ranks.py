"""Tensor parallelism, checked against one device: logits, greedy texts, speculated and batched ones, and both.

    python -m torch.distributed.run --nproc-per-node 4 scripts/check_ranks.py --output FILE
    python -m torch.distributed.run --nproc-per-node 2 scripts/check_ranks.py --device cpu --kernels reference

`--formats` names some of them only: plain, int8, "int4 g32", "int4 g128", "int4 g64 symmetric".

The model is the embedded one, in every format. The measure is the same model in fp32 on one device, E the largest error
of a logit there in the precision that the ranks have: the ranks' may be at most 2 E off, and a token that they choose
at most 4 E less likely than the likeliest. `--check-ranks` is on throughout: all ranks have the same bits.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.device import describe
from fastgen.engine import Engine
from fastgen.kernels.launch import MAX_TOKENS
from fastgen.load import LoadedModel, load_model, use_kernels
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.report import versions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from tp.dist import Ranks, join
from tp.watch import process_watch

FORMATS: dict[str, dict[str, object]] = {
    "plain": {},
    "int8": {"quant": "int8"},
    "int4 g32": {"quant": "int4", "group_size": 32},
    "int4 g128": {"quant": "int4"},
    "int4 g64 symmetric": {"quant": "int4", "group_size": 64, "symmetric": True},
}
PROMPT = "Once upon a time, there was a little girl named Lily."
NEW_TOKENS = 96

CPU_ERROR = {False: 1e-4, True: 0.01}
"""Of a logit on a CPU, where weights are quantized: kernels there round activations to 16 bits, a part's otherwise than
the whole's. Else fp32's own."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one format; `error` and `shortfall` in logits, beside `allowed` = 2 E and 4 E."""

    format: str
    error: float
    shortfall: float
    allowed: float
    tokens_as_alone: int
    speculated_as_plain: bool
    batch_of_three_ends: bool

    @property
    def is_right(self) -> bool:
        """Whether the ranks compute what one device does."""
        close = self.error <= self.allowed and self.shortfall <= 2 * self.allowed
        return close and self.speculated_as_plain and self.batch_of_three_ends


def main() -> None:
    """Check every format, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--kernels", default="fused", choices=("fused", "reference"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    ranks, device = join(arguments.device)
    findings: list[Finding] = []
    for name in arguments.formats:
        findings.append(check(name, ranks, device, arguments.kernels))
        if ranks.leads:
            print(findings[-1], flush=True)
    if ranks.leads:
        place = torch.device(device or "cpu")
        document = {"world_size": ranks.world, "kernels": arguments.kernels, "device": describe(place)}
        document |= {"versions": versions(), "findings": [vars(finding) for finding in findings]}
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    ranks.wait()
    wrong = [finding.format for finding in findings if not finding.is_right]
    assert not wrong, f"rank {ranks.rank}: {', '.join(wrong)} differ from one device"


def check(name: str, ranks: Ranks, device: str | None, kernels: str) -> Finding:
    """Compare the ranks' model in one format with one device's."""

    def load(source: str = "stories", **changes: object) -> LoadedModel:
        quant = FORMATS[name] if source == "stories" else {}
        model = load_model(source, device=device, **(quant | changes))
        use_kernels(model, kernels if model.placement.dtype != torch.float32 else "reference", compile=True)
        return model

    exact, alone = load(dtype="fp32"), load()
    together = load(ranks=ranks, check_ranks=True)
    draft = load("stories-draft", ranks=ranks)
    greedy = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    (answer,) = engine(together).generate([PROMPT], greedy)
    (single,) = engine(alone).generate([PROMPT], greedy)
    speculating = SpeculativeEngine(
        together, Speculation(draft=draft, count=3), max_seq_len=256, compile=on_gpu(together)
    )
    (speculated,) = speculating.generate([PROMPT], greedy)
    sampled = GenerationOptions(
        max_new_tokens=24, ignore_eos=True, sampling=SamplingOptions(temperature=0.8, top_k=40, top_p=0.95)
    )
    drafting = SpeculativeEngine(  # 3 x 8 tokens: more than kernels take, so torch.compile has the step
        together, Speculation(draft=draft, count=7), batch=3, max_seq_len=256, compile=on_gpu(together)
    )
    texts = [  # ranks that differ raise
        *engine(together, batch=3).generate([PROMPT] * 3, sampled),
        *drafting.generate([PROMPT] * 3, sampled),
    ]

    text = [*answer.prompt_tokens, *answer.tokens]
    wanted, own, found = (logits(model, text) for model in (exact, alone, together))
    allowed = max(2 * float((own - wanted).abs().max()), 0.0 if on_gpu(alone) else CPU_ERROR[bool(FORMATS[name])])
    first = len(answer.prompt_tokens) - 1
    due = wanted[first:-1]
    chosen = due.gather(1, torch.tensor(answer.tokens, device=due.device)[:, None])[:, 0]
    return Finding(
        format=name,
        error=float((found - wanted).abs().max()),
        shortfall=float((due.amax(1) - chosen).max()),
        allowed=allowed,
        tokens_as_alone=next(
            (at for at, pair in enumerate(zip(answer.tokens, single.tokens, strict=True)) if pair[0] != pair[1]),
            NEW_TOKENS,
        ),
        speculated_as_plain=speculated.tokens == answer.tokens,
        batch_of_three_ends=all(len(completion.tokens) == 24 for completion in texts),
    )


def engine(model: LoadedModel, batch: int = 1) -> Engine:
    """Return an engine that decodes in CUDA graphs, where there is CUDA."""
    return Engine(model, batch=batch, max_seq_len=256, compile=on_gpu(model))


def on_gpu(model: LoadedModel) -> bool:
    """Whether a model computes on a GPU."""
    return model.placement.device.type == "cuda"


@torch.inference_mode()
def logits(model: LoadedModel, text: list[int]) -> Tensor:
    """Return the logits [T, V] behind every token of a text, fed in chunks that the decode kernels take."""
    device = model.placement.device
    tokens = torch.tensor(text, device=device)
    model.transformer.allocate_cache(1, 512)
    lengths, parts = torch.tensor([len(text)], device=device), []
    for start in range(0, len(text), MAX_TOKENS):
        positions = torch.arange(start, min(start + MAX_TOKENS, len(text)), device=device)
        keys = torch.arange(int(positions[-1]) + 1, device=device)
        hidden = model.transformer(tokens[None, positions], positions[None], keys, lengths)
        parts.append(model.transformer.logits(hidden)[0])
    return torch.cat(parts)


if __name__ == "__main__":
    with process_watch():
        main()
