"""The specification of the engine, written down naively, and checks of it."""

from __future__ import annotations

from collections.abc import Sequence

from snapfs.engine.engine import Engine
from snapfs.engine.layer import Layer
from tests.support.fakes import MemoryStore
from tests.support.images import CLUSTER, MemoryImage


def naive_source(layers: Sequence[Layer], index: int, cluster: int) -> Layer | None:
    """The layer in whose temp image the snapshot layers[index] finds a cluster, None: the image."""
    for layer in layers[index:]:
        if cluster < len(layer.done) and layer.done.get(cluster):
            return layer
    return None


def naive_pending(layers: Sequence[Layer], cluster: int) -> bool:
    return any(
        cluster < len(layer.access)
        and layer.access.get(cluster)
        and naive_source(layers, index, cluster) is None
        for index, layer in enumerate(layers)
    )


def naive_wanted(layers: Sequence[Layer], index: int, cluster: int) -> bool:
    """Does some snapshot find the cluster in the temp image of layers[index]?"""
    return any(
        cluster < len(layers[older].access)
        and layers[older].access.get(cluster)
        and naive_source(layers, older, cluster) is layers[index]
        for older in range(index + 1)
    )


def naive_content(image: MemoryImage, layers: Sequence[Layer], layer: Layer) -> bytes:
    """All bytes of a snapshot as its readers must find them, access aside."""
    index = layers.index(layer)
    result = bytearray()
    for cluster in range(layer.geometry.clusters):
        offset, length = layer.geometry.span(cluster, cluster + 1)
        source = naive_source(layers, index, cluster)
        data = (image if source is None else source.temp).data  # type: ignore[attr-defined]
        result += bytes(data[offset : offset + length]).ljust(length, b"\0")
    return bytes(result)


def pending_of(engine: Engine) -> list[bool]:
    pending = engine._stack.pending
    return [pending.get(cluster) for cluster in range(len(pending))]


def in_flight(engine: Engine) -> int:
    """Requests in any list of the engine, and pins."""
    return (
        len(engine.copier._copies)
        + len(engine._frozen_reads)
        + sum(layer.pins for layer in engine.layers)
        + sum(layer.pins - 1 for layer in engine._keeper.leaving)
    )


def check_bitmaps(engine: Engine) -> None:
    """What holds of the bitmaps at every moment."""
    layers = engine.layers
    for cluster, bit in enumerate(pending_of(engine)):
        assert naive_pending(layers, cluster) == bit, f"pending[{cluster}] is {bit}"
    for index, layer in enumerate(layers):
        for cluster in range(len(layer.done)):
            if layer.done.get(cluster):
                assert naive_wanted(layers, index, cluster), (
                    f"done[{cluster}] of layer {layer.id} serves nobody"
                )
        assert layer.live or not layer.access.any(0, len(layer.access))


def check_quiet(engine: Engine, store: MemoryStore) -> None:
    """What holds when nothing is going on, and no fault kept space from being freed."""
    assert 0 == in_flight(engine)
    assert 0 == store.under_way
    assert [] == store.misuse()
    check_bitmaps(engine)
    kept = [*engine.layers, *engine._keeper.leaving]  # the latter until a list can be saved
    assert {layer.id for layer in kept} == set(store.parts)
    assert sum(not temp.closed for temp in store.temps) == len(kept)
    assert {bitmap.id for bitmap in engine.tracker.bitmaps} == set(store.bitmaps.files)
    for layer in engine.layers:
        temp = store.temp(layer)
        assert temp.size() == layer.geometry.size
        for cluster in range(layer.geometry.clusters):
            offset, length = layer.geometry.span(cluster, cluster + 1)
            if temp.has_data(offset, offset + length):
                assert layer.done.get(cluster), f"temp space leaked: layer {layer.id}, {cluster}"
                assert any(temp.data[offset : offset + length]), "zeros take space in temp"


def covered_clusters(size: int, offset: int, length: int) -> set[int]:
    """Clusters that lie inside the range as a whole, naively."""
    return {
        cluster
        for cluster in range(-(-size // CLUSTER))
        if offset <= cluster * CLUSTER and min((cluster + 1) * CLUSTER, size) <= offset + length
    }


def touched_clusters(offset: int, length: int) -> set[int]:
    if length <= 0:
        return set()
    return set(range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1))
