"""Hands the engine's state to the request filter, which answers what needs no policy.

The filter asks for it at the start of each drain of /dev/fuse; during the drain
the trio thread is in the filter, so that the state cannot change under it.  With
`-o no_fastpath`, or when the filter cannot, every request goes through Python.
"""

from __future__ import annotations

import mmap

from . import requestfilter
from .cbw import Engine
from .image import FileImage, Image
from .pagecache import PageCache

FIRST_SNAPSHOT = 4096  # inode of a layer with id 0; that of `active` is 2, in fastpath.c too


class FastPath:
    """The fast path of one mount.

    `busy` counts the requests that tasks are working on: while there are some
    the filter does not wait for more.
    """

    def __init__(self, engine: Engine, page_cache: PageCache, activity: mmap.mmap) -> None:
        self.busy = 0
        self._engine = engine
        self._page_cache = page_cache
        self._activity = activity
        self._counted: dict[str, int] = requestfilter.fastpath_statistics()

    def start(self) -> bool:
        """Switch it on; False if the filter cannot."""
        return requestfilter.set_fastpath(self._publish)

    def stop(self) -> None:
        """Switch it off, before the engine goes."""
        requestfilter.set_fastpath(None)
        self.collect()

    def _publish(self) -> requestfilter.Published | None:
        moment = self._engine.moment()
        quarantined = self._page_cache.quarantined()
        return (
            _descriptor(moment.image),
            moment.size,
            moment.cluster_size.bit_length() - 1,
            moment.writable,
            self.busy > 0,
            moment.dirty,
            moment.frozen,
            [
                (
                    FIRST_SNAPSHOT + layer.id,
                    layer.size,
                    _descriptor(layer.temp),
                    layer.readable and FIRST_SNAPSHOT + layer.id not in quarantined,
                    layer.access,
                    layer.done,
                )
                for layer in moment.layers
            ],
            moment.pending,
            self._activity,
        )

    def collect(self) -> dict[str, int]:
        """Add what was answered since the last time to the engine's counters.

        Returns the totals of the process, their sum as `requests`, and `on`.
        """
        found = requestfilter.fastpath_statistics()
        found["requests"] = found["reads"] + found["writes"] + found["snapshot_reads"]
        counters = self._engine.counters
        counters.reads += found["reads"] - self._counted["reads"]
        counters.writes += found["writes"] - self._counted["writes"]
        counters.snapshot_reads += found["snapshot_reads"] - self._counted["snapshot_reads"]
        self._counted = found
        return found


def _descriptor(image: Image) -> int:
    if not isinstance(image, FileImage):
        raise TypeError("the fast path serves files only")
    return image.fd
