"""Typed errors for what a user can get wrong, each with the exit status that the commands end with.

A message is one to three lines: the value, where it stands, what was expected and the way out. Commands print it
without a traceback (`--debug` shows one). Invariants of our own are asserts; they are never used to check input.
"""


class FastgenError(Exception):
    """Base of every error that a user can cause; `exit_status` is what a command returns for it."""

    exit_status = 1


class UsageError(FastgenError, ValueError):
    """A flag or argument that cannot be honoured."""

    exit_status = 2


class ModelFileError(FastgenError, ValueError):
    """A model, tokenizer or data file that is missing, damaged, unsupported or contradicts another."""

    exit_status = 3


class CapacityError(FastgenError):
    """Not enough memory or disk."""

    exit_status = 4


class NetworkError(FastgenError):
    """The network, or what stands behind it, did not give what was asked for."""

    exit_status = 5


class RankLostError(FastgenError):
    """Another process of a tensor-parallel run died or stalled."""

    exit_status = 6


class RecompiledError(FastgenError):
    """`--fail-on-recompile` was given, and something was compiled after the start."""


INTERRUPTED = 130
"""Exit status after Ctrl-C."""
