"""The manifest: what the state directory says about itself, in one JSON file.

Read with validation, so that nothing else has to doubt it: a manifest that is
not exactly of this shape is a StateError that says where.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any, Literal

import cattrs
from attrs import evolve, field, frozen
from attrs.validators import ge, lt, matches_re

from ..engine.dirty import BitmapRecord
from ..engine.geometry import Geometry
from ..engine.layer import LayerRecord, check_name, check_note
from ..errors import StateError, UsageError
from ..strictjson import make_converter, reasons
from .activitywords import storable
from .tempdirs import valid_path

Durability = Literal["process", "power"]

VERSION = 4  # 4: notes and pins
READABLE = (2, 3, 4)  # 2: until it was unmounted in order, it does not say what held it
MAX_NUMBER = 1 << 62  # below it sizes, times and their sums fit into 64 bits
MAX_ERRNO = 4095  # MAX_ERRNO of Linux
MAX_BYTES = 16 << 20  # a manifest of this size has some 50,000 snapshots


def moment(time_ns: int) -> str:
    """A time in words, to the nanosecond: a change of ctime may be a small one."""
    seconds, rest = divmod(time_ns, 10**9)
    try:
        text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns since 1970"
    return f"{text}.{rest:09} UTC"


@frozen
class ImageStamp:
    """What an image looked like from outside; times in nanoseconds since 1970."""

    path: str
    size: int = field(validator=ge(0))
    device: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str, fd: int) -> ImageStamp:
        """The stamp of an open image now, with times as the record of activity has them."""
        status = os.fstat(fd)
        return cls(
            path,
            status.st_size,
            status.st_dev,
            status.st_ino,
            storable(status.st_mtime_ns),
            storable(status.st_ctime_ns),
        )

    def change_since(self, old: ImageStamp) -> str | None:
        """How the image differs from what it was, None if it was not written meanwhile.

        Every write sets mtime and ctime.  mtime can be set back (rsync -t), so
        ctime has to be the same too, unless the file was moved (a rename sets
        ctime, and the path differs) or copied (another inode).
        """
        if self.size != old.size:
            return f"it has {self.size} bytes and had {old.size}"
        if self.mtime_ns != old.mtime_ns:
            return (
                f"it was modified at {moment(self.mtime_ns)}, and before at {moment(old.mtime_ns)}"
            )
        if self.is_where(old) and self.ctime_ns != old.ctime_ns:
            return (
                f"its ctime is {moment(self.ctime_ns)} and was {moment(old.ctime_ns)}, while size "
                "and mtime are the same: either its mode, owner, links or attributes were set "
                "(chmod, chown, ln, setfattr, chattr, touch -a), or it was written and its mtime "
                "set back (rsync -t, touch -r), and nothing tells which"
            )
        return None

    def newest(self, old: ImageStamp) -> int:
        """When the image may have been written last; `old`: where it was."""
        return max(self.mtime_ns, self.ctime_ns) if self.is_where(old) else self.mtime_ns

    def is_where(self, old: ImageStamp) -> bool:
        """Is it the same file under the same name, neither moved nor copied?

        Not by its device: that of btrfs is another one after each mount.
        """
        return (self.path, self.inode) == (old.path, old.inode)


Encoded = dict[int, tuple[LayerRecord, str]]  # layers and their lines, by id


@frozen
class Manifest:
    """`layers` oldest first.  `clean`: closed in order, and everything flushed.

    `durability`: of the mount; with power the bitmaps are right after a power cut.
    Layers and bitmaps share one sequence of ids.  `id` names the temp images that
    are elsewhere, while the state directory is at `home` (tempdirs.py), which is
    "" for neither yet.  `temp_dir`: where new ones go, None: into the state directory.

    `image` and what follows are of the moment when the mount began (or ended, if
    `clean`): `session` tells its record of activity from that of another mount (0: there
    is none), `held_by` what file systems hold what it left (recovery.py).
    """

    version: int
    cluster_size: int
    image: ImageStamp
    boot_id: str
    clean: bool
    next_id: int = field(validator=ge(1))
    layers: tuple[LayerRecord, ...] = ()
    durability: Durability = "process"
    bitmaps: tuple[BitmapRecord, ...] = ()
    id: str = field(default="", validator=matches_re("([0-9a-f]{32})?"))
    home: str = ""
    temp_dir: str | None = None
    session: int = field(default=0, validator=[ge(0), lt(MAX_NUMBER)])
    held_by: dict[str, str] = field(factory=dict)  # identity_of each, by place

    def dumps(self, known: Encoded | None = None) -> bytes:
        """The manifest as it is stored, a layer a line.

        `known`: the layers' lines of the last time, which most of them still have; those of
        this time take their place.
        """
        value = _converter.unstructure(evolve(self, layers=())) | {"layers": None}
        rest = json.dumps(value, indent=1)
        lines: Encoded = {}
        for layer in self.layers:
            record, line = (known or {}).get(layer.id, (None, ""))
            if record is not layer:
                line = json.dumps(_converter.unstructure(layer))
            lines[layer.id] = layer, line
        if known is not None:
            known.clear()
            known.update(lines)
        layers = ",\n".join(line for _, line in lines.values())
        head, _, tail = rest.rpartition('"layers": null')
        return f'{head}"layers": [\n{layers}\n]{tail}\n'.encode()

    @classmethod
    def loads(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest; raises StateError that names `where` for all that is not one."""
        try:
            value: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StateError(f"{where} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise StateError(f"{where} is not a JSON object")
        version = value.get("version")
        if not isinstance(version, int):
            raise StateError(f"{where} has no version")
        if version not in READABLE:
            raise StateError(
                f"{where} has version {version!r}; this snapfs reads {READABLE[0]} to {VERSION}"
            )
        try:
            manifest = _converter.structure(value, cls)
            manifest._check()
        except RecursionError:
            raise StateError(f"{where} is damaged: it is nested too deeply") from None
        except (cattrs.BaseValidationError, UsageError, ValueError, TypeError) as error:
            raise StateError(f"{where} is damaged: {'; '.join(reasons(error))}") from None
        return evolve(manifest, version=VERSION)

    def _check(self) -> None:
        Geometry(self.image.size, self.cluster_size)
        ids = [layer.id for layer in self.layers]
        if ids != sorted(set(ids)) or any(not 0 < number < self.next_id for number in ids):
            raise ValueError("the ids of its snapshots are not ascending")
        names = [layer.name for layer in self.layers if layer.name is not None]
        if len(names) != len(set(names)):
            raise ValueError("two snapshots have one name")
        for layer in self.layers:
            if layer.name is not None:
                check_name(layer.name)
            if layer.note is not None:
                check_note(layer.note)
            counts = (layer.size, layer.lost, layer.granted, layer.blocks)
            if min(counts) < 0:
                raise ValueError(f"snapshot {layer.id} has a negative number")
            times = (abs(layer.created_ns), abs(layer.since_ns or 0))
            if max(*counts, *times) >= MAX_NUMBER or not 0 <= (layer.errno or 0) <= MAX_ERRNO:
                raise ValueError(f"snapshot {layer.id} has a number that is too large")
        if self.next_id >= MAX_NUMBER:
            raise ValueError("next_id is too large")
        for path in (self.temp_dir, *(layer.temp_dir for layer in self.layers)):
            if path is not None and not (self.id and valid_path(path)):
                raise ValueError(f"temp images cannot be in {path!r}")
        self._check_bitmaps(set(ids))

    def _check_bitmaps(self, taken: set[int]) -> None:
        for bitmap in self.bitmaps:
            check_name(bitmap.name)
            if bitmap.id in taken or not 0 < bitmap.id < self.next_id:
                raise ValueError(f"bitmap {bitmap.name!r} has the id {bitmap.id}")
            taken.add(bitmap.id)
            if abs(bitmap.began_ns or 0) >= MAX_NUMBER:
                raise ValueError(f"bitmap {bitmap.name!r} has a time that is too large")
        if len({bitmap.name for bitmap in self.bitmaps}) != len(self.bitmaps):
            raise ValueError("two bitmaps have one name")

    def with_lists(
        self, layers: tuple[LayerRecord, ...], bitmaps: tuple[BitmapRecord, ...]
    ) -> Manifest:
        """The same state directory with other layers and bitmaps."""
        newest = max([*(layer.id for layer in layers), *(each.id for each in bitmaps)], default=0)
        next_id = max(self.next_id, newest + 1)
        return evolve(self, layers=layers, bitmaps=bitmaps, next_id=next_id)


_converter = make_converter(ImageStamp, LayerRecord, BitmapRecord, Manifest)
