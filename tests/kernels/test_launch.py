"""How kernels are launched: the table of shapes, and how a shape is made to fit a GPU and a weight."""

import pytest
import torch

from fastgen.kernels import launch, product
from fastgen.kernels.launch import Shape

STAGES = {"linear_add", "norm_swiglu", "norm_linear", "head"}


def weight(rows: int, width: int) -> torch.Tensor:
    return torch.empty(rows, width, device="meta", dtype=torch.bfloat16)


def test_the_table_has_three_shapes_for_every_stage_of_a_gpu() -> None:
    assert launch.table(), "there are GPUs"
    for gpu, stages in launch.table().items():
        assert gpu.startswith("NVIDIA ") and set(stages) == STAGES
        for shapes in stages.values():
            assert len(shapes) == len(launch.DEFAULT)
            for shape in shapes:
                assert min(shape.per_processor, shape.tiles, shape.depth) >= 1 and 0 <= shape.claimed < 100, shape


def test_one_few_and_many_tokens_have_a_shape_each() -> None:
    assert [launch.column(tokens) for tokens in (1, 2, 8, 9, 16)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("width", [64, 4096, 28672])
def test_a_ring_is_as_deep_as_processor_memory_allows(width: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def depth(processor: int, shape: Shape) -> int:
        monkeypatch.setattr(launch, "processor_memory", lambda device: processor)
        return launch.fitted(shape, weight(1 << 17, width), tokens, 1 << 17).options["DEPTH"]

    for shape in (Shape(1, 1, 40, 0), Shape(2, 1, 40, 0), Shape(2, 2, 40, 0)):
        a_unit = product.WARPS * shape.tiles * product.LINES * 512
        deep, deeper = depth(164 << 10, shape), depth(228 << 10, shape)
        assert 1 <= deep <= deeper and deep * a_unit * shape.per_processor <= 164 << 10
        assert deeper - deep == pytest.approx((64 << 10) / shape.per_processor / a_unit, abs=1), "all of it is used"
    assert depth(228 << 10, Shape(1, 1, 3, 0)) == 3, "but no deeper than the shape says"


def test_a_ring_is_no_deeper_than_a_programs_rows_take() -> None:
    rows, shape = 40, Shape(1, 1, 5, 0)  # on two multiprocessors, so 20 rows a program, in two blocks
    assert launch.fitted(shape, weight(rows, product.WIDE), 1, rows).options["DEPTH"] == 2
    assert launch.fitted(shape, weight(rows, 2 * product.WIDE), 1, rows).options["DEPTH"] == 4


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rows", [1, 37, 4096, 32003])
@pytest.mark.parametrize("shape", [Shape(1, 1, 2, 0), Shape(2, 2, 2, 20), Shape(1, 1, 5, 60)])
def test_all_rows_are_shared_out_or_claimed_by_blocks(shape: Shape, rows: int, halves: int) -> None:
    launched = launch.fitted(shape, weight(halves * rows, 1024), 1, rows)
    (programs,), span = launched.grid, 16 * shape.tiles // halves
    assert 1 <= programs <= max(1, -(-rows // span))
    assert launched.tiles * 16 // halves >= rows and launched.tiles % shape.tiles == 0
    if launched.claims is None:
        assert launched.own == rows
        return
    blocks, left = divmod(launched.own, programs * span)
    assert left == 0 and shape.claimed / 100 * rows <= rows - launched.own
    assert blocks > product.blocks_ahead(launched.options["DEPTH"], 2), "the copies never wait for a claim"


def test_few_rows_are_not_claimed() -> None:
    shape = Shape(1, 1, 5, 20)
    assert launch.fitted(shape, weight(100, 1024), 1, 100).claims is None
    assert launch.fitted(shape, weight(1000, 1024), 1, 1000).claims is not None
