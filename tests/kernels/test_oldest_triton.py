"""Kernels are written in what Triton 3.6 compiles, the oldest that is supported, whichever is installed here."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "fastgen" / "kernels").glob("*.py"))


def kernels(source: Path) -> list[ast.FunctionDef]:
    """Return the functions of a file that Triton compiles."""
    functions = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any(".jit" in ast.unparse(decorator) for decorator in f.decorator_list)]


def faults(function: ast.FunctionDef) -> list[str]:
    """Return the strings that Triton 3.6 would hand to a function as they are, which then have no type."""
    found = [f"default {ast.unparse(d)}" for d in function.args.defaults if isinstance(getattr(d, "value", d), str)]
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        if not ast.unparse(call.func).startswith(("gl.", "tl.")):
            found += [f"argument {ast.unparse(a)}" for a in call.args if isinstance(a, ast.JoinedStr)]
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_string_is_a_default_or_made_for_a_call(source: Path) -> None:
    assert {function.name: faults(function) for function in kernels(source) if faults(function)} == {}


def test_the_two_ways_that_were_met_are_found() -> None:
    code = "def f(x, SPACE: gl.constexpr = 'global'):\n    g(f'ld.{SPACE}')\n    gl.inline(f'{SPACE}')"
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert faults(function) == ["default 'global'", "argument f'ld.{SPACE}'"]
