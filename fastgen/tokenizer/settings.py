"""What stands beside a vocabulary in a Hugging Face folder: named tokens, stop ids, the chat template.

Read from `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `chat_template.jinja`, each
optional. The field names are those that transformers writes (`tokenization_utils_base.py`); a template is a file of
its own, a string, or a list of named ones, of which `default` is the one for plain chat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastgen.errors import ModelFileError
from fastgen.files import RandomAccessFile
from fastgen.json_file import parse_json

MAX_BYTES = 64 << 20  # the largest side files list a whole vocabulary of added tokens, in a few MB
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a folder, or the metadata of a file, says about a vocabulary; empty where it says nothing."""

    source: str = ""  # named in errors
    tokens: Mapping[str, str] = field(default_factory=dict)  # text by role: bos_token, eos_token, ...
    add_bos: bool | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None


def read_settings(folder: Path) -> Settings:
    """Return what the files in `folder` say. Raises `ModelFileError` for a damaged one."""
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path)
    tokens = _named_tokens(_read_object(folder / "special_tokens_map.json")) | _named_tokens(config)
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise ModelFileError(f"{config_path}: add_bos_token is {add_bos!r}, expected true or false")
    return Settings(
        source=str(config_path),
        tokens=tokens,
        add_bos=add_bos,
        eos_ids=_eos_ids(folder / "generation_config.json"),
        chat_template=_chat_template(folder / "chat_template.jinja", config),
    )


def read_whole(path: Path, limit: int) -> bytes:
    """Return a file's bytes; raises `ModelFileError` if it cannot be read or is larger than `limit`."""
    file = RandomAccessFile(path)
    if file.size > limit:
        raise ModelFileError(f"{path}: {file.size} bytes, more than the {limit} that such a file can have")
    return bytes(file.read(0, file.size))


def _read_object(path: Path) -> dict[str, object]:
    return parse_json(read_whole(path, MAX_BYTES), path) if path.exists() else {}


def _named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    tokens = {}
    for role in ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _eos_ids(path: Path) -> tuple[int, ...]:
    value = _read_object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelFileError(f"{path}: eos_token_id is {value!r}, expected an id or a list of ids")
    return tuple(ids)


def _chat_template(path: Path, config: Mapping[str, object]) -> str | None:
    if path.exists():
        try:
            return read_whole(path, MAX_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: not UTF-8 at byte {error.start}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
