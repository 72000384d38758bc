"""A target and a draft that agree as often as one likes, of any shape, with random weights: for measuring speed.

How fast speculation is hangs on how often the draft is right, and random weights agree on nothing. Here the draft is
the target's first layers with its head, and the later layers add little to what the first have said: the projections
that they write their output with are damped. The less they add, the more the two agree; the work that the target does
stays what it is.

    target = random_model(shape("llama-2-7b"), placement)
    damp(target, layers=2, factor=0.01)
    draft = first_layers(target, 2)
"""

from dataclasses import replace
from typing import Any, cast

from fastgen.load import LoadedModel


def first_layers(target: LoadedModel, layers: int) -> LoadedModel:
    """Return the model of the target's first layers and its head, with the target's weights and a KV cache of its
    own."""
    return replace(target, transformer=target.transformer.first_layers(layers, own_cache=True))


def damp(target: LoadedModel, *, layers: int, factor: float) -> None:
    """Multiply what the layers behind the first `layers` write, in place: weights, or where they are quantized scales.

    On a CPU quantized linears keep copies of their scales; there, damp before quantizing.
    """
    for block in target.transformer.layers[layers:]:
        for name in ("wo", "w_down"):
            linear = block.get_submodule(name)
            parameters = dict(linear.named_parameters())
            if "words" in parameters:  # in the kernels' layout
                cast(Any, linear).multiply(factor)
            else:
                (parameters["weight_scale"] if "weight_scale" in parameters else parameters["weight"]).mul_(factor)
