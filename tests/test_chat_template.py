"""Chat templates: rendered as transformers renders them, and hostile ones stopped."""

import ast
import subprocess
import sys

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from fastgen.errors import ModelFileError, UsageError
from fastgen.tokenizer.chat_template import CHILD, render_chat
from tests.vocabularies import small_byte_level

SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
USER = {"role": "user", "content": "  What is <b>2+2</b>?\nSay \"four\" & 'é🙂'.  "}
CHATS = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "three turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        {"role": "user", "content": "Sure?"},
    ],
}
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content']
       if loop.index0 == 0 and system_message else message['content'] %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ ' '  + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "llama 3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%b %Y") %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    "qwen": """{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}""",
    "everything else": (
        "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}"
        "{% set x = message %}{{ x | tojson }}{{ message|tojson(indent=2, ensure_ascii=true) }}"
        "{% endgeneration %}{{ x is defined }}{% endfor %}"
        "{{ messages | map(attribute='role') | join(',') }}{{ documents }}{{ pad_token is defined }}"
    ),
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    model = tokenizers.Tokenizer.from_str(small_byte_level())
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)


def render(template: str, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return render_chat(template, messages, special_tokens=SPECIAL, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_that_of_transformers(name: str, chat: str, oracle: PreTrainedTokenizerFast) -> None:
    for prompt in (True, False):
        expected = oracle.apply_chat_template(
            CHATS[chat], chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert render(TEMPLATES[name], CHATS[chat], prompt) == expected


def test_a_template_that_refuses_the_messages_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match="refuses these messages: Conversation roles must alternate"):
        render(TEMPLATES["llama 2"], [USER, USER])


def test_messages_beyond_all_measure_are_refused() -> None:
    with pytest.raises(UsageError, match="more than 16777216"):
        render("{{ messages }}", [{"role": "user", "content": "x" * (1 << 24)}])


def test_a_long_document_in_a_message_is_not() -> None:
    content = "word é " * 400_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


DOUBLING = (
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
)
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "many powers": "{% for i in range(9999) %}{{ (7 + i) ** 9999999 % 2 }}{% endfor %}",
    "format by percent": "{{ '%1000000000d' % 1 }}",
    "format by method": "{{ '{:1000000000d}'.format(1) }}",
    "format by filter": "{{ '%1000000000d' | format(1) }}",
    "format by map": "{{ ['%1000000000d'] | map('format', 1) | list }}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "repeated list": "{{ [1] * 10 ** 10 }}",
    "doubling": DOUBLING,
    "doubling by replace": DOUBLING.replace("ns.s ~ ns.s", "ns.s.replace('a', ns.s)"),
    "range": "{{ range(10 ** 9) | list }}",
    "centering": "{{ 'x' | center(10 ** 9) }}",
    "indentation": "{{ messages | tojson(indent=10 ** 9) }}",
    "lipsum": "{{ lipsum(n=10 ** 7) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "much text": "{{ 'a' * 2 ** 25 }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.environ }}",
    "globals by filter": "{{ (strftime_now | attr('__globals__'))['sys'] }}",
    "globals by map": "{{ ([strftime_now] | map(attribute='__globals__') | first)['sys'] }}",
    "attribute by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "changing the messages": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "bad syntax": "{% for %}",
    "an unknown tag": "{% evil %}",
    "an unknown filter": "{{ 1 | evil }}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
    "a type error": "{{ messages + 1 }}",
    "a message of its own": "{{ 1 | int(**{'\x1b[2J\n\n': 1}) }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_a_short_error(name: str) -> None:
    with pytest.raises(ModelFileError) as error:
        render(HOSTILE[name], [USER])
    message = str(error.value)
    assert message.startswith("chat template: ") and message.isprintable() and len(message) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not bound address space")
def test_memory_ends_a_template_before_time_does() -> None:
    with pytest.raises(ModelFileError, match="it needs more than 128 MiB"):
        render("{% set x = messages[0].content * 2 ** 27 %}", [{"role": "user", "content": "abc"}])


def test_the_rendering_process_does_not_see_tokens_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    run, environments = subprocess.run, []

    def recorded(*args: object, **options: object) -> object:
        environments.append(options["env"])
        return run(*args, **options)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(subprocess, "run", recorded)
    assert render("{{ 1 }}", [USER]) == "1"
    assert len(environments) == 1 and "hf_secret" not in environments[0].values()


def test_the_rendering_process_loads_nothing_but_jinja2_and_the_standard_library() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(CHILD.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    foreign = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert foreign == {"jinja2"}
