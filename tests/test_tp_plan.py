"""Which rank holds what: nothing is lost or held twice but KV heads, and what is cut keeps its values."""

from dataclasses import replace

import pytest
import torch

from fastgen.config import ModelConfig
from fastgen.errors import UsageError
from fastgen.shapes import SHAPES
from quantize.format import GROUP_SIZES, WeightFormat
from quantize.linear import dequantize_weight, quantize_weight
from quantize.scheme import Scheme
from tests.models import TINY, InMemory, random_weights
from tp.plan import Plan, cut_groups, deal, length, make_plan, split_heads, stretched

SMOLLM2 = ModelConfig(**(TINY | {"dim": 576, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "hidden_dim": 1536}))


def plans(config: ModelConfig, world: int, formats: dict[str, WeightFormat] | None = None) -> list[Plan]:
    return [make_plan(config, formats or {}, world, rank) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", [*SHAPES, "smollm2"])
def test_every_query_head_and_hidden_unit_and_token_is_on_one_rank(name: str, world: int) -> None:
    config = SHAPES.get(name, SMOLLM2)
    parts = plans(config, world) if world <= config.n_heads else []
    for attribute, total in (
        ("heads", config.n_heads),
        ("hidden", config.hidden_dim),
        ("vocabulary", config.vocab_size),
    ):
        spans = [getattr(plan, attribute) for plan in parts]
        assert [index for span in spans for index in range(*span)] == list(range(total if parts else 0))
    group = config.n_heads // config.n_kv_heads
    for plan in parts:
        assert all(plan.kv_heads[0] <= head // group < plan.kv_heads[1] for head in range(*plan.heads))
        assert plan.local().n_heads == length(plan.heads) >= plan.local().n_kv_heads


def test_heads_that_do_not_divide_are_dealt_out_by_whole_kv_heads_or_share_one() -> None:
    assert split_heads(SMOLLM2, 2) == [((0, 3), (0, 1)), ((3, 9), (1, 3))]
    assert split_heads(SMOLLM2, 5) == [
        ((0, 3), (0, 1)), ((3, 4), (1, 2)), ((4, 6), (1, 2)), ((6, 7), (2, 3)), ((7, 9), (2, 3))
    ]  # fmt: skip
    assert [length(heads) for heads, _ in split_heads(SMOLLM2, 9)] == [1] * 9


def test_what_is_dealt_out_differs_by_a_block_at_most() -> None:
    for total, world, block in ((11008, 4, 128), (10, 3, 1), (259, 4, 32), (7, 7, 1)):
        sizes = [length(span) for span in deal(total, world, block)]
        assert sum(sizes) == total and min(sizes) > 0
        assert max(sizes) - min(sizes) < 2 * block


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_every_tensor_make_up_the_whole(world: int) -> None:
    config = ModelConfig(**(TINY | {"vocab_size": 259, "qkv_bias": True, "output_bias": True, "n_heads": 8}))
    weights = random_weights(config)
    sources = {name: InMemory(tensor) for name, tensor in weights.items()}
    parts = [{name: tensor[:] for name, tensor in plan.tensors(sources, {}).items()} for plan in plans(config, world)]
    d, split = config.head_dim, split_heads(config, world)
    for name, tensor in weights.items():
        kind, leaf = name.split(".")[-2:]
        pieces = [part[name] for part in parts]
        if kind == "wqkv":
            for rank, (heads, kv_heads) in enumerate(split):
                own = [range(head * d, head * d + d) for head in range(*heads)]
                own += [range((8 + head) * d, (9 + head) * d) for head in range(*kv_heads)]
                own += [range((10 + head) * d, (11 + head) * d) for head in range(*kv_heads)]
                assert torch.equal(pieces[rank], tensor[[row for rows in own for row in rows]])
        elif kind == "w_gate_up":
            halves = [piece.chunk(2) for piece in pieces]
            assert torch.equal(torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)]), tensor)
        elif kind in ("wo", "w_down") and leaf == "weight":
            assert torch.equal(torch.cat(pieces, 1), tensor)
        elif kind in ("wo", "w_down"):
            assert torch.equal(sum(pieces), tensor)
        elif kind in ("embedding", "lm_head"):
            assert torch.equal(torch.cat(pieces), tensor)
        else:
            assert all(torch.equal(piece, tensor) for piece in pieces)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("columns", [(0, 256), (96, 224), (144, 288), (64, 448), (13, 500), (256, 512)])
