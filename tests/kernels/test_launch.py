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
                assert min(shape.per_processor, shape.tiles, shape.depth) >= 1 and shape.lead >= 0, shape


def test_one_few_and_many_tokens_have_a_shape_each() -> None:
    assert [launch.column(tokens) for tokens in (1, 2, 8, 9, 16)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("width", [64, 4096, 28672])
def test_a_ring_is_as_deep_as_processor_memory_allows(width: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def depth(processor: int, shape: Shape) -> int:
        monkeypatch.setattr(launch, "processor_memory", lambda device: processor)
        return launch.fitted(shape, weight(4096, width), tokens, 4096).options["DEPTH"]

    for shape in (Shape(1, 1, 40, 0), Shape(2, 1, 40, 0), Shape(2, 2, 40, 0)):
        a_unit = product.WARPS * shape.tiles * product.LINES * 512
        deep, deeper = depth(164 << 10, shape), depth(228 << 10, shape)
        assert 1 <= deep <= deeper and deep * a_unit * shape.per_processor <= 164 << 10
        assert deeper - deep == pytest.approx((64 << 10) / shape.per_processor / a_unit, abs=1), "all of it is used"
    assert depth(228 << 10, Shape(1, 1, 3, 0)) == 3, "but no deeper than the shape says"


@pytest.mark.parametrize("rows", [1, 37, 4096, 32003])
@pytest.mark.parametrize("shape", [Shape(1, 1, 2, 0), Shape(2, 2, 2, 1000)])
def test_tiles_are_enough_for_all_rows_and_shares_stay_positive(shape: Shape, rows: int) -> None:
    launched = launch.fitted(shape, weight(rows, 512), 1, rows)
    (programs,) = launched.grid
    assert 1 <= programs <= max(1, -(-rows // (16 * shape.tiles)))
    assert launched.tiles(rows) * 16 >= rows and launched.tiles(rows) % (programs * shape.tiles) == 0
    assert 0 <= launched.lead <= rows / (4 * programs), "a share keeps more than half of its rows"
