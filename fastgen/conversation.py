"""A conversation as messages and as tokens, so that a new turn costs no more than its own tokens.

The text of a conversation is what the model's chat template makes of all its messages. A model does not always spell
its answer as the tokenizer would, though: a text has many spellings, and only the one that was generated is in the
KV cache. So an answer stays the tokens that were generated wherever the template gives it back unchanged, and the
engine, which keeps the common beginning of two prompts, prefills only what stands behind it. Templates that change
earlier answers (strip them, drop their reasoning) are followed: all tokens are then the tokenizer's, and the cache
serves up to where they differ.

    conversation = Conversation(model.tokenizer, system="Be brief.")
    question = conversation.ask("Hello!")
    conversation.answer(question, engine.generate([question.tokens])[0])
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgen.completion import Completion, encode_chat
from fastgen.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Question:
    """A message of the user's and the prompt it makes: `tokens` for the model, `spelling` as the tokenizer has it."""

    content: str
    tokens: tuple[int, ...]
    spelling: tuple[int, ...]


class Conversation:
    """The turns of one chat.

    Attributes:
        messages: `{"role": ..., "content": ...}` from the system message, if there is one, to the last answer.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self._tokenizer = tokenizer
        self._last: tuple[Question, Completion] | None = None
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or take it away; the turns stay."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + turns

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._last = None

    def ask(self, content: str) -> Question:
        """Return the prompt of the conversation with a new message, which counts once it is answered.

        Raises:
            UsageError: the model has no chat template, or the template refuses the messages.
            ModelFileError: the template is damaged.
        """
        spelling = tuple(encode_chat(self._tokenizer, [*self.messages, {"role": "user", "content": content}]))
        return Question(content, self._as_generated(spelling) or spelling, spelling)

    def answer(self, question: Question, completion: Completion) -> None:
        """Record the answer to the question, finished or not."""
        self.messages += [
            {"role": "user", "content": question.content},
            {"role": "assistant", "content": completion.text},
        ]
        self._last = question, completion

    def _as_generated(self, spelling: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the tokens of `spelling` with earlier answers as they were generated, or None where they changed."""
        if self._last is None:
            return None
        question, completion = self._last
        expected = (*question.spelling, *self._tokenizer.encode(completion.text, bos=False))
        rest = spelling[len(expected) :]
        # Only behind a special token does the tokenizer begin anew, whatever stands before it.
        if spelling[: len(expected)] != expected or not rest or self._tokenizer.token_bytes(rest[0]):
            return None
        for answer in (completion.tokens, completion.tokens[:-1]):  # the last one may have ended the text
            if self._spells(answer, completion.text):
                return (*question.tokens, *answer, *rest)
        return None

    def _spells(self, tokens: Sequence[int], text: str) -> bool:
        """Return whether these are ordinary tokens that give this very text, whole characters only."""
        words = self._tokenizer
        parts = [words.token_bytes(token) if token < words.vocab_size else b"" for token in tokens]
        return all(parts) and b"".join(parts) == text.encode()
