"""A chat prefills only what is new, says what a run from scratch says, and survives whatever a line of it holds."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgen import chat
from fastgen.chat import main
from fastgen.completion import GenerationOptions, encode_chat
from fastgen.conversation import Conversation
from fastgen.engine import Engine, Piece
from fastgen.errors import INTERRUPTED, UsageError
from fastgen.load import LoadedModel, load_model
from fastgen.tokenizer.hf_json import parse_hf_json
from fastgen.tokenizer.settings import Settings
from tests.checkpoint_writers import LLAMA, make_model, write_hf
from tests.vocabularies import small_byte_level

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANGING = CHATML.replace("m.content", "m.content | upper")
END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that chats in whole characters and now and then ends its turn."""
    words = parse_hf_json(small_byte_level().encode(), Path("small"), Settings())
    config = LLAMA | {"vocab_size": words.vocab_size + 7, "max_position_embeddings": 512}
    weights = make_model(config, seed=2)
    for token in range(config["vocab_size"]):
        spelled = words.token_bytes(token) if token < words.vocab_size else b""
        if token == words.special[END]:
            weights["lm_head.weight"][token] *= 1.2
        elif not (spelled and spelled.isascii() and spelled.decode().isprintable()):
            weights["lm_head.weight"][token] = 0.0
    path = write_hf(tmp_path_factory.mktemp("models") / "tiny-chat", config, weights)
    (path / "tokenizer.json").write_text(small_byte_level())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHATML}))
    return path


@pytest.fixture
def model(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu", dtype="fp32")


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command on lines from a pipe; gives its status, stdout and stderr."""

    def run_chat(*lines: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["--model", str(folder), "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12", *flags])
        return status, *capsys.readouterr()

    return run_chat


def test_a_turn_prefills_only_its_new_tokens_and_equals_a_run_from_scratch(model: LoadedModel, folder: Path) -> None:
    engine, conversation = Engine(model), Conversation(model.tokenizer, system="the time")
    twin = load_model(folder, device="cpu", dtype="fp32")
    options = GenerationOptions(max_new_tokens=24)
    before, reasons = 1, set()
    for message in ("Once upon a time", "don't café", "a naïve <tag>", "12 we'll 北京", "the", "upon 3456"):
        question = conversation.ask(message)
        completion = engine.generate([question.tokens], options)[0]
        assert completion == Engine(twin).generate([question.tokens], options)[0]
        # The last token of an answer has been chosen but never been fed.
        assert engine.timings.prefilled_tokens == len(question.tokens) - (before - 1)
        conversation.answer(question, completion)
        before = len(question.tokens) + len(completion.tokens)
        reasons.add(completion.finish_reason)
        text = model.tokenizer.decode(completion.tokens)
        if model.tokenizer.encode(text, bos=False) != list(completion.tokens):
            reasons.add("spelled otherwise")
    assert reasons == {"stop", "length", "spelled otherwise"}, "the cases that matter came up"


def test_the_tokens_of_a_conversation_spell_what_the_template_makes_of_it(model: LoadedModel) -> None:
    conversation = Conversation(model.tokenizer)
    question = conversation.ask("the time")
    conversation.answer(question, Engine(model).generate([question.tokens], GenerationOptions(max_new_tokens=9))[0])
    question = conversation.ask("upon")
    names = {token: text for text, token in model.tokenizer.special.items()}

    def spelled(tokens: tuple[int, ...]) -> str:
        return "".join(names.get(token) or model.tokenizer.token_bytes(token).decode() for token in tokens)

    assert spelled(question.tokens) == spelled(question.spelling)
    assert spelled(question.tokens).count(END) == 3
    assert question.tokens != question.spelling


def test_a_template_that_changes_earlier_answers_is_followed(model: LoadedModel) -> None:
    model.tokenizer.chat_template = CHANGING
    conversation = Conversation(model.tokenizer)
    question = conversation.ask("the time")
    conversation.answer(question, Engine(model).generate([question.tokens], GenerationOptions(max_new_tokens=9))[0])
    messages = [*conversation.messages, {"role": "user", "content": "upon"}]
    assert list(conversation.ask("upon").tokens) == encode_chat(model.tokenizer, messages)


def test_a_question_without_an_answer_leaves_no_trace(model: LoadedModel) -> None:
    conversation = Conversation(model.tokenizer)
    expected = conversation.ask("the")
    conversation.ask("something else")
    assert conversation.ask("the") == expected
    assert conversation.messages == []


def test_answers_go_to_stdout_and_figures_to_stderr(run: Callable, model: LoadedModel) -> None:
    status, out, err = run("the time", "", "upon")
    engine, conversation = Engine(model), Conversation(model.tokenizer)
    expected = []
    for message in ("the time", "upon"):
        question = conversation.ask(message)
        conversation.answer(question, engine.generate([question.tokens], GenerationOptions(max_new_tokens=12))[0])
        expected.append(conversation.messages[-1]["content"])
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))
    assert err.count("prompt tokens prefilled") == 2
    assert f"[{engine.timings.prefilled_tokens} prompt tokens prefilled" in err


def test_json_is_the_last_line_and_all_of_stdout(run: Callable) -> None:
    status, out, err = run("the time", "upon", flags=("--json", "--system", "a time"))
    document = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert [message["role"] for message in document["messages"]] == ["system", *["user", "assistant"] * 2]
    first, second = document["turns"]
    assert first["prefilled_tokens"] == first["prompt_tokens"]
    assert second["prefilled_tokens"] == second["prompt_tokens"] - first["prompt_tokens"] - first["new_tokens"] + 1
    assert document["messages"][2]["content"] in err


def test_reset_and_system_begin_anew_with_and_without_the_turns(run: Callable) -> None:
    alone = run("upon", flags=("--json",))[1]
    reset = run("the time", "/reset", "upon", flags=("--json",))[1]
    assert json.loads(reset)["messages"] == json.loads(alone)["messages"]
    system = json.loads(run("the time", "/system be brief", "upon", flags=("--json",))[1])["messages"]
    assert system[0] == {"role": "system", "content": "be brief"}
    assert [message["content"] for message in system if message["role"] == "user"] == ["the time", "upon"]
    bare = json.loads(run("/system", "upon", flags=("--json", "--system", "be brief"))[1])["messages"]
    assert bare == json.loads(alone)["messages"]


def test_save_writes_the_messages_and_never_overwrites(run: Callable, tmp_path: Path) -> None:
    target = tmp_path / "chat.json"
    _, out, err = run("the café", f"/save {target}", "upon", f"/save {target}", "/save")
    saved = json.loads(target.read_text())
    assert saved[0] == {"role": "user", "content": "the café"}
    assert len(saved) == 2 and saved[1]["content"] == out.splitlines()[0]
    assert "2 messages saved" in err and "exists already" in err and "name a file" in err


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "a\0b", "x" * 5000, "/dev/null/x"])
def test_a_file_that_cannot_be_saved_does_not_end_the_chat(run: Callable, name: str) -> None:
    status, out, err = run("the café", f"/save {name}", "upon")
    assert (status, len(out.splitlines())) == (0, 2)
    assert "messages saved" not in err


def test_unknown_commands_answer_with_the_list_and_exit_ends(run: Callable) -> None:
    status, out, err = run("/nonsense", "/exit", "the time")
    assert (status, out) == (0, "")
    assert "/nonsense: no such command" in err and chat.HELP.rstrip() in err


def test_help_lists_every_command(run: Callable) -> None:
    err = run("/help")[2]
    assert all(name in err for name in ("/reset", "/system TEXT", "/save FILE", "/exit", "/help"))


def test_a_conversation_that_does_not_fit_says_so_and_goes_on(run: Callable) -> None:
    status, out, err = run("the", "time " * 40, "/reset", "the", flags=("--max-seq-len", "64"))
    assert "the context holds 64" in err and "/reset begins a new one" in err
    assert "the conversation has" in err
    first, second = out.splitlines()
    assert status == 0 and first == second


def test_a_message_that_the_template_refuses_is_forgotten(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(conversation: Conversation, content: str) -> None:
        raise UsageError(f"chat template: it refuses {content}")

    monkeypatch.setattr(Conversation, "ask", refuse)
    status, out, err = run("the time", "upon")
    assert (status, out) == (0, "")
    assert err.count("it refuses") == 2


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in the first answer, after so many pieces."""
    original, calls = Engine.stream, []

    def stream(self: Engine, *arguments: object, **options: object) -> Iterator[Piece]:
        calls.append(1)
        for number, piece in enumerate(original(self, *arguments, **options)):
            if len(calls) == 1 and number == count:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Engine, "stream", stream)


