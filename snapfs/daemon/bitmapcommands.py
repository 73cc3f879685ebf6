"""What the control socket can be asked about dirty bitmaps; a part of commands.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import trio
from bitarray import bitarray

from .. import errors
from ..engine import difference
from ..engine.dirty import Selection, clusters_of
from ..engine.engine import Engine
from .control import number, text
from .describe import describe_bitmap

PAGE = 5000  # extents in one answer
MAX_STAGED = 8  # lists of extents at once that no snapshot was made of yet


def flag(request: Mapping[str, Any], key: str) -> bool:
    """A boolean of a request, by default False; raises UsageError if it is something else."""
    value = request.get(key, False)
    if not isinstance(value, bool):
        raise errors.UsageError(f"{key!r} of the request must be true or false")
    return value


def optional(request: Mapping[str, Any], key: str) -> str | None:
    """A string of a request, None if it is not there or null."""
    return None if request.get(key) is None else text(request, key)


def ranges(value: Any) -> list[tuple[int, int]]:
    """[[offset, length], ...] of a request; raises UsageError for anything else."""
    found = []
    for pair in value if isinstance(value, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int for n in pair):
            raise errors.UsageError("extents must be a list of [offset, length], in bytes")
        found.append((pair[0], pair[1]))
    return found


class BitmapCommands:
    """Commands on the bitmaps of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._staged: dict[int, bitarray] = {}  # extents that came in pieces; task-atomic
        self._tokens = itertools.count(1)

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """The commands by name."""
        names = ("add", "list", "clear", "remove", "merge")
        table = {f"bitmap_{name}": getattr(self, name) for name in names}
        return {**table, "stage": self.stage, "diff": self.diff}

    async def add(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A new bitmap."""
        bitmap = await self._engine.tracker.add(text(request, "name"))
        return describe_bitmap(bitmap, self._engine.geometry)

    async def list(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """All bitmaps."""
        geometry = self._engine.geometry
        bitmaps = [describe_bitmap(each, geometry) for each in self._engine.tracker.bitmaps]
        return {"bitmaps": bitmaps}

    async def clear(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Empty a bitmap, and make it consistent."""
        bitmap = await self._engine.tracker.clear(text(request, "name"))
        return describe_bitmap(bitmap, self._engine.geometry)

    async def remove(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Remove a bitmap."""
        described = describe_bitmap(
            self._engine.tracker.bitmaps.find(text(request, "name")), self._engine.geometry
        )
        await self._engine.tracker.remove(text(request, "name"))
        return described

    async def merge(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Add the clusters of `source` to `target`."""
        bitmap = await self._engine.tracker.merge(text(request, "source"), text(request, "target"))
        return describe_bitmap(bitmap, self._engine.geometry)

    async def stage(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep extents for a `create`, which can be too many for one request.

        Answers with a `token`; with a token in the request they are added to
        what it stands for.  The oldest list gives way to more than a few.
        """
        bits = self._clusters(request.get("extents"))
        if "token" in request:
            token = number(request, "token", 0)
            known = self._staged_bits(token)
            if len(known) != len(bits):
                raise errors.UsageError("the image changed its size meanwhile; begin again")
            known |= bits
        else:
            token = next(self._tokens)
            self._staged[token] = bits
            while len(self._staged) > MAX_STAGED:
                del self._staged[min(self._staged)]
        return {"token": token}

    def _staged_bits(self, token: int) -> bitarray:
        try:
            return self._staged[token]
        except KeyError:
            raise errors.UsageError("no such list of extents is kept; begin again") from None

    def _clusters(self, value: Any) -> bitarray:
        return clusters_of(self._engine.geometry, ranges(value))

    def selection(self, request: Mapping[str, Any]) -> Selection:
        """What a `create` asks for: bitmap, extents or token of a list, clear_bitmap, next."""
        extents: bitarray | None = None
        if request.get("extents") is not None:
            extents = self._clusters(request["extents"])
        elif request.get("token") is not None:
            extents = self._staged_bits(number(request, "token", 0))
        return Selection(
            optional(request, "bitmap"),
            extents,
            flag(request, "clear_bitmap"),
            optional(request, "next"),
        )

    def dirty(self, name: str | None) -> bitarray:
        """The clusters of a bitmap, or of any (None).  Raises BitmapNotFound, BitmapUnusable."""
        bitmaps, clusters = self._engine.tracker.bitmaps, self._engine.geometry.clusters
        if name is None:
            return bitmaps.any_of(0, clusters)
        return bitmaps.find(name).usable(clusters).slice(0, clusters)

    def unstage(self, request: Mapping[str, Any]) -> None:
        """The snapshot was created: what was staged for it can go."""
        self._staged.pop(request.get("token") or 0, None)

    async def diff(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Some extents that differ between snapshot `a` and `b`, or now, from `offset` on.

        With `bitmap` in place of `a`: that may differ from what was when this began; the answer
        then describes it as well.
        """
        engine = self._engine
        name = optional(request, "b")
        if name is None:
            await engine.write_back()
        if optional(request, "bitmap") is not None:
            return self._diff_since(request, name)
        older = engine.find(text(request, "a"))
        newer = None if name is None else engine.find(name)
        offset = number(request, "offset", 0)
        for layer in (older, newer):
            if layer is not None and layer.state == "lost":
                raise errors.SnapshotLost(f"snapshot {layer.name!r} is lost: {layer.reason}")
        changed, unknown = difference.differences(engine.layers, older, newer, engine.geometry)
        sizes = (older.geometry.size, engine.size if newer is None else newer.geometry.size)
        geometry = older.geometry.resized(max(sizes))
        await trio.lowlevel.checkpoint()
        first = geometry.touched(offset, 1).start
        return _page(difference.extents(geometry, changed, unknown, first, PAGE + 1))

    def _diff_since(self, request: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        engine = self._engine
        found = engine.tracker.bitmaps.find(text(request, "bitmap"))
        layer = None if name is None else engine.find(name)
        # Ids are given in the order of things, but that of a bitmap which a snapshot begins.
        if layer is not None and (found.id > layer.id or found.began_ns == layer.created_ns):
            raise errors.UsageError(
                f"bitmap {found.name!r} began with snapshot {name!r} or later, so it does not tell "
                "what had changed by then"
            )
        geometry = engine.geometry if layer is None else layer.geometry
        dirty = found.usable(engine.geometry.clusters)
        changed, unknown = difference.since(dirty, engine.geometry, geometry)
        first = geometry.touched(number(request, "offset", 0), 1).start
        extents = difference.extents(geometry, changed, unknown, first, PAGE + 1)
        return {**_page(extents), "bitmap": describe_bitmap(found, engine.geometry)}


def _page(found: Iterable[tuple[int, int, str]]) -> dict[str, Any]:
    extents = [
        {"start": start, "length": length, "state": answer} for start, length, answer in found
    ]
    return {
        "extents": extents[:PAGE],
        "next": extents[PAGE]["start"] if len(extents) > PAGE else None,
    }
