"""A model's int4 and int8 linears in the layout of the CUDA kernels, for `fastgen.kernels.fused`.

    pack_linears(transformer)       # once, after it is loaded; on the device, linear by linear

The layout that is loaded and saved (`quantize.int4`, `quantize.int8`) is freed as the packed one is made, so a model
needs one linear's bytes beside its own. This module imports Triton.
"""

from torch import nn

from fastgen.kernels.packed import pack_int4, pack_int8
from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear


def pack_linears(model: nn.Module) -> None:
    """Replace every `Int4Linear` and `Int8Linear` of a model on CUDA by a `PackedLinear` of the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Linear):
            scale, zero_point = module.weight_scale.data, module.weight_zero_point
            bias = None if module.bias is None else module.bias.data
            zero_point = None if zero_point is None else zero_point.data
            model.set_submodule(name, pack_int4(module.weight_packed.data, scale, zero_point, bias))
        elif isinstance(module, Int8Linear):
            bias = None if module.bias is None else module.bias.data
            model.set_submodule(name, pack_int8(module.weight.data, module.weight_scale.data, bias))
