"""A chat with a model, in the form that it was trained on: `python -m fastgen.chat --system "Be brief."`.

Answers go to stdout, everything else to stderr; a line that begins with / is a command (`/help` lists them). Ctrl-C
stops an answer and keeps what there is of it; at the prompt it ends the chat with status 130, Ctrl-D with 0. The KV
cache lives as long as the chat, so that a turn prefills its own tokens only; the line behind each answer counts them.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fastgen import cli, flags
from fastgen.errors import INTERRUPTED, CapacityError, UsageError
from fastgen.staged import staged_file
from tp.watch import INPUT

if TYPE_CHECKING:
    from fastgen.completion import Completion, TextStream
    from fastgen.conversation import Conversation
    from fastgen.engine import Engine
    from fastgen.load import LoadedModel
    from fastgen.options import GenerationOptions

PROG = "fastgen.chat"
HELP = """\
/reset        forget the conversation; the system message stays
/system TEXT  replace the system message (no TEXT: take it away); the conversation stays
/save FILE    write the messages to a new file as JSON
/exit         end the chat, as Ctrl-D does
/help         this list; a message that begins with / needs a space in front of it
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(flags.EngineFlags, flags.SamplingFlags, flags.ChatFlags, flags.OutputFlags):
    """The flags of `fastgen.chat`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """The figures of one answer; the rate is None where there is nothing to time."""

    prompt_tokens: int  # of the whole conversation
    prefilled_tokens: int  # of these, what the cache did not hold
    new_tokens: int
    decode_tokens_per_second: float | None
    finish_reason: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(ChatConfig, argv, prog=PROG, description="Chat with a model.")
    options = flags.generation_options(config)
    flags.drafts(config)

    from fastgen import session
    from fastgen.conversation import Conversation

    phases = cli.Phases()
    session.check_draft(config, phases)
    engine = _engine(config, session.load(config, phases), phases)
    session.warm_up(engine, options, phases, cache_dir=config.cache_dir)

    conversation = Conversation(engine.model.tokenizer, config.system)
    chat = Chat(engine, conversation, options, answers=sys.stderr if config.json else sys.stdout)
    with cli.interruptible():
        status = chat.run()
    if config.json:
        _print_document(config, engine.model, chat)
    session.check_recompiles(config, engine)
    return status


class Chat:
    """Reads messages and commands from stdin and answers them, until either ends."""

    def __init__(
        self, engine: "Engine", conversation: "Conversation", options: "GenerationOptions", *, answers: TextIO
    ) -> None:
        self.engine, self.conversation, self.options, self.answers = engine, conversation, options, answers
        self.turns: list[Turn] = []

    def run(self) -> int:
        """Return the exit status of the chat."""
        on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        if on_terminal:
            import readline  # noqa: F401  (input() edits lines and remembers them once it is there)

            _tell("/help lists the commands")
        while True:
            try:
                line = self._next_line(on_terminal)
            except KeyboardInterrupt:
                _tell("")
                return INTERRUPTED
            if line is None or line.split() == ["/exit"]:
                return 0
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._ask(line.strip())
            except (UsageError, CapacityError) as error:  # of this line alone: the chat goes on
                _tell(str(error))
            except KeyboardInterrupt:
                _tell("\ninterrupted before the answer began: the message is forgotten")

    def _next_line(self, on_terminal: bool) -> str | None:
        """Return the next line, which rank 0 reads for all ranks, or None at the end."""
        ranks = self.engine.model.ranks
        ranks.at(INPUT)
        return ranks.share(_read_line(on_terminal) if ranks.leads else None)

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        match name:
            case "/reset":
                self.conversation.reset()
                _tell("a new conversation")
            case "/system":
                self.conversation.set_system(argument.strip() or None)
                _tell("another system message" if argument.strip() else "no system message")
            case "/save":
                self._save(argument.strip())
            case "/help":
                _tell(HELP.rstrip())
            case _:
                raise UsageError(f"{name}: no such command; there are\n{HELP.rstrip()}")

    def _ask(self, content: str) -> None:
        """Answer one message as the pieces come; an interrupted answer stays as far as it came."""
        question = self.conversation.ask(content)
        length, room = len(question.tokens), self.engine.max_seq_len
        if length >= room:
            raise UsageError(
                f"the conversation has {length} tokens with this message, the context holds {room}, answer included\n"
                f"/reset begins a new one; --max-seq-len can be up to {self.engine.model.config.max_seq_len}"
            )
        streams: list[TextStream] = []
        shown = 0
        try:
            for piece in self.engine.stream([question.tokens], self.options, streams=streams):
                shown += len(piece.text)
                self.answers.write(piece.text)
                self.answers.flush()
        except KeyboardInterrupt:
            if not streams or not streams[0].count:
                raise
        completion = streams[0].completion()
        self.answers.write(completion.text[shown:] + "\n")
        self.answers.flush()
        self.conversation.answer(question, completion)
        self._record(completion)

    def _record(self, completion: "Completion") -> None:
        timings, room = self.engine.timings, self.engine.max_seq_len
        count = len(completion.tokens)
        turn = Turn(
            prompt_tokens=len(completion.prompt_tokens),
            prefilled_tokens=timings.prefilled_tokens,
            new_tokens=count,
            decode_tokens_per_second=(count - 1) / timings.decoded(count)[1] if count > 1 else None,
            finish_reason=completion.finish_reason or "interrupted",
        )
        self.turns.append(turn)
        rate = f", {turn.decode_tokens_per_second:.1f} tok/s" if turn.decode_tokens_per_second else ""
        filled = turn.prompt_tokens + count
        ends = {
            "stop": "",
            "length": "; the context is full: /reset" if filled >= room else f"; cut at --max-new-tokens {count}",
            "interrupted": "; interrupted",
        }
        _tell(
            f"[{turn.prefilled_tokens} prompt tokens prefilled, {count} generated{rate}; "
            f"{filled} of {room} in the context{ends[turn.finish_reason]}]"
        )

    def _save(self, name: str) -> None:
        """Write the messages to a file that is not there yet."""
        if not name:
            raise UsageError("/save FILE: name a file")
        try:
            path = Path(name).expanduser().resolve()
            exists = path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # no such home, no access, no name that can be
            raise UsageError(f"/save {name}: {error}") from error
        if exists:
            raise UsageError(f"/save {name}: the file exists already; name another, nothing is overwritten")
        messages = self.conversation.messages
        if not self.engine.model.ranks.leads:
            return
        with staged_file(path) as staging:
            staging.write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        _tell(f"{len(messages)} messages saved to {path}")


def _read_line(on_terminal: bool) -> str | None:
    """Return the next line, or None at the end; a piped one is shown nowhere and gets no prompt."""
    try:
        if sys.stdin is None:
            return None
        if not on_terminal:
            return sys.stdin.readline() or None
        return input("> ")
    except EOFError:
        _tell("")
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not UTF-8 at byte {error.start} of what was read; convert it first") from error


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _engine(config: ChatConfig, model: "LoadedModel", phases: cli.Phases) -> "Engine":
    """Return the engine that serves the whole chat, of a model that has a chat template."""
    from fastgen import session

    if model.tokenizer.chat_template is None:
        raise UsageError(
            f"--model {config.model}: it has no chat template, so nothing says how it was trained to chat\n"
            "Choose a chat model, or continue a text with fastgen.generate"
        )
    return session.make_engine(config, model, phases, max_seq_len=config.max_seq_len)


def _print_document(config: ChatConfig, model: "LoadedModel", chat: Chat) -> None:
    from fastgen import session

    document = session.document(PROG, config, model) | {
        "messages": chat.conversation.messages,
        "turns": [dataclasses.asdict(turn) for turn in chat.turns],
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
