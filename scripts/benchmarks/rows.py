"""The rows of the table: what is compared with what."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from . import many
from .images import MIB
from .serving import QEMU
from .work import CLUSTER, Bench, Work

# Changes to a daemon: its bitmaps and its record of activity do not outlive it; a sync takes
# what it takes on disks without a cache that survives a power cut.
FORGETFUL = """
from snapfs.state import activity, statefiles
from snapfs.storage.mapping import Mapping
def map_file(fd, size):
    memory = os.memfd_create("forgetful")
    try:
        os.truncate(memory, size)
        return Mapping(memory, size)
    finally:
        os.close(memory)
activity.map_file = statefiles.map_file = map_file
"""
SLOW_SYNC = 0.002  # seconds
SLOW = (
    f"fdatasync, os.fdatasync = os.fdatasync, lambda fd: time.sleep({SLOW_SYNC}) or fdatasync(fd)"
)

# Rows whose other side is what they show; snapfs's is that of another row.  They say nothing
# new beside another build.
ALONE = ("persistence: ", "reflink: ")

Serve = Callable[[], AbstractContextManager[tuple[Path, Path]]]
Side = tuple[str, Serve, Work]
Rows = dict[str, tuple[str, list[Side]]]


def measurements(bench: Bench) -> Rows:
    """Name: unit and sides, of which the last is compared with the first."""
    images = bench.images

    def beside_qemu(what: Work) -> list[Side]:
        sides: list[Side] = [("QEMU", bench.qemu, what)] if shutil.which(QEMU) else []
        return [*sides, ("snapfs", bench.snapfs, what)]

    def with_many(count: int, what: Work) -> list[Side]:
        return [
            ("1 snapshot", bench.snapfs, what),
            (f"{count} snapshots", lambda: bench.snapfs(count), what),
        ]

    def on(kind: str, snapshots: int, what: Work) -> list[Side]:
        sides: list[Side] = [("QEMU", lambda: bench.qemu_on(kind, snapshots), what)]
        sides = sides if shutil.which(QEMU) else []
        return [*sides, ("snapfs", lambda: bench.snapfs_on(kind, snapshots), what)]

    def two(what: Work) -> list[Side]:
        return [("snapfs", lambda: bench.snapfs(2), what)]

    def tebibyte(what: Work) -> list[Side]:
        return [("1 TiB, 4 snapshots", lambda: bench.snapfs(4, images.other), what)]

    def plain(what: Work) -> list[Side]:
        sides: list[Side] = [("QEMU", bench.qemu_plain, what)] if shutil.which(QEMU) else []
        return [*sides, ("snapfs", lambda: bench.snapfs(0), what)]

    def beside_file(what: Work) -> list[Side]:
        return [("bare file", bench.bare, what), ("snapfs", lambda: bench.snapfs(0), what)]

    def with_bitmap(what: Work) -> list[Side]:
        return [
            ("no bitmap", lambda: bench.snapfs(0), what),
            ("one bitmap", bench.tracked, what),
        ]

    def sparse(what: Work) -> list[Side]:
        return [
            (
                "16 GiB",
                lambda: bench.snapfs(0, images.in_pieces(images.sparse, 16 << 30, 4096, 2 * MIB)),
                what,
            )
        ]

    def pieces(what: Work) -> list[Side]:
        return [
            (
                "1 TiB",
                lambda: bench.snapfs(0, images.in_pieces(images.pieces, 1 << 40, 100_000, 4096)),
                what,
            )
        ]

    def beside_forgetful(what: Work) -> list[Side]:
        return [
            (
                "anonymous bitmaps",
                lambda: bench.snapfs(program=bench.build.patched(FORGETFUL)),
                what,
            ),
            ("snapfs", bench.snapfs, what),
        ]

    def power(
        cluster: int, program: tuple[object, ...] = (), longer: float = 0, more: str = ""
    ) -> list[Side]:
        options = f"durability=power,cluster-size={cluster}{more}"
        return [
            ("a pair of syncs for each", bench.bare, bench.pairs_of_syncs(cluster, longer)),
            (
                "snapfs",
                lambda: bench.snapfs(options=options, program=program),
                bench.copies(cluster),
            ),
        ]

    def beside_xfs(what: Work) -> list[Side]:
        return [("XFS reflink", bench.xfs, what), ("snapfs", bench.snapfs, what)]

    def large(what: Work) -> list[Side]:
        qemu: Side = ("QEMU", lambda: bench.qemu(images.the_large()), what)
        sides = [qemu] if shutil.which(QEMU) else []
        return [*sides, ("snapfs", lambda: bench.snapfs(1, images.the_large()), what)]

    def latency() -> list[Side]:
        first: Side = ("QEMU's median", bench.qemu_plain, bench.latency(50))
        sides = [first] if shutil.which(QEMU) else []
        return [*sides, ("snapfs, p99", lambda: bench.snapfs(0), bench.latency(99))]

    near = 64 * MIB
    # fmt: off
    return {
        "active: 4 KiB random read, depth 16": ("1/s", plain(bench.active("randread", "4k", 16))),
        "active: 4 KiB random write, depth 16, 64 MiB": (
            "1/s", plain(bench.active("randwrite", "4k", 16, size=near))
        ),
        "active: 4 KiB random write, depth 16": (
            "1/s", plain(bench.active("randwrite", "4k", 16, amount=2 * near))
        ),
        "active: 4 KiB random read, depth 1": ("1/s", plain(bench.active("randread", "4k", 1))),
        "active: 4 KiB random write, depth 1": (
            "1/s", plain(bench.active("randwrite", "4k", 1, size=near))
        ),
        **{
            f"active: 4 KiB random {kind}, {jobs} jobs, depth {depth}": (
                "1/s", plain(bench.active(f"rand{kind}", "4k", depth, size=near, jobs=jobs))
            )
            for jobs, depth in ((2, 1), (4, 1), (4, 16))
            for kind in ("read", "write")
        },
        "active: 1 MiB read": ("1/s", plain(bench.active("read", "1M", 1))),
        "active: 1 MiB write": ("1/s", plain(bench.active("write", "1M", 1, size=4 * near))),
        "active: cold 4 KiB random read, depth 16": ("1/s", plain(bench.cold)),
        "active: 4 KiB random read, depth 1, latency": ("us", latency()),
        "processor time of a 4 KiB read, depth 16": (
            "us", plain(bench.processor_time("randread"))
        ),
        "processor time of a 4 KiB write, depth 16": (
            "us", plain(bench.processor_time("randwrite"))
        ),
        "snapshot read 4 KiB, depth 16": ("1/s", beside_qemu(bench.small_snapshot_read)),
        "snapshot read 1 MiB, half copied": ("1/s", beside_qemu(bench.half_copied_read)),
        "snapshot read 1 MiB": ("1/s", beside_qemu(bench.snapshot_read)),
        "reader of a snapshot beside a writer": ("1/s", beside_qemu(bench.beside("reader"))),
        "writer beside a reader of a snapshot": ("1/s", beside_qemu(bench.beside("writer"))),
        "cp of a 2 GiB snapshot": ("MB/s", large(bench.copy)),
        "cp of a snapshot, cold": ("MB/s", beside_qemu(bench.cold_copy)),
        "page cache: 1 MiB read, second pass": ("1/s", beside_file(bench.cached)),
        "buffered 1 MiB read, first pass": (
            "1/s", beside_file(bench.active("read", "1M", 1, amount=bench.size, direct=False))
        ),
        "buffered 1 MiB write": (
            "1/s", beside_file(bench.active("write", "1M", 1, amount=bench.size // 2, direct=False))
        ),
        "first writes 1 MiB": ("1/s", beside_qemu(bench.first_writes)),
        "first writes 4 KiB, depth 16": ("1/s", beside_qemu(bench.small_first_writes)),
        "reflink: first writes 1 MiB": ("1/s", beside_xfs(bench.first_writes)),
        "reflink: first writes 4 KiB, depth 16": ("1/s", beside_xfs(bench.small_first_writes)),
        "persistence: first writes 1 MiB": ("1/s", beside_forgetful(bench.first_writes)),
        "persistence: first writes 4 KiB, depth 16": (
            "1/s", beside_forgetful(bench.small_first_writes)
        ),
        # Copies of 64 KiB, the default, measure the bandwidth of the disk as well as its syncs.
        "durability=power: copies of 64 KiB, depth 16": ("1/s", power(CLUSTER)),
        "durability=power: copies of 16 KiB, depth 16": ("1/s", power(CLUSTER // 4)),
        # Only Python's syncs can be made longer.
        "durability=power: no fast path, syncs 2 ms longer": (
            "1/s", power(CLUSTER, bench.build.patched(SLOW), SLOW_SYNC, ",no_fastpath")
        ),
        "many: first writes 1 MiB": ("1/s", with_many(8, bench.first_writes)),
        "many: first writes 4 KiB": ("1/s", with_many(8, bench.small_first_writes)),
        "257 snapshots": ("1/s", with_many(257, bench.crowded)),
        "1000 snapshots": ("1/s", with_many(1000, bench.crowded)),
        **{
            f"{kind}: {title}": ("1/s", on(kind, snapshots, what))
            for kind in ("tmpfs", "XFS", "btrfs")
            for title, snapshots, what in (
                ("4 KiB random read, depth 16", 0, bench.active("randread", "4k", 16)),
                ("4 KiB random write, depth 16", 0, bench.active("randwrite", "4k", 16, size=near)),
                ("first writes 1 MiB", 1, bench.first_writes),
                ("first writes 4 KiB, depth 16", 1, bench.small_first_writes),
            )
        },
        "tracking: 4 KiB random write, depth 16": (
            "1/s", with_bitmap(bench.active("randwrite", "4k", 16, size=near))
        ),
        "tracking: 1 MiB write": ("1/s", with_bitmap(bench.active("write", "1M", 1))),
        "increment of 1 % of 8 GiB data, of its full": ("%", sparse(bench.increment)),
        "restore of four points, of qemu-img convert": ("%", two(bench.restore)),
        "map of 100,000 extents": ("s", pieces(bench.map_seconds)),
        "map of 100,000 extents, memory": ("MiB", pieces(bench.map_memory)),
        "cmp of two snapshots": ("MB/s", two(bench.compare)),
        "writer's longest stall at a creation": ("ms", tebibyte(bench.stall)),
        "resident memory": ("MiB", tebibyte(bench.resident)),
        **many.rows(bench),
    }
    # fmt: on
