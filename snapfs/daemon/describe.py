"""What status, list and map say, as plain JSON values (shapes in snapfs(1))."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from attrs import asdict

from ..engine.copytimes import BOUNDS, CopyTimes
from ..engine.dirty import DirtyBitmap
from ..engine.engine import Engine
from ..engine.events import Event
from ..engine.geometry import Geometry
from ..engine.layer import Layer
from ..engine.snapshotreader import Extent
from ..engine.turns import Turns


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 in UTC, of nanoseconds since 1970."""
    text = datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")


def describe_event(event: Event) -> dict[str, Any]:
    """One event, with what belongs to its kind."""
    return {
        "number": event.number,
        "time": timestamp(event.when_ns),
        "event": event.kind,
        **event.details,
    }


def describe_snapshot(layer: Layer, receiving: bool = True) -> dict[str, Any]:
    """One snapshot.  Bytes and clusters are integers, times RFC 3339 in UTC.

    `receiving`: it may get copies.
    """
    total = layer.geometry.clusters
    return {
        "name": layer.name,
        "id": layer.id,
        "created": timestamp(layer.created_ns),
        "size": layer.geometry.size,
        "state": layer.state,
        "reason": layer.reason,
        "errno": layer.errno,
        "since": None if layer.since_ns is None else timestamp(layer.since_ns),
        "clusters": {
            "total": total,
            "accessible": layer.accessible,
            "copied": layer.copied(receiving),
            "lost": layer.lost,
            "discarded": layer.granted - layer.accessible - layer.lost,
        },
        "temp_bytes": layer.temp_bytes,
        "open": layer.openers,
        "bitmap": layer.bitmap,
        "note": layer.note,
        "pinned": layer.pinned,
    }


def describe_bitmap(bitmap: DirtyBitmap, geometry: Geometry) -> dict[str, Any]:
    """One dirty bitmap, in the keys of QMP; `granularity` and `count` are bytes.

    `began`: since when it has every change, which is `created` of the snapshot in whose instant
    it was made or cleared; null if it is from before that was kept.
    """
    consistent = bitmap.parts is not None
    return {
        "name": bitmap.name,
        "granularity": geometry.cluster_size,
        "count": bitmap.count(geometry.clusters) * geometry.cluster_size,
        "began": None if bitmap.began_ns is None else timestamp(bitmap.began_ns),
        "recording": consistent,
        "busy": bitmap.busy,
        "persistent": True,
        "inconsistent": not consistent,
        "reason": bitmap.reason,
    }


def describe_extent(extent: Extent) -> dict[str, Any]:
    """One extent, in the keys of `qemu-img map` and ours."""
    return {
        "start": extent.start,
        "length": extent.length,
        "depth": 0,
        "present": extent.accessible,
        "zero": not extent.data,
        "data": extent.data,
        "offset": extent.start,
        "accessible": extent.accessible,
        "dirty": extent.dirty,
        "source": extent.source,
    }


async def describe_snapshots(
    layers: Sequence[Layer], receiver: Callable[[], Layer | None]
) -> list[dict[str, Any]]:
    """Many snapshots, whose clusters take a while to be counted."""
    turns, found = Turns(), []
    for layer in layers:
        if layer.visible and layer.name is not None:  # still
            found.append(describe_snapshot(layer, layer is receiver()))
        await turns.take()
    return found


def describe_space(engine: Engine) -> dict[str, Any]:
    """Temp space, in bytes."""
    space = engine.space.status()
    return {
        "used_bytes": space.used,
        "limit_bytes": space.limit,
        "room_bytes": space.room,
        "warning_percent": space.warning,
        "seconds_left": None if space.seconds_left is None else round(space.seconds_left),
        "bytes_per_second": round(space.rate),
        "age_seconds": None if space.age is None else round(space.age, 1),
    }


def describe_copies(times: CopyTimes) -> dict[str, Any]:
    """How long copies took: `buckets` as [seconds, how many took up to that], null: any time."""
    bounds = [*BOUNDS, None]
    sums = itertools.accumulate(times.counts)
    return {
        "count": sum(times.counts),
        "seconds": round(times.seconds, 6),
        "buckets": [list(pair) for pair in zip(bounds, sums, strict=True)],
    }


async def describe_engine(engine: Engine) -> dict[str, Any]:
    """The parts of status that the engine knows: image, snapshots, temp, counters."""
    return {
        "image": {"size": engine.size, "cluster_size": engine.geometry.cluster_size},
        "snapshots": await describe_snapshots(engine.snapshots, engine.receiver),
        "bitmaps": [describe_bitmap(each, engine.geometry) for each in engine.tracker.bitmaps],
        "temp": describe_space(engine),
        "copies": describe_copies(engine.copier.times),
        "counters": asdict(engine.counters),
    }
