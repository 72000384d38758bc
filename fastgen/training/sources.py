"""Where a run's parts come from: its tokenizer, its tokens, its model and its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.checkpoint.hf_config import read_hf_config
from fastgen.config import ModelConfig
from fastgen.device import Placement
from fastgen.errors import ModelFileError, UsageError
from fastgen.kernels.causal import CausalStages
from fastgen.load import LoadedModel, load_model
from fastgen.model import Transformer
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.open import check_vocabulary, open_tokenizer
from fastgen.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastgen.tokenizer.settings import Settings
from fastgen.training.tokens import (
    TokenData,
    check_tokens,
    encode_documents,
    read_documents,
    read_token_file,
    split,
    write_token_file,
)
from fastgen.training.vocabulary import tokenizer_files, train_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and its files for the folder that is written; nothing of both where tokens come without one."""

    tokenizer: Tokenizer | None
    files: dict[str, bytes]


def open_vocabulary(
    documents: Sequence[str], *, train: int | None, path: str | None, models: Sequence[LoadedModel]
) -> Vocabulary:
    """Return the tokenizer that is learned from `documents`, or stands at `path`, or is that of the first model.

    Raises `UsageError` for documents without a tokenizer, and as training one does.
    """
    if train is not None:
        files = train_tokenizer(documents, train)
        return Vocabulary(SentencePieceTokenizer(files["tokenizer.model"], Path("tokenizer.model"), Settings()), files)
    if path is not None:
        return Vocabulary(open_tokenizer(Path(path)), tokenizer_files(Path(path)))
    if models:
        return Vocabulary(models[0].tokenizer, tokenizer_files(models[0].checkpoint.path))
    if documents:
        raise UsageError("the text needs a tokenizer: --train-tokenizer VOCAB learns one, --tokenizer PATH names one")
    return Vocabulary(None, {})


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
    keep: str | None = None,
) -> TokenData:
    """Return the tokens of a file or of documents, checked and divided; `keep` is a token file to write them to."""
    source = token_file or "the text"
    if token_file is not None:
        tokens = read_token_file(Path(token_file))
    else:
        assert tokenizer is not None, "documents were checked to come with a tokenizer"
        tokens = encode_documents(documents, tokenizer)
    if keep is not None:
        write_token_file(Path(keep), tokens)
    check_tokens(tokens, vocab_size, source)
    return split(tokens, share, context, source)


def load_teacher(source: str, placement: Placement) -> LoadedModel:
    """Return a model to follow: in the training's precision, its stages causal."""
    teacher = load_model(source, device=str(placement.device), dtype=_name(placement))
    teacher.transformer.stages = CausalStages(teacher.config.n_kv_heads)
    return teacher


def load_start(source: str, placement: Placement) -> LoadedModel:
    """Return a model to train on from, trainable, its weights in fp32."""
    start = load_model(source, device=str(placement.device), dtype="fp32")
    start.transformer.stages = CausalStages(start.config.n_kv_heads)
    start.transformer.requires_grad_(True)
    return start


def read_model_config(path: str) -> ModelConfig:
    """Return the config of a `config.json`."""
    return read_hf_config(Path(path))


def check_fit(config: ModelConfig, tokenizer: Tokenizer | None, context: int, teacher: Transformer | None) -> None:
    """Raise if the model cannot hold the tokenizer's ids or the rows' length, or a teacher has another vocabulary."""
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


def _name(placement: Placement) -> str:
    return {2: "bf16", 4: "fp32"}[placement.dtype.itemsize]
