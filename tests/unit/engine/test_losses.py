"""The record of losses: what a kill between two stores leaves is the one before or after."""

from __future__ import annotations

import pytest

from snapfs.engine.bitmap import Bitmap
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import LOSSES_BYTES, Layer, LayerParts, LayerRecord
from tests.support.images import MemoryImage

GEOMETRY = Geometry(3 * 4096, 4096)


class Stores(bytearray):
    """Keeps what the record was before each store of details."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.before: list[bytes] = []

    def __setitem__(self, key, value) -> None:
        self.before.append(bytes(self))
        super().__setitem__(key, value)


def layer_of(losses: bytearray) -> Layer:
    parts = LayerParts(Bitmap(3), Bitmap(3), MemoryImage(bytes(GEOMETRY.size)), losses)
    return Layer.from_record(LayerRecord(1, "s", 0, GEOMETRY.size), parts, 4096)


def test_details_are_stored_once_and_before_they_count():
    losses = Stores(LOSSES_BYTES)
    layer = layer_of(losses)
    layer.lose(2, "no space", 28)
    layer.lose(3, "another reason", 5)
    assert 1 == len(losses.before)
    assert bytes(8) == losses.before[0][:8]
    found = layer_of(losses)
    assert (5, "incomplete", "no space", 28) == (found.lost, found.state, found.reason, found.errno)


@pytest.mark.parametrize("stored", range(8, LOSSES_BYTES + 1))
def test_details_that_were_being_stored_do_not_count(stored):
    losses = bytearray(LOSSES_BYTES)
    layer_of(losses).lose(2, "no space", 28)
    torn = bytearray(8) + losses[8:stored] + bytes(LOSSES_BYTES - stored)
    found = layer_of(torn)
    assert (0, "ok", None) == (found.lost, found.state, found.reason)
