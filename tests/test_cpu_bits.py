"""On a CPU the tokens of a quantized model have the same bits decoded and verified, alone and in a batch.

What quantized linears round on their way would make more of the last bits of anything else.
"""

import pytest
import torch
from torch import Tensor

from fastgen.config import ModelConfig
from fastgen.device import choose_placement
from fastgen.kernels import reference
from fastgen.load import LoadedModel, make_scheme, random_model
from fastgen.steps import whole_lanes
from tests.models import TINY

SHAPE = {"dim": 128, "n_heads": 6, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 192}
SHOWN, WIDTH = 37, 16


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    scheme = make_scheme(request.param, group_size=128, symmetric=False, keep=None)
    return random_model(ModelConfig(**(TINY | SHAPE)), choose_placement("cpu", "fp32"), scheme=scheme)


def logits(model: LoadedModel, tokens: Tensor, widths: list[int], *, more: int = 0) -> Tensor:
    """The logits [B, T, V] of what follows `SHOWN` tokens, so many at a time, with room read for `more`."""
    transformer, parts, start = model.transformer, [], 0
    transformer.allocate_cache(len(tokens), 128)
    for width in (SHOWN, *widths):
        end = start + width
        places = torch.arange(start, end).repeat(len(tokens), 1)
        keys = torch.arange(whole_lanes(end + more))
        parts.append(transformer.logits(transformer(tokens[:, start:end], places, keys, places[:, -1] + 1)))
        start = end
    return torch.cat(parts[1:], 1)


@torch.inference_mode()
def test_a_token_has_the_same_bits_decoded_and_verified_alone_and_in_a_batch(model: LoadedModel) -> None:
    tokens = torch.randint(3, 258, (3, SHOWN + WIDTH), generator=torch.Generator().manual_seed(0))
    decoded = logits(model, tokens, [1] * WIDTH)
    for widths in ([2] * 8, [4, 8, 3, 1], [WIDTH]):
        assert torch.equal(logits(model, tokens, widths), decoded), widths
    assert torch.equal(logits(model, tokens, [WIDTH], more=20), decoded)
    for row in range(3):
        assert torch.equal(logits(model, tokens[row : row + 1], [8, 8]), decoded[row : row + 1])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_in_32_bits_tokens_attend_one_by_one(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = reference._attend_one_by_one
    monkeypatch.setattr(
        reference, "_attend_one_by_one", lambda *args, **named: seen.append(1) or attend(*args, **named)
    )
    model = random_model(ModelConfig(**(TINY | SHAPE)), choose_placement("cpu", dtype))
    tokens = torch.randint(3, 258, (1, SHOWN + WIDTH), generator=torch.Generator().manual_seed(0))
    logits(model, tokens, [WIDTH])
    assert bool(seen) == (dtype == "fp32")
