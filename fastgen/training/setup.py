"""From what a run was asked for to a run: its tokens, its model, its trainer, its folder, and how it speaks of itself.

`Request` is what is read here of the command's configuration; the command is the only caller.
"""

import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch

from fastgen.checkpoint.hf_config import read_hf_config
from fastgen.config import ModelConfig
from fastgen.device import Placement, choose_placement, describe
from fastgen.errors import ModelFileError, UsageError
from fastgen.load import LoadedModel, load_model, resolve
from fastgen.model import Transformer
from fastgen.report import SCHEMA_VERSION, peak_memory, versions
from fastgen.tokenizer.base import Tokenizer
from fastgen.tokenizer.open import check_vocabulary, open_tokenizer
from fastgen.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastgen.tokenizer.settings import Settings
from fastgen.training import tokens as token_data
from fastgen.training.cost import measure_flop_rate, training_flops
from fastgen.training.ranks import Ranks
from fastgen.training.run_folder import RunFolder, check_new
from fastgen.training.sample import sample_text
from fastgen.training.shape import DEFAULT_SHAPE, new_model, parse_shape, trainable, with_marks
from fastgen.training.trainer import Trainer, TrainingOptions, Validation
from fastgen.training.vocabulary import tokenizer_files, train_tokenizer
