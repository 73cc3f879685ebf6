"""The steps of the property test of the engine, and how hypothesis makes them up."""

from __future__ import annotations

import errno

from attrs import frozen
from hypothesis import strategies as st

from snapfs.engine.layer import Policy
from tests.support.images import CLUSTER

# Steps.  Small integers stand for "the so-many-eth of those there are now".


@frozen
class Nothing:
    """What hypothesis shrinks a step to."""


@frozen
class Write:
    offset: int
    length: int
    seed: int
    delay: int


@frozen
class Clear:
    kind: str  # punch, zero, zero-keep, allocate, allocate-keep
    offset: int
    length: int
    delay: int


@frozen
class Resize:
    size: int
    delay: int


@frozen
class Read:
    which: int  # 0: active
    offset: int
    length: int
    partial: bool
    delay: int


@frozen
class Create:
    policy: Policy | None
    delay: int
    access: str = "all"  # or bitmap, extents
    after: str = "nothing"  # or clear, next
    which: int = 0  # the bitmap
    clusters: frozenset[int] = frozenset()  # the extents


@frozen
class Track:
    """Something done to dirty bitmaps."""

    kind: str  # add, clear, merge, remove
    which: int
    to: int
    delay: int


@frozen
class Delete:
    which: int
    delay: int


@frozen
class Rename:
    which: int
    to: int
    delay: int


@frozen
class Open:
    which: int


@frozen
class Close:
    which: int
    delay: int


@frozen
class Discard:
    which: int
    offset: int
    length: int
    delay: int


@frozen
class Map:
    which: int  # 0: active
    offset: int
    length: int
    delay: int


@frozen
class Seek:
    which: int  # 0: active
    offset: int
    data: bool
    delay: int


@frozen
class Hold:
    """Stall calls of one kind on some clusters, once or several times."""

    where: str  # image, temp, store
    kind: str
    first: int
    count: int
    times: int | None


@frozen
class Break:
    """Let calls of one kind fail on some clusters."""

    where: str
    kind: str
    first: int
    count: int
    times: int | None
    errno: int
    lands: int


@frozen
class Mend:
    """No more faults."""


@frozen
class Release:
    which: int


@frozen
class Cold:
    """The page cache has lost, or got, everything."""

    cold: bool


@frozen
class Wait:
    """Time passes: every timeout under way expires."""


@frozen
class Settle:
    """Release everything and look at the quiet engine."""


@frozen
class Together:
    """Several at once, in an order that the scheduler chooses."""

    steps: tuple[object, ...]


Step = object

SIZES = (0, 1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 5 * CLUSTER, 7 * CLUSTER + 512, 12 * CLUSTER)

delays = st.integers(0, 4)
whiches = st.integers(0, 5)
offsets = st.builds(
    lambda cluster, extra: max(0, cluster * CLUSTER + extra),
    st.integers(0, 13),
    st.sampled_from((0, 0, 0, 1, -1, 512, 2048, 4095)),
)
lengths = st.builds(
    lambda clusters, extra: max(1, clusters * CLUSTER + extra),
    st.integers(0, 6),
    st.sampled_from((0, 0, 0, 1, -1, 512, 2048)),
)
sizes = st.one_of(st.sampled_from(SIZES), offsets)
policies = st.sampled_from((None, None, "break-snapshot", "break-guest-write"))

writes = st.builds(Write, offsets, lengths, st.integers(0, 250), delays)
clears = st.builds(
    Clear,
    st.sampled_from(("punch", "zero", "zero-keep", "allocate", "allocate-keep")),
    offsets,
    lengths,
    delays,
)
reads = st.builds(Read, whiches, offsets, lengths, st.booleans(), delays)
creates = st.builds(
    Create,
    policies,
    delays,
    st.sampled_from(("all", "all", "bitmap", "bitmap", "extents")),
    st.sampled_from(("nothing", "clear", "next")),
    whiches,
    st.frozensets(st.integers(0, 12)),
)
tracks = st.builds(
    Track, st.sampled_from(("add", "add", "clear", "merge", "remove")), whiches, whiches, delays
)
deletes = st.builds(Delete, whiches, delays)
discards = st.builds(Discard, whiches, offsets, lengths, delays)
others = st.one_of(
    st.builds(Resize, sizes, delays),
    st.builds(Rename, whiches, whiches, delays),
    st.builds(Open, whiches),
    st.builds(Close, whiches, delays),
    st.builds(Map, whiches, offsets, lengths, delays),
    st.builds(Seek, whiches, offsets, st.booleans(), delays),
)
places = st.sampled_from(
    (
        ("temp", "pwrite"),
        ("temp", "pwrite"),
        ("image", "copy"),
        ("image", "pread"),
        ("image", "pwrite"),
        ("temp", "pread"),
        ("temp", "punch"),
        ("temp", "truncate"),
        ("image", "extents"),
        ("temp", "extents"),
        ("image", "punch"),
        ("image", "truncate"),
        ("store", "create"),
        ("store", "save"),
        ("store", "save"),
        ("store", "remove"),
        ("store", "make"),
        ("store", "grow"),
    )
)
faulty = st.sampled_from(
    (
        ("temp", "pwrite"),
        ("temp", "pwrite"),
        ("image", "copy"),
        ("image", "pread"),
        ("image", "pwrite"),
        ("image", "punch"),
        ("image", "truncate"),
        ("temp", "pread"),
        ("image", "extents"),
        ("store", "create"),
        ("store", "save"),
        ("store", "make"),
        ("store", "grow"),
    )
)
holds = st.builds(
    lambda place, first, count, times: Hold(*place, first, count, times),
    places,
    st.integers(0, 11),
    st.sampled_from((1, 2, 4, 99)),
    st.sampled_from((1, 1, 2, None)),
)
breaks = st.builds(
    lambda place, first, count, times, number, lands: Break(
        *place, first, count, times, number, lands
    ),
    faulty,
    st.integers(0, 11),
    st.sampled_from((1, 2, 99)),
    st.sampled_from((1, 1, 2, None)),
    st.sampled_from((errno.EIO, errno.ENOSPC)),
    st.sampled_from((0, 0, 1, 3000)),
)
operations = st.one_of(writes, discards, reads, creates, tracks, deletes, others, writes, clears)
troubles = st.one_of(
    holds,
    st.builds(Release, whiches),
    breaks,
    st.just(Mend()),
    st.builds(Cold, st.booleans()),
    st.just(Wait()),
    holds,
)
steps = st.one_of(
    st.just(Nothing()),
    writes,
    operations,
    operations,
    troubles,
    operations,
    st.builds(Together, st.lists(operations, min_size=2, max_size=4).map(tuple)),
    st.just(Settle()),
)
