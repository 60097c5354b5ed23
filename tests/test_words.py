"""The words of docstrings, key texts and docs, as CONTRIBUTING.md asks for them."""

import ast
import inspect
import re
import tokenize

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


# A section of a docstring: its title, and its indented lines.
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n((?:(?: .*)?\n?)+)", re.MULTILINE)

# Literal parts of f-strings; before Python 3.12 these are strings.
FSTRING_MIDDLE = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)


def leans(text):
    return LEANING.match(text.strip().lstrip("`\"'")) is not None


def docstrings(file):
    """Docstrings of modules, classes and functions, and of fields, which stand below them."""
    for node in ast.walk(ast.parse(file.read_text())):
        body = getattr(node, "body", None)
        for before, one in zip([None, *body], body, strict=False) if isinstance(body, list) else ():
            is_documented = before is None or isinstance(before, (ast.Assign, ast.AnnAssign))
            if is_documented and isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                yield str(one.value.value)


def entries(docstring):
    """First lines of the texts in sections such as "Args:" of a docstring."""
    for title, body in SECTION.findall(inspect.cleandoc(docstring)):
        for line in re.findall(r"^    (\S.*)", body, re.MULTILINE):
            yield line if title in ("Returns", "Yields") else line.partition(": ")[2]


def help_texts(file):
    """Texts of the flags that a file adds to an argument parser."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "help":
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            if isinstance(parts[0], ast.Constant):
                yield str(parts[0].value)


def sources(*rooms):
    for room in rooms:
        for file in sorted((tiny.PROJECT / room).rglob("*.py")):
            yield str(file.relative_to(tiny.PROJECT)), file


ROOMS = ("tetdist", "tools", "launch", "docs/make")


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_and_help_texts_begin_with_a_verb_or_a_noun(room):
    leaning = [
        f"{name}: {text.splitlines()[0]}"
        for name, file in sources(room)
        for whole in docstrings(file)
        for text in (whole, *entries(whole))
        if text.strip() and leans(text)
    ]
    leaning += [
        f"{name}: help={text!r}"
        for name, file in sources(room)
        for text in help_texts(file)
        if leans(text)
    ]
    assert not leaning, "\n".join(leaning)


@pytest.mark.parametrize("room", ROOMS)
def test_sources_have_the_words_of_the_field(room):
    found = []
    for name, file in sources(room):
        with tokenize.open(file) as lines:
            for token in tokenize.generate_tokens(lines.readline):
                is_text = token.type in (tokenize.COMMENT, tokenize.STRING, FSTRING_MIDDLE)
                if is_text and (avoided := AVOIDED.search(token.string)):
                    found.append(f"{name}:{token.start[0]}: {avoided[0]}")
    assert not found, "\n".join(found)


def test_texts_of_keys_begin_with_a_verb_or_a_noun():
    texts = {key: documented.meaning for key, documented in documented_keys().items()}
    # Before it a key says for which kinds of neurons it is.
    alone = {key: text.rpartition(" only) ")[2] for key, text in texts.items() if text}
    assert [key for key, text in alone.items() if leans(text)] == []


def test_docs_have_headings_of_nouns_and_the_words_of_the_field():
    pages = list((tiny.PROJECT / "docs").rglob("*.md"))
    found = [
        f"{page.relative_to(tiny.PROJECT)}: {line}"
        for page in [*pages, *tiny.PROJECT.glob("*.md")]
        for line in page.read_text().splitlines()
        if AVOIDED.search(line) or (line.startswith("#") and leans(line.lstrip("# ")))
    ]
    assert len(pages) > 15
    assert not found, "\n".join(found)
