"""Offsets and clusters: pure arithmetic.

Cluster c covers the bytes [c*C, min((c+1)*C, S)) of an image of S bytes with
cluster size C; the last cluster may be short.  Nothing outside this module
divides by the cluster size.
"""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import ge

MIN_CLUSTER_SIZE = 4096  # a page: what the kernel caches cannot be cut finer
MAX_CLUSTER_SIZE = 4 << 20
DEFAULT_CLUSTER_SIZE = 64 << 10  # as QEMU's block-copy


def _check_cluster_size(_instance: object, _attribute: object, value: int) -> None:
    if value & (value - 1) or not MIN_CLUSTER_SIZE <= value <= MAX_CLUSTER_SIZE:
        raise ValueError(
            f"cluster size {value} is not a power of two from {MIN_CLUSTER_SIZE} "
            f"to {MAX_CLUSTER_SIZE}"
        )


@frozen
class Geometry:
    """Size of an image and of its clusters, in bytes.

    Raises ValueError for a negative size or a cluster size that is not a power
    of two from 4 KiB to 4 MiB.
    """

    size: int = field(validator=ge(0))
    cluster_size: int = field(default=DEFAULT_CLUSTER_SIZE, validator=_check_cluster_size)

    @property
    def clusters(self) -> int:
        """Number of clusters, a short last one included."""
        return -(-self.size // self.cluster_size)

    def resized(self, size: int) -> Geometry:
        """The same clusters for an image of `size` bytes."""
        return Geometry(size, self.cluster_size)

    def touched(self, offset: int, length: int) -> range:
        """Clusters of which [offset, offset+length) has at least one byte.

        The range may run past the end of the image (a write that extends it).
        """
        if length <= 0:
            return range(0)
        return range(offset // self.cluster_size, -(-(offset + length) // self.cluster_size))

    def covered(self, offset: int, length: int) -> range:
        """Clusters that lie inside [offset, offset+length) as a whole.

        The end of the image counts as aligned: a range that reaches it covers
        a short last cluster.  Empty if no cluster fits.
        """
        first = -(-offset // self.cluster_size)
        end = offset + length
        stop = self.clusters if end >= self.size else end // self.cluster_size
        return range(first, max(first, stop))

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Offset and length in bytes of clusters [first, stop), cut at the end."""
        start = min(first * self.cluster_size, self.size)
        return start, max(0, min(stop * self.cluster_size, self.size) - start)

    def whole(self, first: int, stop: int) -> tuple[int, int]:
        """Offset and length of clusters [first, stop) as if the last were not short.

        For punching: a hole that ends with the file leaves its last block allocated.
        """
        return first * self.cluster_size, (stop - first) * self.cluster_size

    def end_of(self, stop: int) -> int:
        """First byte after clusters [..., stop), cut at the end of the image."""
        return min(stop * self.cluster_size, self.size)
