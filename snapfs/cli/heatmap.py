"""The image as cells of a picture: what each shows, for terminals and for SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Look(NamedTuple):
    """How a kind of cells looks.

    `glyph`: in UTF-8, or two of them: in ASCII.  `style`: of rich.  `colour`: of SVG; all are
    told apart by people who see fewer colours than others (Okabe and Ito), and by their marks.
    """

    glyph: str
    ascii: str
    style: str
    colour: str
    words: str


SHADES = ("░▒▓█", "1234")  # of copied cells: up to a quarter, a half, three quarters, all

# What a cell shows is the first of these that holds for some of it; see `Cell.kind`.
LOOKS: Mapping[str, Look] = {
    "lost": Look("!", "!", "bold white on red", "#d55e00", "lost"),
    "read": Look("◆", "r", "bold cyan", "#f0e442", "being read"),
    "copied": Look("▓", "#", "bright_blue", "#0072b2", "copied"),
    "discarded": Look("%", "%", "magenta", "#cc79a7", "discarded"),
    "dirty": Look("+", "+", "yellow", "#e69f00", "dirty"),
    "needed": Look("-", "-", "green", "#8fd0bb", "kept if it changes"),
    "none": Look("·", ".", "dim", "#eeeeee", "in no snapshot"),
}


class Cell(NamedTuple):
    """A piece of the image.  `shares`: 0 to 1 of its clusters, by kind.  `reads`: lately."""

    start: int
    stop: int
    shares: Mapping[str, float]
    reads: int

    @property
    def kind(self) -> str:
        """What it shows, of LOOKS.

        The worst first, then what is going on.  A cell is discarded where more of it was than
        is needed: backups discard behind themselves, and it is told how far they are.
        """
        shares = self.shares
        if shares["lost"]:
            return "lost"
        if self.reads:
            return "read"
        if shares["copied"]:
            return "copied"
        if shares["discarded"] and shares["discarded"] >= shares["needed"]:
            return "discarded"
        return next((kind for kind in ("dirty", "needed") if shares[kind]), "none")

    def glyph(self, ascii_only: bool = False) -> str:
        """One letter."""
        look = LOOKS[self.kind]
        if self.kind == "copied":
            return SHADES[ascii_only][min(3, int(4 * self.shares["copied"]))]
        return look.ascii if ascii_only else look.glyph


def cells(
    regions: Mapping[str, Any], count: int, before: Sequence[int] | None = None
) -> list[Cell]:
    """The image in `count` cells of nearly one size, or in as many as there are regions.

    `regions`: what the daemon answers.  `before`: reads by region that are not lately any
    more; None: all are.
    """
    reads = regions["reads"]
    if before is not None and len(before) == len(reads):
        # They begin anew when the image gets another size.
        reads = [max(0, now - then) for now, then in zip(reads, before, strict=True)]
    total = len(reads)
    count = min(count, total)
    size, region, cluster = regions["size"], regions["region_size"], regions["cluster_size"]
    found = []
    for number in range(count):
        first, stop = number * total // count, (number + 1) * total // count
        start, end = first * region, min(stop * region, size)
        clusters = -(-(end - start) // cluster)
        shares = {
            kind: sum(values[first:stop]) / clusters for kind, values in regions["clusters"].items()
        }
        found.append(Cell(start, end, shares, sum(reads[first:stop])))
    return found


def totals(regions: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the image by kind, no more than it has."""
    size, cluster = regions["size"], regions["cluster_size"]
    return {kind: min(size, sum(values) * cluster) for kind, values in regions["clusters"].items()}
