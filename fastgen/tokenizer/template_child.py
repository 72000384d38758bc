"""The process in which one chat template runs; `chat_template` starts it, and says why.

A JSON request comes on stdin, a JSON answer goes to stdout: `text`, or `refused` with the template's own objection
(`raise_exception`), or `failed` with jinja2's. Any other exception ends the process with its traceback. Limits are
set before the template is even parsed, as constants are folded then. Imports: the standard library and jinja2 only.

Environment, filters and functions are those of transformers' `apply_chat_template`
(huggingface/transformers, `utils/chat_template_utils.py`).
"""

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class RefusalError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training: here its body and no more."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def raise_exception(message: object) -> None:
    """What templates call to refuse messages, such as two of one role in a row."""
    raise RefusalError(str(message))


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """The local date and time, which Llama 3.1's template states in its system prompt."""
    return datetime.now().strftime(form)


def render(template: str, variables: dict[str, object]) -> str:
    """Return what `template` makes of `variables`. Raises `jinja2.TemplateError`, and whatever a template provokes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template).render(variables)


def limit(cpu_seconds: float, memory_bytes: int) -> None:
    """Let the kernel end this process after `cpu_seconds` from now, and refuse it more than `memory_bytes` from now.

    Where there is no /proc (macOS, which does not enforce address-space limits either) only time is bounded.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # pipes are no files: nothing else is to be written
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def main() -> None:
    """Answer the one request on stdin."""
    request = json.load(sys.stdin)
    limit(request["cpu_seconds"], request["memory_bytes"])
    try:
        text = render(request["template"], request["variables"])
        answer = {"text": text} if len(text) <= request["text_bytes"] else {"failed": f"gives {len(text)} characters"}
    except RefusalError as error:
        answer = {"refused": str(error)[:1000]}
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f"line {line}: " if line else ""
        answer = {"failed": f"{place}{type(error).__name__}: {str(error)[:1000]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
