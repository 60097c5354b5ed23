"""The words of docstrings, key texts and docs, as CONTRIBUTING.md asks for them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from tetdist.config.documentation import documented_keys

# Words that begin a sentence which leans on one before it, or a question without its answer.
LEANING = re.compile(
    r"(of|for|from|with|within|without|in|on|at|by|to|as|so|that|those|which|whose|likewise|"
    r"what|whether|how|where|who)\b",
    re.IGNORECASE,
)

# Phrases for which the field, or plain English, has another.
AVOIDED = re.compile(
    r"to the bit|told from chance|the contrary|\bmend|\btwin|dearest|for a try\b|one's own|unasked|"
    r"fused pass|bit-identical|which is said|is told|nobody (waits|ends)|whoever|likewise|reckon|"
    r"picture|stranger|written aside|\blies (in|beside|at)\b",
    re.IGNORECASE,
)


def leans(text: str) -> bool:
    return LEANING.match(text.strip().lstrip("`\"'")) is not None


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of modules, classes and functions, and of fields, which stand below them."""
    for node in ast.walk(ast.parse(file.read_text())):
        body = getattr(node, "body", None)
        for before, one in zip([None, *body], body, strict=False) if isinstance(body, list) else ():
            is_documented = before is None or isinstance(before, (ast.Assign, ast.AnnAssign))
            if is_documented and isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                yield str(one.value.value)


@pytest.mark.parametrize("room", ["tetdist", "tools", "launch", "docs/make"])
def test_docstrings_begin_with_a_verb_or_a_noun(room: str) -> None:
    leaning = [
        f"{file.relative_to(tiny.PROJECT)}: {text.splitlines()[0]}"
        for file in sorted((tiny.PROJECT / room).rglob("*.py"))
        for text in docstrings(file)
        if text.strip() and leans(text)
    ]
    assert not leaning, "\n".join(leaning)


def test_texts_of_keys_begin_with_a_verb_or_a_noun() -> None:
    texts = {key: documented.meaning for key, documented in documented_keys().items()}
    # Before it a key says for which kinds of neurons it is.
    said = {key: text.rpartition(" only) ")[2] for key, text in texts.items() if text}
    assert [key for key, text in said.items() if leans(text)] == []


def test_docs_have_headings_of_nouns_and_the_words_of_the_field() -> None:
    # Studies write docs/results.md.
    pages = [page for page in (tiny.PROJECT / "docs").rglob("*.md") if page.name != "results.md"]
    found = [
        f"{page.relative_to(tiny.PROJECT)}: {line}"
        for page in [*pages, *tiny.PROJECT.glob("*.md")]
        for line in page.read_text().splitlines()
        if AVOIDED.search(line) or (line.startswith("#") and leans(line.lstrip("# ")))
    ]
    assert len(pages) > 15
    assert not found, "\n".join(found)
