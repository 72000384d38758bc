"""A Hugging Face `config.json` read into a `ModelConfig`: llama, mistral, qwen2 and qwen3.

Both generations of keys are read: `rope_theta` beside `rope_scaling` (with `type` or `rope_type`), and transformers 5's
`rope_parameters`. A key that the file leaves out has the default of transformers' configuration class for that model
type (5.23, `models/*/configuration_*.py`), and a key means what it means there, since weights are published against
that code.

Nothing that changes the maths is passed over. Every key that we use is typed and bounded; of the others, those whose
name smells of architecture (`ARCHITECTURAL`) are refused by name unless they are null, false, zero or empty. Keys that
transformers itself ignores for a family (`attention_bias` of mistral) fall under that too: a file that carries one was
not written for the model that it names.

    config = read_hf_config(Path("model/config.json"))
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastgen.checkpoint.json_file import read_json
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import ModelFileError
