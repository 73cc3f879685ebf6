"""Which clusters differ between two moments of an image, from what was copied.

A cluster that a snapshot may still read was pending from its creation on until
it was copied, and the first write copied it: into the layer that was the
newest then.  So for a cluster that the older snapshot may read

    changed since a            some layer from a on has it done
    changed between a and b    some layer from a on, and before b, has it done

exactly, but for writes of the same bytes.  For a cluster that it may not read
(outside its bitmap, discarded, lost) nobody knows: no copy was made of it.
Plain `def`, task-atomic, no I/O.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Literal

from bitarray import bitarray
from bitarray.util import ones, zeros

from . import bitmap
from .bitmap import Bitmap
from .geometry import Geometry
from .layer import Layer

Answer = Literal["changed", "unknown"]


def differences(
    layers: Sequence[Layer], a: Layer, b: Layer | None, now: Geometry
) -> tuple[bitarray, bitarray]:
    """Clusters that differ between two snapshots of `layers`, and those of which nobody knows.

    `b` None: the image now, of geometry `now`.  Their order does not matter.
    Clusters that only one of the two moments has differ, and so does the last
    one of the shorter if it is short.
    """
    first = layers.index(a)
    last = len(layers) if b is None else layers.index(b)
    if last < first:
        assert b is not None
        first, last, a, b = last, first, b, a
    sizes = sorted((a.geometry.size, now.size if b is None else b.geometry.size))
    clusters = a.geometry.resized(sizes[1]).clusters
    count = a.geometry.clusters
    changed = zeros(max(clusters, count), endian="little")
    unknown = zeros(len(changed), endian="little")
    if first == last:
        return changed[:clusters], unknown[:clusters]
    for layer in layers[first:last]:
        end = min(count, len(layer.done))
        changed[:end] |= layer.done.slice(0, end)
    access = a.access.slice(0, count)
    changed[:count] &= access
    unknown[:count] = ~access
    only = a.geometry.touched(sizes[0], sizes[1] - sizes[0])
    changed[only.start : only.stop] = 1
    unknown[only.start : only.stop] = 0
    return changed[:clusters], unknown[:clusters]


def since(dirty: Bitmap, now: Geometry, then: Geometry) -> tuple[bitarray, bitarray]:
    """As `differences`, of a moment of geometry `then` from when a bitmap began.

    `dirty`: of the image now; so what was written after that moment counts as changed as well,
    and so does what an image that was cut meanwhile has no bits of any more.
    """
    known = min(now.clusters, then.clusters)
    changed = dirty.slice(0, known)
    changed.extend(ones(then.clusters - known, endian="little"))
    return changed, zeros(len(changed), endian="little")


def extents(
    geometry: Geometry, changed: bitarray, unknown: bitarray, first: int, limit: int
) -> list[tuple[int, int, Answer]]:
    """Up to `limit` (offset, length, what) from cluster `first` on, ascending and merged.

    In bytes, cut at the end of `geometry`.
    """
    stop = len(changed)
    both = heapq.merge(
        ((run, "changed") for run in bitmap.runs(changed, first, stop)),
        ((run, "unknown") for run in bitmap.runs(unknown, first, stop)),
    )
    return [
        (*geometry.span(*run), answer)  # type: ignore[misc]
        for run, answer in itertools.islice(both, limit)
    ]
