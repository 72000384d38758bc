"""Which linears of a Hugging Face folder are quantized, and how, by whichever method its description names.

The description is `quantization_config` in `config.json`, or a file of its own that early tools of GPTQ and AWQ write.
"""

from collections.abc import Mapping
from pathlib import Path

from fastgen.checkpoint.awq import awq_linears
from fastgen.checkpoint.compressed_tensors import compressed_linears
from fastgen.checkpoint.fields import Fields
from fastgen.checkpoint.gptq import gptq_linears
from fastgen.checkpoint.integers import StoredLinear
from fastgen.checkpoint.lazy import LazyTensor
from fastgen.checkpoint.names import HF, linear_shapes
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from fastgen.files import naming
from fastgen.json_file import read_json

METHODS = ("compressed-tensors", "gptq", "awq")
OWN_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}


def stored_linears(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], description: Path, weights: Path
) -> tuple[Mapping[str, LazyTensor], dict[str, StoredLinear]]:
    """Return the tensors that are to be assembled, and the linears that are quantized among them.

    `description` is the `config.json`, `weights` the file or index of `tensors`. Raises `ModelFileError` for a method
    or a form that is not supported, by name.
    """
    found, source = read_json(description).get("quantization_config"), description
    method = found.get("quant_method") if isinstance(found, dict) else None
    if found is None:
        beside = [(kind, description.with_name(name)) for kind, name in OWN_FILES.items()]
        present = [(kind, path) for kind, path in beside if path.exists()]
        if not present:
            return tensors, {}
        method, source = present[0]
        found = read_json(source)
    if not isinstance(found, dict) or method not in METHODS:
        raise ModelFileError(
            f"{source}: quantization_config: weights by {method!r:.50} are not supported; expected those of "
            f"{', '.join(METHODS)}"
        )
    shapes = linear_shapes(config, HF)
    if method == "compressed-tensors":
        return tensors, compressed_linears(found, shapes, tensors, source)
    fields = Fields(found, "quantization_config: " if source == description else "")
    with naming(source):
        stored = (
            awq_linears(fields, shapes, tensors) if method == "awq" else gptq_linears(fields, shapes, tensors, weights)
        )
    return _without_empty_biases(tensors, {name: shapes[name] for name in stored}, config), stored


def _without_empty_biases(
    tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, int]], config: ModelConfig
) -> Mapping[str, LazyTensor]:
    """Return `tensors` without the biases of zeros that early tools gave to the linears of models that have none."""
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        return tensors
    biases = {f"{name}.bias": (rows,) for name, (rows, _) in shapes.items() if f"{name}.bias" in tensors}
    empty = {name for name, shape in biases.items() if tensors[name].shape == shape and not tensors[name][:].any()}
    return {name: tensor for name, tensor in tensors.items() if name not in empty}
