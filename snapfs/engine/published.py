"""The engine's state at one instant, as plain data for whoever answers requests beside it.

It is true until the next checkpoint and must not be kept longer.  The bits are
the engine's own: while somebody holds a buffer of them their bitmap can neither
grow nor be released.  Bit c of a bitmap is bit c % 8 of byte c // 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bitarray import bitarray

from ..storage.image import Image
from .durability import DoneFile


class PublishedLayer(NamedTuple):
    """One layer.

    `readable`: its state does not forbid reading as a whole.  `live`: it may receive
    copies; the newest does.  `temp` and the image have to be asked for what could not be
    written back after a snapshot was read from them, before the answer counts.
    """

    id: int
    size: int
    readable: bool
    live: bool
    temp: Image
    access: bitarray
    done: bitarray


class PublishedState(NamedTuple):
    """The image and its layers.

    `writable`: a write may pass that lies inside the size, touches no pending
    cluster and none of `frozen` and `promised` (ranges of clusters [first, stop)),
    and that first sets its bits in all of `dirty` (writable buffers) and announces
    itself to the store.  `promised`: where bits must become durable first.
    `dirty_durable`: those of a write must be, too: it may not pass unless they are set
    already.  `copying`: where copies are under way.  `layers`: oldest first.
    `done_file`: of the layer that receives copies, if they must survive a power cut:
    its done bits must be set there, too, when the copied data is durable, and be durable
    themselves before the image is written.  `failures`: how many mapped pages had failed
    (`LayerStore.failures`); when there are more, nothing of this counts.
    """

    image: Image
    size: int
    cluster_size: int
    writable: bool
    pending: bitarray
    frozen: list[tuple[int, int]]
    copying: list[tuple[int, int]]
    promised: list[tuple[int, int]]
    dirty: list[Any]
    dirty_durable: bool
    layers: list[PublishedLayer]
    done_file: DoneFile | None
    failures: int
