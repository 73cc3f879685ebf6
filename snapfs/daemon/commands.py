"""What the control socket can be asked; the requests and answers of control.py."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from attrs import asdict

from .. import errors
from ..engine.engine import Engine, check_pinned
from ..engine.layer import Layer
from ..engine.snapshotreader import marked
from .bitmapcommands import BitmapCommands, flag, optional
from .control import number, text
from .describe import (
    describe_engine,
    describe_event,
    describe_extent,
    describe_snapshot,
    describe_snapshots,
    describe_space,
    timestamp,
)
from .health import problems

log = logging.getLogger(__name__)

MAX_WAIT = 25  # seconds that a request waits for an event
MAP_PAGE = 5000  # extents in one answer
FAST_COUNTERS = ("requests", "reads", "writes", "snapshot_reads")  # of FastPath.collect


class Commands:
    """What the control socket can be asked."""

    def __init__(
        self,
        engine: Engine,
        image: str,
        mountpoint: str,
        durability: str,
        fast_path: Callable[[], Mapping[str, int]],
        temp_directory: str,
        trouble: Callable[[], str | None],
        open_files: Callable[[], tuple[int, int]] = lambda: (0, 0),
        region_reads: Callable[[int], Sequence[int]] = lambda _size: (),
    ) -> None:
        self._engine = engine
        self._image = image
        self._mountpoint = mountpoint
        self._durability = durability
        self._fast_path = fast_path  # `FastPath.collect`
        self._temp_directory = temp_directory
        self._bitmaps = BitmapCommands(engine)
        self._trouble = trouble  # why the FUSE face is not healthy, if it is not
        self._open_files = open_files  # for reading, and of `active` for writing
        self._region_reads = region_reads  # `FastPath.region_reads`
        self._since_ns = time.time_ns()

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """The commands by name."""
        names = (
            "create",
            "delete",
            "rename",
            "annotate",
            "list",
            "show",
            "status",
            "map",
            "regions",
            "runs",
            "limit",
            "events",
        )
        return {**self._bitmaps.table(), **{name: getattr(self, name) for name in names}}

    def visible(self) -> Mapping[str, Callable[..., Any]]:
        """Those that change nothing, not even what the kernel has written back."""
        shown = (self.list, self.status, self.regions, self.events)
        return {"map": self._map_as_it_is, **{each.__name__: each for each in shown}}

    async def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Create a snapshot; with `unnamed` under a name that tells the time."""
        unnamed = flag(request, "unnamed")
        name = "" if unnamed else text(request, "name")
        wanted: dict[str, Any] = {
            "selection": self._bitmaps.selection(request),
            "note": optional(request, "note"),
            "pinned": flag(request, "pinned"),
        }
        if unnamed:
            layer = await self._create_unnamed(wanted)
        else:
            layer = await self._engine.create_snapshot(name, **wanted)
        self._bitmaps.unstage(request)
        return describe_snapshot(layer)

    async def _create_unnamed(self, wanted: Mapping[str, Any]) -> Layer:
        """Several of one second get numbers: the first that is free, whoever creates meanwhile."""
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        for number_ in itertools.count(1):
            name = moment if number_ == 1 else f"{moment}-{number_}"
            try:
                return await self._engine.create_snapshot(name, **wanted)
            except errors.SnapshotExists:
                continue
        raise AssertionError

    async def delete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Delete a snapshot; with `dry_run` only look whether that can be."""
        name = text(request, "name")
        await self._engine.space.refresh()
        found = self._engine.find(name)
        check_pinned(found)
        described = describe_snapshot(found)
        if not request.get("dry_run"):
            await self._engine.delete_snapshot(name)
        return described

    async def rename(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Rename a snapshot."""
        old, new = text(request, "name"), text(request, "new")
        await self._engine.rename_snapshot(old, new)
        return describe_snapshot(self._engine.find(new))

    async def annotate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Set the `note` of a snapshot, or whether it is `pinned`."""
        name = text(request, "name")
        pinned = flag(request, "pinned") if "pinned" in request else None
        await self._engine.annotate_snapshot(name, note=optional(request, "note"), pinned=pinned)
        return describe_snapshot(self._engine.find(name))

    async def list(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """All snapshots, oldest first."""
        self._engine.check_storage()
        await self._engine.space.refresh()
        return {
            "snapshots": await describe_snapshots(self._engine.snapshots, self._engine.receiver)
        }

    async def show(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One snapshot."""
        self._engine.check_storage()
        await self._engine.space.refresh()
        return {"snapshot": describe_snapshot(self._engine.find(text(request, "name")))}

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The mount as a whole."""
        self._engine.check_storage()
        await self._engine.space.refresh()
        self._engine.refresh()
        fast = self._fast_path()
        status = await describe_engine(self._engine)
        status["counters"] |= {f"fastpath_{kind}": fast[kind] for kind in FAST_COUNTERS}
        found = problems(self._engine, self._trouble(), self._mountpoint, self._image)
        grave = [each.message for each in found if each.severity == "error"]
        status["image"] = {"path": self._image, **status["image"]}
        status["temp"] = {"directory": self._temp_directory, **status["temp"]}
        readers, writers = self._open_files()
        status["open"] = {"readers": readers, "writers": writers}
        status["problems"] = [asdict(each) for each in found]
        status["mount"] = {
            "mountpoint": self._mountpoint,
            "pid": os.getpid(),
            "since": timestamp(self._since_ns),
            "healthy": not grave,
            "reason": grave[0] if grave else None,
            "durability": self._durability,
            "fastpath": bool(fast["on"]),
        }
        return status

    async def regions(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The image in some two thousand regions: clusters of each by what they are, and reads."""
        self._engine.check_storage()
        found = await self._engine.survey.take()
        reads = list(found.reads)
        for region, count in enumerate(self._region_reads(found.region_size)[: len(reads)]):
            reads[region] += count
        return {
            "size": found.size,
            "region_size": found.region_size,
            "cluster_size": found.cluster_size,
            "clusters": found.clusters,
            "reads": reads,
        }

    async def map(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Some extents of a file from `offset` on, and where the next page begins, or null.

        `dirty` tells of the bitmap named by `bitmap`, else of any.  With `rows`
        an extent is [start, length, data, accessible, source, dirty].
        """
        if text(request, "file") == "active":
            await self._engine.write_back()
        return await self._map_as_it_is(request)

    async def _map_as_it_is(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`map`, where data of `active` counts that has reached the image."""
        offset = number(request, "offset", 0)
        rows = flag(request, "rows")
        layer = self._find(text(request, "file"))
        dirty = self._bitmaps.dirty(optional(request, "bitmap"))
        if layer is not None:
            self._engine.open_snapshot(layer)
        try:
            found, following = await self._engine.map_page(layer, offset, MAP_PAGE)
        finally:
            if layer is not None:
                await self._engine.close_snapshot(layer)
        cut = marked(found, dirty, self._engine.geometry)
        extents = list(cut) if rows else [describe_extent(each) for each in cut]
        return {"extents": extents, "next": following}

    async def runs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Some runs that a trim of a range punches, and where to go on, or null.

        Of a snapshot those of accessible clusters that lie inside the range as a
        whole, of `active` those of data, cut at the ends of the range, which must
        both be given.  Runs shorter than `minimum` bytes are left out.
        """
        layer = self._find(text(request, "file"))
        minimum = max(1, number(request, "minimum", 0))
        if layer is None:
            return await self._data_runs(request, minimum)
        offset = number(request, "offset", 0)
        length = number(request, "length", layer.geometry.size)
        clusters = layer.geometry.covered(offset, length)
        found: list[tuple[int, int]] = []
        for first, stop in layer.access.runs(clusters.start, clusters.stop):
            start, count = layer.geometry.span(first, stop)
            if len(found) == MAP_PAGE:
                return {"runs": found, "next": start}
            if count >= minimum:
                found.append((start, count))
        return {"runs": found, "next": None}

    async def _data_runs(self, request: Mapping[str, Any], minimum: int) -> dict[str, Any]:
        """`runs` of active: a hole is no run, so that it does not become dirty either."""
        if "offset" not in request or "length" not in request:
            raise errors.UsageError(
                "active is the live disk, and trimming all of it destroys it: give the range "
                "with both -o and -l, or run fstrim(8) in the guest, which knows what is free"
            )
        offset = number(request, "offset", 0)
        end = min(self._engine.geometry.size, offset + number(request, "length", 0))
        if offset > self._engine.geometry.size:
            raise errors.InvalidRange(f"offset {offset} is beyond the end of active")
        await self._engine.write_back()
        extents, following = await self._engine.map_page(None, offset, MAP_PAGE)
        found = [
            (extent.start, min(extent.stop, end) - extent.start)
            for extent in extents
            if extent.data and extent.start < end
        ]
        more = following is not None and following < end
        return {
            "runs": [run for run in found if run[1] >= minimum],
            "next": following if more else None,
        }

    async def events(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Events with a number above `after`; waits `seconds`, 25 at most, if there are none."""
        seconds = min(number(request, "seconds", 0), MAX_WAIT)
        found = await self._engine.events.after(number(request, "after", 0), seconds)
        return {"events": [describe_event(event) for event in found]}

    async def limit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Bound the space of all temp images; without `bytes` not at all."""
        limit = number(request, "bytes", 0) if "bytes" in request else None
        self._engine.space.set_limit(limit)
        log.info("temp-limit is %s", "off" if limit is None else limit)
        await self._engine.space.refresh()
        return self._temp()

    def _temp(self) -> dict[str, Any]:
        return {"directory": self._temp_directory, **describe_space(self._engine)}

    def _find(self, path: str) -> Any:
        """The layer of a file by its path in the mount, None for `active`."""
        if path == "active":
            return None
        directory, _, name = path.partition("/")
        if directory != "snapshots":
            raise errors.NotFound(f"{path or 'the mountpoint'} is neither active nor a snapshot")
        return self._engine.find(name)