def test_ctrl_c_stops_an_answer_and_keeps_it(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(run("the time", flags=("--json",))[1])["messages"][1]["content"]
    interrupt_after(4, monkeypatch)
    status, out, err = run("the time", "upon", flags=("--json",))
    document = json.loads(out)
    partial = document["messages"][1]["content"]
    assert status == 0
    assert partial and whole.startswith(partial) and partial != whole
    assert document["turns"][0]["finish_reason"] == "interrupted" and "interrupted" in err
    assert len(document["messages"]) == 4
    assert document["turns"][1]["prefilled_tokens"] < document["turns"][1]["prompt_tokens"] - 10


def test_ctrl_c_before_the_answer_forgets_the_message(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = json.loads(run("upon", flags=("--json",))[1])["messages"]

    original, calls = Engine.tokens, []

    def tokens(self: Engine, *arguments: object, **options: object) -> Iterator:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Engine, "tokens", tokens)
    status, out, err = run("the time", "upon", flags=("--json",))
    assert status == 0 and "the message is forgotten" in err
    assert json.loads(out)["messages"] == alone


def test_ctrl_c_at_the_prompt_ends_with_130(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(on_terminal: bool) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_read_line", interrupted)
    assert run()[0] == INTERRUPTED


def test_input_that_is_not_utf_8_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the \xff time\n"), encoding="utf-8"))
    with pytest.raises(UsageError, match="not UTF-8 at byte 4"):
        main(["--model", str(folder), "--device", "cpu"])


def test_a_model_without_a_template_is_refused(shared_data: Path) -> None:
    flags = ["--model", str(shared_data / "models/stories260K.bin")]
    with pytest.raises(UsageError, match="no chat template"):
        main([*flags, "--tokenizer", str(shared_data / "tokenizers/tok512.model"), "--device", "cpu"])