def test_int4_columns_keep_their_values_wherever_they_are_cut(
    columns: tuple[int, int], group_size: int, symmetric: bool
) -> None:
    weight_format = WeightFormat(bits=4, group_size=group_size, symmetric=symmetric)
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    stored = quantize_weight("w", weight, weight_format)
    first, last = columns[0] // group_size * group_size, -(-columns[1] // group_size) * group_size
    per = {"weight_packed": 8, "weight_scale": group_size, "weight_zero_point": group_size}
    widened = {leaf: tensor[:, first // per[leaf] : last // per[leaf]] for leaf, tensor in stored.items()}
    cut, cut_format = cut_groups(widened, columns, weight_format)
    found = dequantize_weight(cut, cut_format, torch.float32) if cut_format else cut["weight"]
    assert cut_format is None or cut_format.group_size in GROUP_SIZES
    assert torch.equal(found, dequantize_weight(stored, weight_format, torch.float32)[:, slice(*columns)])


@pytest.mark.parametrize(
    ("changes", "formats", "world", "message"),
    [
        (
            {},
            {},
            5,
            "processes, and the model cannot be split over so many: each needs a head of its own, and it has 4",
        ),
        (
            {"n_heads": 8, "hidden_dim": 512},
            {"layers.0.w_down": WeightFormat(bits=4, group_size=128)},
            8,
            "each needs a part of the 4 groups of 128 in its hidden layer",
        ),
        ({"vocab_size": 3}, {}, 4, "each needs a token of its own, and it has 3"),
    ],
)
def test_too_many_ranks_are_refused_with_the_number_and_the_nearest_that_works(
    changes: dict[str, int], formats: dict[str, WeightFormat], world: int, message: str
) -> None:
    config = ModelConfig(**(TINY | changes))
    with pytest.raises(UsageError, match=f"torchrun started {world} ") as error:
        make_plan(config, formats, world, 0)
    best = {5: 4, 8: 4, 4: 3}[world]
    assert message in str(error.value) and str(error.value).endswith(f"\nStart {best} or fewer")
    for size in range(1, best + 1):
        make_plan(config, formats, size, 0)


@pytest.mark.parametrize(("quant", "group_size"), [("int8", 128), ("int4", 32), ("int4", 128)])
def test_hidden_units_of_quantized_weights_are_dealt_out_by_what_kernels_take_at_a_time(
    quant: str, group_size: int
) -> None:
    config = SHAPES["llama-2-7b"]
    formats = Scheme(quant=quant, group_size=group_size).formats(config)
    assert [length(plan.hidden) for plan in plans(config, 4, formats)] == [2688, 2816, 2688, 2816]
    assert [length(plan.hidden) for plan in plans(config, 2, formats)] == [5504, 5504]
    assert [length(plan.hidden) for plan in plans(config, 4)] == [2752] * 4


def test_hidden_units_that_are_no_whole_number_of_what_kernels_take_differ_by_a_group_at_most() -> None:
    config = replace(SHAPES["llama-2-7b"], hidden_dim=11008 + 32)
    formats = Scheme(quant="int4", group_size=32).formats(config)
    assert [length(plan.hidden) for plan in plans(config, 4, formats)] == [2752, 2752, 2752, 2784]


def test_layers_in_different_groups_are_cut_where_the_widest_end() -> None:
    config = ModelConfig(**(TINY | {"hidden_dim": 640}))
    formats = {f"layers.{layer}.w_down": WeightFormat(bits=4, group_size=32 << 2 * layer) for layer in range(2)}
    assert [length(plan.hidden) for plan in plans(config, 4, formats)] == [128, 128, 128, 256]


def test_words_and_scales_that_stand_for_columns_are_cut_with_them() -> None:
    assert stretched((64, 128), 256, 32) == (8, 16), "words of eight weights"
    assert stretched((64, 128), 256, 4) == (1, 2), "groups"
    assert [stretched(span, 256, 1) for span in ((0, 64), (64, 128), (192, 256))] == [(0, 1)] * 3, "a scale of the row"
