"""Which rows are measured, between whom, and what the numbers say."""

from __future__ import annotations

import statistics
from collections.abc import Collection

from .rows import ALONE, Rows

Values = dict[str, list[float]]  # of each side, round by round


def chosen(rows: Rows, words: Collection[str]) -> Rows:
    """Those with one of the words in their names; all if there are no words."""
    return {
        title: row
        for title, row in rows.items()
        if not words or any(word in title for word in words)
    }


def beside(ours: Rows, others: Rows) -> tuple[Rows, list[str]]:
    """What this build and the other one do in each row; and which rows are left out.

    Of a row's sides that is the last one: the others are what it is compared with otherwise.
    """
    rows: Rows = {}
    for title, (unit, sides) in ours.items():
        if not title.startswith(ALONE):
            _, serve, what = sides[-1]
            _, other_serve, other_what = others[title][1][-1]
            rows[title] = unit, [("other", other_serve, other_what), ("this", serve, what)]
    return rows, [title for title in ours if title not in rows]


def ratios(values: Values) -> list[float]:
    """Of the last side to the first, round by round; none if there is but one side.

    A round's two measurements are neighbours: what else the machine does hits both.
    """
    first, *_, last = [*values.values()] * 2
    if len(values) < 2:
        return []
    return [b / a for a, b in zip(first, last, strict=True) if a]


def line(title: str, unit: str, values: Values) -> str:
    """What is printed of a row: medians, and the median and the range of the ratios."""
    medians = ((label, statistics.median(each)) for label, each in values.items())
    text = "   ".join(f"{label} {median:.1f}" for label, median in medians)
    found = ratios(values)
    if found:
        text += f"   ratio {statistics.median(found):.2f}"
    if len(found) > 1:
        text += f" ({min(found):.2f} to {max(found):.2f})"
    return f"{title:44} {unit:>5}   {text}"


def result(title: str, unit: str, values: Values) -> dict[str, object]:
    """A row as it goes into a file."""
    medians = {label: statistics.median(each) for label, each in values.items()}
    return {
        "name": title,
        "unit": unit,
        "values": values,
        "medians": medians,
        "ratios": ratios(values),
    }
