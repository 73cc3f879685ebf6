"""The line of a long job on a terminal: as much as fits, and never more than one line."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from ..client.documents import human

BAR = 20  # columns that are given to it if there is room
GAP = "  "


class Line(ProgressColumn):
    """What it is and per cent, then as much of the rest as `width()` columns take.

    `full` and `rest`: what the bar is made of.
    """

    def __init__(self, width: Callable[[], int], full: str = "━", rest: str = " ") -> None:
        super().__init__()
        self._width = width
        self._full, self._rest = full, rest

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        total = int(task.total or 0)
        done = min(int(task.completed), total)
        share = done / total if total else 1.0
        percent = f"{int(share * 100):3} %"
        words = [task.description]
        if task.speed:
            words.append(f"{human(task.speed)}/s")
            words.append(f"{_clock((total - done) / task.speed)} left")
        words.append(f"{human(done)} of {human(total)}")
        room = self._width() - len(percent)
        line = Text(no_wrap=True, overflow="crop")
        shown: list[str] = []
        for word in words:
            if len(word) + len(GAP) > room:
                break
            room -= len(word) + len(GAP)
            shown.append(word)
        line.append(GAP.join([*shown[:1], ""]))
        if room >= BAR + len(GAP):
            filled = int(share * BAR)
            line.append(self._full * filled, "bar.complete")
            line.append(self._rest * (BAR - filled), "bar.back")
            line.append(GAP)
        line.append(GAP.join([percent, *shown[1:]]))
        return line


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def glyphs(console: Console) -> tuple[str, str]:
    """What a bar is made of: its full part, and the rest, which only a colour tells from it."""
    full = "-" if console.options.ascii_only else "━"
    return full, " " if console.no_color or console.color_system is None else full


def start(what: str, total: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Begin one on stderr; returns what counts bytes, and what ends it."""
    console = Console(stderr=True)
    progress = Progress(Line(lambda: console.width, *glyphs(console)), console=console)
    task = progress.add_task(what, total=total)
    progress.start()
    return lambda count: progress.advance(task, count), progress.stop
