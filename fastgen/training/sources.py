"""Where a run's parts come from: its tokenizer, its tokens, its model and its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.checkpoint.hf_config import read_hf_config
from fastgen.checkpoint.hf_save import hf_config
from fastgen.checkpoint.lazy import Checkpoint
from fastgen.checkpoint.own_tokenizer import own_tokenizer_files
from fastgen.config import ModelConfig
from fastgen.device import Placement
from fastgen.errors import ModelFileError, UsageError
from fastgen.kernels.causal import CausalStages
from fastgen.load import build, resolve
from fastgen.model import Transformer
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.open import MissingTokenizerError, check_vocabulary, open_tokenizer
from fastgen.tokenizer.save import tokenizer_beside
from fastgen.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastgen.tokenizer.settings import Settings
from fastgen.training.tokens import TokenData, check_tokens, encode_documents, read_documents, read_token_file, split
from fastgen.training.vocabulary import train_tokenizer
from quantize.linear import scale_dtype


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and its files for the folder that is written; nothing of both where tokens come without one."""

    tokenizer: Tokenizer | None
    files: dict[str, bytes]


@dataclass(frozen=True)
class GivenModel:
    """A model that a flag names, its stages causal, and the tokenizer that came with it, if any."""

    flag: str
    transformer: Transformer
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.transformer.config


def open_vocabulary(
    documents: Sequence[str], *, train: int | None, path: str | None, models: Sequence[GivenModel]
) -> Vocabulary:
    """Return the tokenizer that is learned from `documents`, or stands at `path`, or is that of the first model.

    Raises `UsageError` for documents without a tokenizer, for a model with another one, and as training one does.
    """
    if train is not None:
        files = train_tokenizer(documents, train)
        return Vocabulary(SentencePieceTokenizer(files["tokenizer.model"], Path("tokenizer.model"), Settings()), files)
    found = Vocabulary(None, {})
    if path is not None:
        found, name = Vocabulary(open_tokenizer(Path(path)), tokenizer_beside(Path(path))), "--tokenizer"
    for model in models:
        if model.tokenizer is None:
            continue
        if found.tokenizer is None:
            found = Vocabulary(model.tokenizer, own_tokenizer_files(model.checkpoint, model.tokenizer))
            name = model.flag
        elif difference := first_difference(found.tokenizer, model.tokenizer):
            raise UsageError(f"{name} and {model.flag} have different tokenizers: {difference}")
    if documents and found.tokenizer is None:
        raise UsageError("the text needs a tokenizer: --train-tokenizer VOCAB learns one, --tokenizer PATH names one")
    return found


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return the first id that does not mean the same to both tokenizers, None if all that both have do."""
    special = [{token: text.encode() for text, token in words.special.items()} for words in (one, other)]
    for token in range(min(one.vocab_size, other.vocab_size)):
        first, second = (
            texts.get(token) or words.token_bytes(token) for texts, words in zip(special, (one, other), strict=True)
        )
        if first != second:
            return f"token {token} is {first!r} in the first, {second!r} in the second"
    return None


def read_texts(paths: Sequence[str]) -> list[str]:
    """Return the documents of the text files, if any; raises `ModelFileError` if there is nothing in them."""
    documents = read_documents([Path(path) for path in paths])
    if paths and not documents:
        raise ModelFileError(f"{', '.join(paths)}: there is no text in it")
    return documents


def load_tokens(
    documents: Sequence[str],
    token_file: str | None,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    share: float,
    context: int,
) -> TokenData:
    """Return the tokens of a file or of documents, checked and divided."""
    source = token_file or "the text"
    if token_file is not None:
        tokens = read_token_file(Path(token_file))
    else:
        assert tokenizer is not None, "documents were checked to come with a tokenizer"
        tokens = encode_documents(documents, tokenizer)
    check_tokens(tokens, vocab_size, source)
    return split(tokens, share, context, source)


def load_teacher(source: str, placement: Placement) -> GivenModel:
    """Return the model to follow, in the training's precision."""
    return _load("--distill-from", source, placement)


def load_start(source: str, placement: Placement) -> GivenModel:
    """Return the model to train on from, trainable, its weights in fp32; raises `UsageError` for a quantized one."""
    start = _load("--init-from", source, Placement(placement.device, torch.float32, "what weights are trained in"))
    if start.checkpoint.formats:
        raise UsageError(f"--init-from {source}: is quantized; give the model that it was made from")
    start.transformer.requires_grad_(True)
    return start


def read_model_config(path: str) -> ModelConfig:
    """Return the config of a `config.json`."""
    return read_hf_config(Path(path))


def check_fit(config: ModelConfig, tokenizer: Tokenizer | None, context: int, teacher: GivenModel | None) -> None:
    """Raise if the model cannot hold the tokenizer's ids or the rows' length, follow the teacher, or be written."""
    hf_config(config, torch.float32)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, Path("the model to train"))
    limit = min(config.max_seq_len, teacher.config.max_seq_len if teacher else context)
    if context > limit:
        raise UsageError(f"--context {context}: the model that is given was made for at most {limit} positions")
    if teacher is not None and teacher.config.vocab_size != config.vocab_size:
        raise UsageError(
            f"--distill-from: its vocabulary has {teacher.config.vocab_size} tokens, the model's {config.vocab_size}: "
            "a model can only follow one with the same vocabulary"
        )


def _load(flag: str, source: str, placement: Placement) -> GivenModel:
    """Return the model at `source`. Unlike `fastgen.load.load_model`, it may have no tokenizer."""
    checkpoint = open_checkpoint(resolve(source))
    try:
        tokenizer = checkpoint.open_tokenizer()
    except MissingTokenizerError:
        tokenizer = None
    transformer = build(
        checkpoint.config, checkpoint.tensors, placement, formats=checkpoint.formats,
        scales=scale_dtype(checkpoint.dtype),
    )  # fmt: skip
    transformer.stages = CausalStages(checkpoint.config.n_kv_heads)
    return GivenModel(flag, transformer, checkpoint, tokenizer)
