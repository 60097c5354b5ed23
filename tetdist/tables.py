"""Tables of text, one writer for each kind: Markdown, aligned columns for a terminal, HTML."""

import html
from collections.abc import Sequence

from tetdist.errors import printable

Row = Sequence[str]


def number(value: float | None, spec: str) -> str:
    """Format a number for a cell; "-" if it is unknown."""
    return "-" if value is None else format(value, spec)


def markdown(head: Row, rows: Sequence[Row], *, numbers: bool = False) -> str:
    """Make a table in Markdown.

    Args:
        numbers: Align all columns except the first to the right.
    """
    first, others = "---", "---:" if numbers else "---"
    rule = [first, *[others] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def aligned(rows: Sequence[Row], right: Sequence[int] = ()) -> str:
    """Align columns to their widest cell, indented by two spaces.

    Args:
        rows: The cells, with any head as the first row.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
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
    """Make an HTML table with one line per row; the first row is the head, and text is escaped."""

    def line(cells: Row, kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>"

    lines = [line(row, "td" if i else "th") for i, row in enumerate(rows)]
    return "\n".join(["<table>", *lines, "</table>"])
