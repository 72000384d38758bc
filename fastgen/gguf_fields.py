"""Typed access to the metadata of a GGUF file; errors name the key and its value, `files.naming` adds the file."""

import math
from collections.abc import Mapping
from typing import TypeVar

from fastgen.errors import ModelFileError

Value = TypeVar("Value", bound=int | float | str | bool)

ROLE = "tokenizer.ggml.{}_token_id"
KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
ITEMS = {int: "integers", float: "numbers", str: "strings"}


class GgufFields:
    """The metadata of a file, checked as they are read."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self.metadata = metadata

    def error(self, key: str, expected: str, found: object = None) -> ModelFileError:
        """Return the error that field `key` is not what was `expected`; `found` says what it is in other words."""
        value = self.metadata.get(key) if found is None else found
        return ModelFileError(f"metadata field {key!r} is {str(value)[:60]!r}, expected {expected}")

    def optional(self, key: str, kind: type[Value]) -> Value | None:
        """Return field `key`, or None where there is none; true and false count as no integers."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise self.error(key, KINDS[kind])
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(key, KINDS[kind])
        return value

    def get(self, key: str, kind: type[Value], default: Value) -> Value:
        """Return field `key`, or `default` where there is none."""
        value = self.optional(key, kind)
        return default if value is None else value

    def required(self, key: str, kind: type[Value]) -> Value:
        """Return field `key`."""
        value = self.optional(key, kind)
        if value is None:
            raise ModelFileError(f"metadata field {key!r} is missing, expected {KINDS[kind]}")
        return value

    def sequence(self, key: str, kind: type[Value]) -> list[Value]:
        """Return the items of field `key`, at least one."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
            raise self.error(key, f"a list of {ITEMS[kind]}")
        return value

    def token(self, role: str, vocab_size: int) -> int | None:
        """Return the id of the special token with this role (bos, eos, eot, ..), if there is one."""
        key = ROLE.format(role)
        token = self.optional(key, int)
        if token is not None and not 0 <= token < vocab_size:
            raise self.error(key, f"an id below {vocab_size}")
        return token
