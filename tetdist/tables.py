"""Tables of text, one writer for each kind: Markdown, aligned columns for a terminal, HTML."""

import html
from collections.abc import Sequence

Row = Sequence[str]


def number(value: float | None, spec: str) -> str:
    """A cell of a number that may not be known."""
    return "-" if value is None else format(value, spec)


def markdown(head: Row, rows: Sequence[Row], *, numbers: bool = False, tight: bool = False) -> str:
    """A table in Markdown.

    Args:
        head: The titles of the columns.
        rows: The cells below them.
        numbers: Whether all columns but the first are set flush right.
        tight: Whether the rule below the head has no spaces, as MLflow's notes have had it.
    """
    first, others = "---", "---:" if numbers else "---"
    rule = [first, *[others] * (len(head) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    if tight:
        lines[1] = lines[1].replace(" ", "")
    return "\n".join(lines)


def aligned(rows: Sequence[Row], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, indented by two spaces.

    Args:
        rows: The cells; a head, if there is one, is the first row.
        right: Numbers of the columns that are set flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            f"{cell:>{width}}" if i in right else f"{cell:{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def as_html(rows: Sequence[Row]) -> str:
    """An HTML table whose first row is the head, a line each row; the cells' text is escaped."""

    def line(cells: Row, kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>"

    lines = [line(row, "td" if i else "th") for i, row in enumerate(rows)]
    return "\n".join(["<table>", *lines, "</table>"])
