"""`snapfs map --svg`: the heat map as a picture for a report, with a title and a legend."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from .heatmap import LOOKS, Cell, cells, totals
from .output import human
from .report import moment
from .terminal import printable

ACROSS, DOWN = 64, 32  # cells at most
CELL = 14  # pixels
MARGIN = 24
TOP = 92  # where the map begins
FADED = 0.35  # opacity of a cell of which hardly anything is copied

STYLE = (
    "text{font-family:'DejaVu Sans',Verdana,Arial,sans-serif;fill:#222}"
    ".title{font-size:18px;font-weight:bold}.facts{font-size:12px}.bad{fill:#a33c00}"
)


def svg(status: Mapping[str, Any], regions: Mapping[str, Any], when: str) -> str:
    """The picture: of what the daemon answers to status and regions; `when`: RFC 3339."""
    found = cells(regions, ACROSS * DOWN)
    rows = max(1, -(-len(found) // ACROSS))
    width = ACROSS * CELL + 2 * MARGIN
    legend = TOP + (rows + 1) * CELL
    height = legend + -(-(len(LOOKS) + 1) // 2) * 2 * CELL + MARGIN // 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="title description">',
        f'<title id="title">{_escaped(_title(status))}</title>',
        f'<desc id="description">{_escaped(_description(status, regions, when))}</desc>',
        f"<style>{STYLE}</style>",
        "<defs>"
        f'<pattern id="cross" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse" '
        f'x="{MARGIN}" y="{TOP}"><path d="M3 3L{CELL - 4} {CELL - 4}M{CELL - 4} 3L3 {CELL - 4}" '
        'stroke="#fff" stroke-width="2"/></pattern>'
        f'<pattern id="slash" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse" '
        f'x="{MARGIN}" y="{TOP}"><path d="M3 {CELL - 4}L{CELL - 4} 3" stroke="#fff" '
        'stroke-width="2"/></pattern>'
        "</defs>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_head(status, regions, when, width),
        *_map(found),
        *_legend(regions, found, legend),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text in XML, which has neither control characters nor half characters."""
    return html.escape(printable(text).encode(errors="replace").decode())


def _title(status: Mapping[str, Any]) -> str:
    return f"snapfs: {status['image']['path']}"


def _facts(status: Mapping[str, Any], when: str) -> list[str]:
    image, space = status["image"], status["temp"]
    snapshots = len(status["snapshots"])
    return [
        f"{human(image['size'])}, mounted on {status['mount']['mountpoint']}, {moment(when)}",
        f"{snapshots} snapshot{'s' * (snapshots != 1)}, temp images take "
        f"{human(space['used_bytes'])} of {human(space['used_bytes'] + space['room_bytes'])}",
    ]


def _health(status: Mapping[str, Any]) -> str:
    return "healthy" if status["mount"]["healthy"] else f"not healthy: {status['mount']['reason']}"


def _description(status: Mapping[str, Any], regions: Mapping[str, Any], when: str) -> str:
    sums = ", ".join(
        f"{LOOKS[kind].words} {human(count)}" for kind, count in totals(regions).items()
    )
    return "; ".join([*_facts(status, when), _health(status), sums])


def _head(
    status: Mapping[str, Any], regions: Mapping[str, Any], when: str, width: int
) -> Iterator[str]:
    yield _text(MARGIN, 30, _shortened(_title(status), width - 2 * MARGIN, 11), "title")
    first, second = _facts(status, when)
    yield _text(MARGIN, 50, _shortened(first, width - 2 * MARGIN, 7), "facts")
    yield _text(MARGIN, 66, _shortened(second, width - 2 * MARGIN, 7), "facts")
    kind = "facts" if status["mount"]["healthy"] else "facts bad"
    yield _text(MARGIN, 82, _shortened(_health(status), width - 2 * MARGIN, 7), kind)


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{_escaped(text)}</text>'


def _shortened(text: str, width: int, letter: int) -> str:
    most = width // letter
    return text if len(text) <= most else text[: most - 1] + "…"


def _shown(cell: Cell) -> tuple[str, float]:
    """Kind and opacity: reads are marked on top of what there is besides."""
    kind = cell._replace(reads=0).kind
    return kind, FADED + (1 - FADED) * round(cell.shares["copied"], 1) if kind == "copied" else 1.0


def _map(found: list[Cell]) -> Iterator[str]:
    for number in range(0, len(found), ACROSS):
        y, column = TOP + number // ACROSS * CELL, 0
        for (kind, opacity), run in itertools.groupby(found[number : number + ACROSS], _shown):
            count = len(list(run))
            yield from _run(MARGIN + column * CELL, y, count, kind, opacity)
            column += count
    for number, cell in enumerate(found):
        if cell.reads:
            x, y = MARGIN + number % ACROSS * CELL, TOP + number // ACROSS * CELL
            yield _dot(x, y)


def _run(x: int, y: int, count: int, kind: str, opacity: float) -> Iterator[str]:
    """Cells of one look in a row, as one path: each a square with a gap."""
    side = CELL - 1
    path = "".join(f"M{x + CELL * n} {y}h{side}v{side}h-{side}z" for n in range(count))
    fade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    yield f'<path d="{path}" fill="{LOOKS[kind].colour}"{fade}/>'
    pattern = {"lost": "cross", "discarded": "slash"}.get(kind)
    if pattern:
        yield f'<path d="{path}" fill="url(#{pattern})"/>'


def _dot(x: int, y: int) -> str:
    colour = LOOKS["read"].colour
    middle = (CELL - 1) / 2
    return (
        f'<circle cx="{x + middle}" cy="{y + middle}" r="3.5" fill="{colour}" stroke="#222" '
        'stroke-width="1"/>'
    )


def _legend(regions: Mapping[str, Any], found: list[Cell], top: int) -> Iterator[str]:
    """`top`: where cells of the map would be, so that the patterns fit."""
    size, sums = regions["size"], totals(regions)
    for number, (kind, look) in enumerate(LOOKS.items()):
        x = MARGIN + CELL * (ACROSS // 2) * (number % 2)
        y = top + number // 2 * CELL * 2
        if kind == "read":
            yield from _run(x, y, 1, "none", 1)
            yield _dot(x, y)
            text = "read through a snapshot since the mount"
        else:
            yield from _run(x, y, 1, kind, 1)
            text = look.words
            if kind in sums:
                text += f": {human(sums[kind])}{_share(sums[kind], size)}"
            if kind == "copied":
                text += " (darker: more of the cell)"
        yield _text(x + CELL + 8, y + 11, text, "facts")
    if found:
        cell = human(found[0].stop - found[0].start)
        y = top + len(LOOKS) // 2 * CELL * 2 + 11
        text = f"One cell is {cell}, from left to right and from top to bottom."
        yield _text(MARGIN + CELL * (ACROSS // 2), y, text, "facts")


def _share(part: int, size: int) -> str:
    percent = 100 * part / size if part else 0.0
    return f", {percent:.1f} %" if percent >= 0.1 else ", less than 0.1 %" if part else ""
