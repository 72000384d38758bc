"""What a generation is asked for. No torch here: a mistake in a flag is told before anything slow is imported."""

from dataclasses import dataclass, field

from fastgen.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; the default is greedy decoding, which no filter changes.

    Raises `UsageError`, which names the flag, where a value is out of its range.
    """

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off; the one option that greedy decoding heeds
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        expectations = (
            # The bounds keep fp32 from overflow, and numbers from being divided by what rounds to 0.
            ("temperature", temperature == 0 or 1e-6 <= temperature <= 1e6, "0 (greedy), or 1e-6 to 1e6"),
            ("top_k", self.top_k >= 0, "a number of tokens, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1"),
            ("repetition_penalty", 1e-6 <= penalty <= 1e6, "1e-6 to 1e6; 1 is off, more discourages"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits, with its sign"),
        )
        for name, met, expected in expectations:
            if not met:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")

    @property
    def takes_largest(self) -> bool:
        """Whether the token is that of the largest logit, whatever came before it."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def structure(self) -> "SamplingOptions":
        """Return these options with every number replaced that a compiled step reads from the device.

        Options of equal structure share one graph: another temperature, top-p, min-p, penalty or seed is no other
        graph, another top-k is.
        """
        return SamplingOptions(
            temperature=1.0 if self.temperature else 0.0,
            top_k=self.top_k,
            top_p=0.5 if self.top_p < 1 else 1.0,
            min_p=0.5 if self.min_p else 0.0,
            repetition_penalty=2.0 if self.repetition_penalty != 1 else 1.0,
        )


MOST_DRAFTS = 15
"""Tokens that a round drafts at most: with the text's last one, as many as the target's kernels take at once."""


def check_speculation(draft: str | None, count: int | str, accept: str) -> None:
    """Raise `UsageError`, which names the flag, for what no model could be speculated about with.

    `draft` is a name, None for a model that is loaded; `count` is a number of tokens a round, or "auto".
    """
    if draft == "":
        raise UsageError('--draft "": expected a model, embedded, ngram, self:N or none')
    layers = draft.removeprefix("self:") if draft and draft.startswith("self:") else "1"
    if not layers.isdecimal() or int(layers) < 1:
        raise UsageError(f"--draft {draft}: expected self:N, for the model's own first N layers")
    if count != "auto" and not (isinstance(count, int) and 1 <= count <= MOST_DRAFTS):
        raise UsageError(f"--speculate {count}: expected 1 to {MOST_DRAFTS} tokens a round, or auto")
    if accept not in ("coupled", "leviathan"):
        raise UsageError(f"--accept {accept}: expected coupled or leviathan")
    if accept == "leviathan" and count == "auto":
        raise UsageError(
            "--accept leviathan: needs a fixed --speculate K, for its text hangs on the number of drafts,\n"
            "and auto chooses that by the clock; coupled gives the same text at any number"
        )


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What to generate.

    Attributes:
        max_new_tokens: at most so many tokens; the model's end-of-text tokens end a text earlier.
        stop: strings that end a text; they are not part of it.
        ignore_eos: go on past the model's end-of-text tokens (benchmarks).
        logprobs: also give the log-probability of every token, under the model before any filter.
        sampling: how a token is chosen; greedy by default.
    """

    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")
        if "" in self.stop:
            raise UsageError("--stop: an empty string would end every text at once")
