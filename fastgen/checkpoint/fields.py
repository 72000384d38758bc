"""Typed, bounded access to a JSON object that says what a model is; what was read is noted, the rest can be refused."""

import reprlib
from collections.abc import Callable, Mapping

from fastgen.errors import ModelFileError

MAX_SIZE = 2**31 - 1
MAX_NUMBER = 1e30  # fits fp32 with room for products


class Fields:
    """Typed, bounded access to a JSON object, which notes what was read; errors name the field and its value."""

    def __init__(self, raw: Mapping[str, object], prefix: str = "") -> None:
        self._raw, self._prefix = raw, prefix
        self._unread = set(raw)

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    def get(self, name: str) -> object:
        """Return field `name` as it is, None where there is none."""
        self._unread.discard(name)
        return self._raw.get(name)

    def error(self, name: str, expected: str) -> ModelFileError:
        """Return the error that field `name` is not what was `expected`."""
        found = f"is {reprlib.repr(self._raw[name])}" if name in self._raw else "is missing"
        return ModelFileError(f"{self._prefix}{name} {found}, expected {expected}")

    def integer(self, name: str, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer from `low` to `high`; true and 1.0 are none."""
        value = self.get(name)
        if type(value) is int and low <= value <= high:
            return value
        raise self.error(name, f"an integer from {low} to {high}")

    def number(self, name: str, *, above: int = 0) -> float:
        """Return a number above `above`, up to `MAX_NUMBER`; true is none."""
        value = self.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and above < value <= MAX_NUMBER:
            return float(value)
        raise self.error(name, f"a number above {above} and up to {MAX_NUMBER:g}")

    def boolean(self, name: str) -> bool:
        """Return a true or false."""
        value = self.get(name)
        if isinstance(value, bool):
            return value
        raise self.error(name, "true or false")

    def optional_integer(self, name: str) -> int | None:
        """Return an integer above 0, or None for null or nothing."""
        return None if self.get(name) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        """Return a number, or None for null or nothing."""
        return None if self.get(name) is None else self.number(name)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Return a token id or a list of them, () for null or nothing."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(token) is int and 0 <= token < vocab_size for token in ids):
            return tuple(ids)
        raise self.error(name, f"ids of a vocabulary of {vocab_size} tokens")

    def section(self, name: str) -> "Fields | None":
        """Return the fields of a nested object, or None for null, nothing or an empty one."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object or null")
        return Fields(value, f"{self._prefix}{name}.") if value else None

    def refuse_unread(self, is_harmless: Callable[[str], bool]) -> None:
        """Raise for a field that was not read, is not harmless by its name, and says anything."""
        for name in sorted(self._unread):
            if self._raw[name] and not is_harmless(name):
                raise self.error(name, "nothing: it changes what the model computes, and is not supported")
