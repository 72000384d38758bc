"""Chat templates: messages to the text that the model was trained on, by the jinja2 template that comes with it.

A template is a program from whoever published the checkpoint. jinja2's sandbox keeps it away from Python's internals
but bounds neither time nor memory: `'%1000000000d' % 1` is a single call into C, which no check in the interpreter
can interrupt. So every rendering runs in a process of its own (`template_child`), which the kernel stops after a
second of CPU time or at 128 MiB; it imports jinja2 and nothing of ours. It costs about 0.1 s a rendering, once a turn
of a conversation; a process that is kept would save most of that, and would have to be watched and ended.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgen.errors import ModelFileError, UsageError

CPU_SECONDS = 1.0  # for compiling and rendering
MEMORY_BYTES = 128 << 20  # above what the interpreter and the messages take
TEXT_BYTES = 16 << 20  # of template and messages together, and of the result
WALL_SECONDS = 20.0  # for a machine so busy that a second of CPU time takes long; nothing in a template can sleep
ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ")
CHILD = Path(__file__).with_name("template_child.py")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """Return `messages` (each with `role` and `content`) in the form that `template` gives them.

    `special_tokens` are `Tokenizer.template_tokens`; `add_generation_prompt` opens the assistant's turn. The template
    sees the variables and functions that transformers' `apply_chat_template` gives it.

    Raises `UsageError` if the template itself refuses the messages, or if they are too long, and `ModelFileError` if
    the template is invalid, fails, or exceeds its time or memory.
    """
    variables = {
        **special_tokens,
        "messages": list(map(dict, messages)),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    request = json.dumps(
        {
            "template": template,
            "variables": variables,
            "cpu_seconds": CPU_SECONDS,
            "memory_bytes": MEMORY_BYTES,
            "text_bytes": TEXT_BYTES,
        }
    )
    if len(request) > TEXT_BYTES:
        raise UsageError(f"chat: messages and template take {len(request)} bytes, more than {TEXT_BYTES}")
    status, output, errors = _run_child(request)
    if status != 0:
        raise ModelFileError(f"chat template: {_cause(status, errors)}; a plain prompt works without it")
    answer = json.loads(output)
    if "refused" in answer:
        raise UsageError(f"chat template: it refuses these messages: {_one_line(answer['refused'])}")
    if "failed" in answer:
        raise ModelFileError(f"chat template: {_one_line(answer['failed'])}")
    text = answer["text"]
    assert isinstance(text, str), f"the template's process answered {type(text)}"
    return text


def _run_child(request: str) -> tuple[int, bytes, bytes]:
    # The child finds jinja2 where this process does, without the start-up of site-packages (-S), without looking into
    # the working directory (-P), and without the rest of the environment, where tokens and keys may be.
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-S", "-P", str(CHILD)]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, env=environment, timeout=WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelFileError(f"chat template: not rendered within {WALL_SECONDS:.0f} s") from error
    return done.returncode, done.stdout, done.stderr


def _cause(status: int, errors: bytes) -> str:
    if status == -signal.SIGPROF:
        return f"stopped after {CPU_SECONDS:.0f} s of computing"
    if status < 0:
        return f"its process ended by signal {-status}"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return f"it needs more than {MEMORY_BYTES >> 20} MiB"
    return f"it fails with {_one_line(last) or 'no message'}"


def _one_line(message: str) -> str:
    """Return a template's own words, shortened and without control characters, for a terminal."""
    return "".join(c if c.isprintable() else " " for c in message[:300]).strip()
