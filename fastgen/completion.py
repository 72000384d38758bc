"""From tokens to text: what a generation is asked for, what it gives, and where it ends.

`TextStream` turns one text's tokens into pieces that can be printed at once: never half a character, and nothing
that may turn out to be the beginning of a stop string.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastgen.errors import UsageError
from fastgen.options import GenerationOptions
from fastgen.tokenizer.base import Tokenizer, any_of
from fastgen.tokenizer.chat_template import render_chat


@dataclass(frozen=True)
class Completion:
    """A finished text: its new tokens, their text, and why it ended: "stop" or "length".

    `tokens` holds every token that was generated, an end-of-text token included; `text` has neither that nor the
    stop string. `logprobs` is empty unless asked for.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] = ()


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of a conversation, up to where the assistant's next turn begins.

    Raises:
        UsageError: the model has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UsageError("--chat: this model has no chat template; use it without, or choose a chat model")
    special = tokenizer.special
    contents = "".join(message["content"] for message in messages)
    if not any(text in contents for text in special):
        text = _render(tokenizer, messages)
        # Templates write the beginning-of-sequence token themselves where the model wants one.
        return tokenizer.encode(text, bos=False, parse_special=True)
    # What a person writes must not turn into special tokens: theirs stand as private characters while the template
    # is rendered, and become ordinary text again between those that the template has put there.
    hidden = dict(zip(_unused_characters(contents), special, strict=False))
    text = _render(tokenizer, [{**message, "content": _hide(message["content"], hidden)} for message in messages])
    ids: list[int] = []
    for part in any_of(special).split(text):
        if part in special:
            ids.append(special[part])
        elif part:
            ids += tokenizer.encode("".join(hidden.get(character, character) for character in part), bos=False)
    return ids


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    assert tokenizer.chat_template is not None, "checked by the caller"
    return render_chat(
        tokenizer.chat_template, messages, special_tokens=tokenizer.template_tokens, add_generation_prompt=True
    )


def _unused_characters(text: str) -> Iterator[str]:
    """Yield characters for private use that `text` does not hold."""
    return (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)


def _hide(content: str, hidden: Mapping[str, str]) -> str:
    for character, special in sorted(hidden.items(), key=lambda item: len(item[1]), reverse=True):
        content = content.replace(special, character)
    return content


class TextStream:
    """The text of one row as its tokens arrive."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: GenerationOptions,
        *,
        room: int,
        stop_ids: frozenset[int],
    ) -> None:
        """`room` is how many tokens fit behind the prompt; `stop_ids` end a text unless `options.ignore_eos`."""
        self._decoder = tokenizer.incremental(continues=any(token != tokenizer.bos_id for token in prompt))
        self._vocab_size = tokenizer.vocab_size
        self._stop_ids = frozenset() if options.ignore_eos else stop_ids
        self._stop = options.stop
        self._limit = min(options.max_new_tokens, room)
        self._held = ""
        self._prompt = tuple(prompt)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._pieces: list[str] = []
        self.finish_reason = ""

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def push(self, token: int, logprob: float | None = None) -> str:
        """Take the next token and return the text that can be shown now; sets `finish_reason` at the end."""
        assert not self.finish_reason, "a finished text takes no tokens"
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self._release(self._decoder.flush(), final=True)
        # Embeddings are often padded beyond the vocabulary; ids there have no text.
        text = self._decoder.push(token) if token < self._vocab_size else ""
        if len(self._tokens) < self._limit:
            return self._release(text, final=False)
        released = self._release(text + self._decoder.flush(), final=True)
        self.finish_reason = self.finish_reason or "length"
        return released

    def completion(self) -> Completion:
        """Return what has been generated so far, held-back text included."""
        text = "".join(self._pieces) + self._held
        return Completion(self._prompt, tuple(self._tokens), text, self.finish_reason, tuple(self._logprobs))

    def _release(self, text: str, *, final: bool) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            piece, self._held = self._held[: min(found)], ""
            self.finish_reason = "stop"
        else:
            keep = 0 if final else self._possible_stop()
            piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._pieces.append(piece)
        return piece

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        for length in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            end = self._held[-length:]
            if len(end) == length and any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
