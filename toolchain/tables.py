"""Tables and numbers for people: in the terminal, and as cells of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from toolchain.metrics import TensorError

#: A table: title, header, rows.
Rows = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def megabytes(size: float) -> str:
    """Bytes as kB, MB or GB, of powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def decibels(error: TensorError) -> str:
    """SQNR, or "exact" where there is no difference at all."""
    return "exact" if math.isinf(error.sqnr_db) and error.sqnr_db > 0 else f"{error.sqnr_db:.1f} dB"


def percent(share: float | None) -> str:
    """0.9312 as 93.12 %."""
    return "-" if share is None else f"{100 * share:.2f} %"


def milliseconds(value: float) -> str:
    """Three significant digits or so, from microseconds to seconds."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def numeric(section: Rows) -> list[bool]:
    """For each column whether it holds numbers, and so belongs to the right."""
    _, header, rows = section
    return [
        bool(rows) and all(row[index][:1].isdigit() or row[index] in ("-", "auto", "exact") for row in rows)
        for index in range(len(header))
    ]


def table(section: Rows, width: int | None = None) -> Table:
    """A section as a terminal table, numbers to the right. Where a wide one with few rows does not fit, each of its
    rows becomes a column, so that no number is broken."""
    title, header, rows = section
    needed = sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in range(len(header)))
    if width is not None and needed > width and 0 < len(rows) <= 4 and len(header) > 6:
        header, *rows = zip(header, *rows, strict=True)
        section = (title, header, rows)
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for name, right in zip(header, numeric(section), strict=True):
        made.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
