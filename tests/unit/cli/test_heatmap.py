"""The heat map: what a cell shows, in a terminal of any size and in a picture."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from snapfs.cli import picture, watch
from snapfs.cli.heatmap import LOOKS, SHADES, cells, totals
from tests.support.answers import CLUSTER, problem, regions, snapshot, status

WHEN = "2026-11-30T18:00:00+00:00"
SVG = "{http://www.w3.org/2000/svg}"


def kinds(answer, count=8, before=None) -> list[str]:
    return [cell.kind for cell in cells(answer, count, before)]


def test_the_worst_is_shown_and_then_what_goes_on():
    found = kinds(
        regions(
            lost={0: 1}, reads={0: 5, 1: 1}, copied={0: 10, 1: 10, 2: 1}, discarded={2: 9, 3: 5},
            needed={3: 5, 4: 5, 6: 1}, dirty={3: 1, 4: 10, 5: 1},
        )
    )  # fmt: skip
    assert ["lost", "read", "copied", "discarded", "dirty", "dirty", "needed", "none"] == found


def test_a_cell_has_what_its_regions_have():
    answer = regions(10, copied={0: 10, 1: 5}, lost={9: 1})
    first, second, third = cells(answer, 3)
    assert ((0, 30), (30, 60), (60, 100)) == tuple(
        (cell.start // CLUSTER, cell.stop // CLUSTER) for cell in (first, second, third)
    )
    assert (0.5, 1 / 40) == (first.shares["copied"], third.shares["lost"])
    assert 10 == len(cells(answer, 1000))
    assert [] == cells({**regions(0), "size": 0}, 10)


def test_the_last_region_may_be_short():
    answer = {**regions(2, copied={1: 3}), "size": 12 * CLUSTER + 1}
    assert 1.0 == cells(answer, 2)[1].shares["copied"]


def test_copied_cells_have_shades():
    answer = regions(5, copied={0: 1, 1: 3, 2: 6, 3: 8, 4: 10})
    for ascii_only in (False, True):
        found = "".join(cell.glyph(ascii_only) for cell in cells(answer, 5))
        assert SHADES[ascii_only] + SHADES[ascii_only][3] == found
    assert 7 == len({look.glyph for look in LOOKS.values()})
    assert all(look.ascii.isascii() for look in LOOKS.values())


def test_reads_are_those_since_a_moment():
    answer = regions(3, reads={0: 5, 1: 5})
    assert ["none", "read", "none"] == kinds(answer, 3, before=[5, 4, 9])
    assert ["read", "read", "none"] == kinds(answer, 3, before=[0])  # of regions of another size


def test_sums_are_no_more_than_the_image():
    assert 80 * CLUSTER == totals(regions(dirty=dict.fromkeys(range(8), 11)))["dirty"]


# The picture


def drawn(answer, found) -> ElementTree.Element:
    return ElementTree.fromstring(picture.svg(answer, found, WHEN))


def test_the_picture_has_title_description_legend_and_every_cell():
    found = regions(100, copied={3: 10}, reads={7: 1, 8: 1}, lost={50: 1})
    answer = status(snapshot(1, "s"), mount={"healthy": False, "reason": "1 is lost"})
    root = drawn(answer, found)
    assert "img" == root.get("role")
    assert "snapfs: /vm/disk.img" == root.findtext(f"{SVG}title")
    description = root.findtext(f"{SVG}desc") or ""
    assert "1 snapshot, temp images take 8 MiB of 16 MiB; not healthy: 1 is lost" in description
    assert "copied 640 KiB" in description
    squares = sum(
        path.get("d", "").count("M") for path in root.iter(f"{SVG}path")
        if not (path.get("fill") or "url").startswith("url")
    )  # fmt: skip
    assert 100 + len(LOOKS) == squares
    assert 2 + 1 == len(list(root.iter(f"{SVG}circle")))
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    for look in LOOKS.values():
        assert look.words in words or look.words == "being read"
    assert "One cell is 640 KiB" in words


def test_the_picture_does_nothing_but_being_looked_at():
    text = picture.svg(status(), regions(), WHEN)
    assert not re.search(r"<script|onload|href|http(?!://www.w3.org/2000/svg)", text)


def test_everything_drawn_is_inside():
    root = drawn(status(), regions(2048, copied=dict.fromkeys(range(2048), 3)))
    width, height = int(root.get("width") or 0), int(root.get("height") or 0)
    assert (0, 0) < (width, height) < (1000, 800)
    for text in root.iter(f"{SVG}text"):
        assert 0 < int(text.get("x") or 0) < width and 0 < int(text.get("y") or 0) < height
    for path in root.iter(f"{SVG}path"):
        for x, y in re.findall(r"M(\d+) (\d+)h", path.get("d") or ""):
            assert int(x) + picture.CELL <= width and int(y) + picture.CELL <= height


def test_hostile_names_are_text():
    answer = status(image={"path": "/vm/<script>&\x1b\udcff" + "x" * 500})
    root = drawn(answer, regions())
    assert root.findtext(f"{SVG}title", "").startswith("snapfs: /vm/<script>&\\x1b?x")
    head = next(root.iter(f"{SVG}text")).text or ""
    assert len(head) < 100 and head.endswith("…")


def test_an_empty_image_has_a_picture():
    assert "snapfs" in (drawn(status(), {**regions(0), "size": 0}).findtext(f"{SVG}title") or "")


# The screen


def shown(width: int, height: int, answer, found, encoding: str = "utf-8") -> list[str]:
    looks = watch.Looks()
    looks.add(answer, {**found, "reads": [0] * len(found["reads"])}, 1.0)
    looks.add(answer, found, 2.0)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(width=width, height=height, file=file, force_terminal=True, color_system=None)
    console.print(watch.Screen(looks), height=height)
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


BUSY = status(
    *(snapshot(number, f"snapshot-{number}", state="lost" if number == 2 else "ok")
      for number in range(20)),
    mount={"healthy": False},
    problems=[problem(words="p " * 100)] * 5,
)  # fmt: skip
MAP = regions(
    2048, needed=dict.fromkeys(range(2048), 10), copied=dict.fromkeys(range(0, 2048, 3), 10),
    lost={5: 1}, reads={900: 9},
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "height"), [(80, 24), (200, 60), (132, 43), (40, 12), (20, 6), (10, 3), (80, 5)]
)
@pytest.mark.parametrize("answer", [status(), BUSY])
@pytest.mark.parametrize("found", [MAP, regions(3), {**regions(0), "size": 0}])
def test_the_screen_fits(width, height, answer, found):
    lines = shown(width, height, answer, found)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("/mnt/d"[:width])


def test_a_terminal_of_80_by_24_shows_all_there_is():
    lines = shown(80, 24, BUSY, MAP)
    text = "\n".join(lines)
    assert 24 == len(lines)
    assert "NOT HEALTHY" in lines[0]
    for words in (
        "what to do: delete them", "and 2 more", "Temp", "Copies", "Use", "a cell", "snapshot-2 ",
        "snapshot-19 ", "lost", "being read", "in no snapshot",
    ):  # fmt: skip
        assert words in text, words
    marks = [line for line in lines if set(line) <= set("!◆░▒▓█-·+%")]
    assert len(marks) >= watch.LEAST_MAP
    assert {"!", "◆"} <= set("".join(marks))


def test_a_larger_terminal_has_a_larger_map():
    small, large = ("\n".join(shown(*size, status(), MAP)) for size in ((80, 24), (200, 60)))
    assert large.count("█") > 2 * small.count("█")


def test_a_terminal_without_utf8_has_other_marks():
    assert "\n".join(shown(80, 24, BUSY, MAP, "ascii")).isascii()


def test_rates_are_those_between_two_looks():
    looks = watch.Looks()
    looks.add(status(), regions(), 10.0)
    assert 0 == looks.rate("counters", "writes")
    looks.add(status(counters={"writes": 70}), regions(), 12.0)
    assert 25 == looks.rate("counters", "writes")
    looks.add(status(counters={"writes": 0}), regions(), 13.0)  # the daemon is another one
    assert 0 == looks.rate("counters", "writes")


def test_a_region_is_being_read_for_some_looks():
    looks = watch.Looks()
    for reads in (0, 1, 1, 1):
        looks.add(status(), regions(1, reads={0: reads}), 1.0)
        assert looks.regions
        last = kinds(looks.regions, 1, looks.reads_before())
        assert ["read" if reads else "none"] == last
    looks.add(status(), regions(1, reads={0: 1}), 1.0)
    assert looks.regions and ["none"] == kinds(looks.regions, 1, looks.reads_before())
