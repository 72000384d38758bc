"""A model's int4 and int8 linears in the layout of the CUDA kernels, for `fastgen.kernels.fused`.

    pack_linears(transformer)       # once, after it is loaded; on the device, linear by linear

The layout that is loaded and saved (`quantize.int4`, `quantize.int8`) is freed as the packed one is made, so a model
needs one linear's bytes beside its own. This module imports Triton.
"""

from torch import Tensor, nn

from fastgen.kernels.packed import PackedLinear, pack_int4, pack_int8
from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear


def pack_linears(model: nn.Module) -> None:
    """Replace every `Int4Linear` and `Int8Linear` of a model on CUDA by a `PackedLinear` of the same weights."""
    names = [name for name, module in model.named_modules() if isinstance(module, Int4Linear | Int8Linear)]
    for name in names:  # whoever held the modules would keep their weights until all are packed
        model.set_submodule(name, _packed(model.get_submodule(name)))


def _packed(linear: nn.Module) -> PackedLinear:
    if isinstance(linear, Int4Linear):
        zero_point, bias = _data(linear.weight_zero_point), _data(linear.bias)
        return pack_int4(linear.weight_packed.data, linear.weight_scale.data, zero_point, bias)
    assert isinstance(linear, Int8Linear), "a linear of one of the two formats"
    return pack_int8(linear.weight.data, linear.weight_scale.data, _data(linear.bias))


def _data(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.data
