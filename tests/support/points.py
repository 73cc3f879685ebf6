"""Backup directories without a mount: points written as `snapfs backup` writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from attrs import define, evolve, field

from snapfs.backup import chain, qemu, records
from snapfs.backup.extents import Extents
from snapfs.backup.sums import Unit, digest_of, dump, unit_of
from snapfs.backup.targets import Qcow2Target

START = datetime(2026, 11, 2, 12, tzinfo=UTC)


@define
class Backup:
    """A directory, and what the image was at each point."""

    path: Path
    directory: chain.Directory = field(init=False)
    moments: list[bytes] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.directory = chain.init(str(self.path))

    def add(
        self,
        changes: dict[int, bytes | int],
        size: int | None = None,
        *,
        full: bool = False,
        hours: float = 1.0,
    ) -> chain.Point:
        """A point, `hours` after the one before: offsets, and data or how many zeros."""
        known = self.directory.chain
        before = known.points[-1] if known.points else None
        full = full or before is None
        now = bytearray(self.moments[-1] if self.moments else b"")
        if size is None:
            ends = (
                at + (data if isinstance(data, int) else len(data)) for at, data in changes.items()
            )
            size = max([len(now), *ends])
        now[size:] = b""
        now += bytes(size - len(now))
        units = []
        for offset, data in sorted(changes.items()):
            content = bytes(data) if isinstance(data, int) else data
            now[offset : offset + len(content)] = content
            zero = isinstance(data, int)
            units.append(Unit(offset, data, None) if zero else unit_of(offset, data))
        created = before.time + timedelta(hours=hours) if before else START
        name = known.new_name(created)
        image = self.directory.image_of(name)
        qemu.create(image, size, None if full else self.directory.image_of(before.name), alone=True)
        below = Extents() if full else self.directory.data_of(before)
        target = Qcow2Target(image, size, resumable=False, alone=True, below=below)
        for unit in units:
            if unit.digest is None:
                target.zero(unit.start, unit.length)
            else:
                target.write(unit.start, now[unit.start : unit.stop])
        target.finish()
        sums = dump(units)
        records.replace_durably(self.directory.sums_of(name), sums)
        point = chain.Point(
            number=known.next_number, name=name, token=chain.new_token(),
            created=created.isoformat(), size=size, parent=None if full else before.name,
            image="/vm/disk.img", data_bytes=sum(each.length for each in units if each.digest),
            zero_bytes=sum(each.length for each in units if not each.digest),
            digest=digest_of(sums),
        )  # fmt: skip
        self.directory.save(
            evolve(known, next_number=known.next_number + 1, points=(*known.points, point))
        )
        self.moments.append(bytes(now))
        return point
