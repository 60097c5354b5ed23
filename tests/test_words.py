"""Docstrings begin with a verb or a noun, as CONTRIBUTING.md asks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

# What begins a sentence that leans on one before it, which is not there.
LEANING = {
    "of",
    "for",
    "from",
    "with",
    "within",
    "without",
    "in",
    "on",
    "at",
    "by",
    "to",
    "as",
    "so",
    "that",
    "which",
    "whose",
    "likewise",
}


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "the module"), text


@pytest.mark.parametrize("room", ["tetdist", "tools", "launch", "docs/make"])
def test_docstrings_begin_with_a_verb_or_a_noun(room: str) -> None:
    leaning = [
        f"{file.relative_to(tiny.PROJECT)}: {name}: {text.splitlines()[0]}"
        for file in sorted((tiny.PROJECT / room).rglob("*.py"))
        for name, text in docstrings(file)
        if text.split()[0].strip("`\"'").lower() in LEANING
    ]
    assert not leaning, "\n".join(leaning)
