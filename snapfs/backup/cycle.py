"""`snapfs backup`: one run, from the snapshot to the bitmap that the next one starts from.

Crash windows, and why nothing is lost in any of them.  B is the bitmap of the
last point, N the one that begins with the new snapshot:

    before the snapshot         B records
    snapshot taken, N began     B goes on recording as well, in the same instant
    copying, fsync, rename      the manifest still says B: the next run removes N,
                                the snapshot and the files (they are in `garbage`)
    the manifest says N         everything before N is in the new point, durably;
                                the next run removes B and the snapshot

So a bitmap is the base of the next increment only if the manifest says so, and
every other one of ours is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from attrs import evolve, field, frozen

from ..client.wire import Client, RemoteError
from ..errors import (
    ExitCode,
    PartialCopy,
    PointDamaged,
    SnapfsError,
    SnapshotIncomplete,
    UsageError,
)
from . import belonging, folding, qemu, records, verified
from .chain import MANIFEST, Directory, Point, new_token, opened
from .copying import Copied, Copying, check_room, describe_ranges
from .extents import Extents
from .listing import disk_bytes
from .plan import Kind, Plan
from .progress import Progress
from .source import Source, refuse_served
from .sums import digest_of, dump
from .targets import QCOW2_CLUSTER, Qcow2Target, qcow2_bytes


@frozen
class BackupOptions:
    """What the command line says."""

    full: bool = False
    force: bool = False
    wait: float = 0.0
    bytes_per_second: int | None = None
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False
    say: Callable[[str], None] = field(default=print)
    chat: Callable[[str], None] = field(default=print)


def backup(mountpoint: str, path: str, options: BackupOptions) -> dict[str, Any]:
    """Add a point to a backup directory; returns the summary."""
    for program in ("qemu-img", "qemu-nbd"):
        qemu.find_program(program)
    with opened(path, change=True, wait=options.wait) as directory:
        run = _Run(mountpoint, directory, options)
        run.refuse_stranger()
        run.clean_up()
        return run.make_point()


class _Run:
    def __init__(self, mountpoint: str, directory: Directory, options: BackupOptions) -> None:
        self._mountpoint = mountpoint
        self._directory = directory
        self._options = options
        self._strange: str | None = None
        with Client(mountpoint) as client:
            self._image = client.call("status")["image"]
        refuse_served(os.path.join(directory.path, MANIFEST), "back up")

    def refuse_stranger(self) -> None:
        """Raises UsageError for an image that the directory does not belong to.

        Before anything else: the bitmaps of a copy of our image are named as ours are.
        """
        chain, image = self._directory.chain, self._image["path"]
        with Client(self._mountpoint) as client:
            bitmaps = {each["name"] for each in client.call("bitmap_list")["bitmaps"]}
        why = belonging.why_strange(chain, image, bitmaps)
        if why is None:
            return
        owner = chain.points[-1].image
        if not self._options.force:
            raise UsageError(
                f"{self._directory.path} holds backups of {owner}, and {image}, which is mounted "
                f"on {self._mountpoint}, is another image: {why}.  Give it a directory of its own "
                "(snapfs backup --init); or, if it is to take the other's place, --force makes a "
                "full point of it"
            )
        self._strange = f"{image} takes the place of {owner}: {why}"

    def clean_up(self) -> None:
        """Remove what an interrupted run left, here and at the daemon."""
        try:
            if self._directory.chain.fold is not None:
                with self._directory.without_readers():
                    folding.finish(self._directory)
        except (SnapfsError, OSError) as error:  # the point to come is on top of what reads right
            self._options.say(f"what a prune has begun stays unfinished: {error}")
        self._directory.sweep()
        chain = self._directory.chain
        base = chain.prefix + chain.points[-1].token if chain.points else None
        with Client(self._mountpoint) as client:
            for snapshot in client.call("list")["snapshots"]:
                if snapshot["name"].startswith(chain.prefix):
                    client.call("delete", name=snapshot["name"])
            for bitmap in client.call("bitmap_list")["bitmaps"]:
                if bitmap["name"].startswith(chain.prefix) and bitmap["name"] != base:
                    client.call("bitmap_remove", name=bitmap["name"])

    def make_point(self) -> dict[str, Any]:
        """Snapshot, copy, manifest, and only then the new bitmap counts."""
        token = new_token()
        label = self._directory.chain.prefix + token
        parent, why = self._base()
        committed = False
        try:
            parent, why, snapshot = self._take_snapshot(label, parent, why)
            name = self._announce(snapshot)
            point, copied = self._copy(name, token, label, parent)
            chain = self._directory.chain
            garbage = tuple(each for each in chain.garbage if each != name)
            self._directory.save(evolve(chain, points=(*chain.points, point), garbage=garbage))
            committed = True
        finally:
            if not committed:
                self._undo(label)
        self._forget(label, parent)
        return {
            "point": point.name,
            "number": point.number,
            "kind": "full" if parent is None else "incremental",
            "reason": why,
            "parent": point.parent,
            "size": point.size,
            "copied_bytes": copied.data,
            "disk_bytes": disk_bytes(self._directory, point.name),
            "zero_bytes": copied.zero,
        }

    def _announce(self, snapshot: dict[str, Any]) -> str:
        """A name for the point, after the moment of its snapshot, in the manifest as garbage."""
        chain = self._directory.chain
        name = chain.new_name(datetime.fromisoformat(snapshot["created"]))
        self._directory.save(
            evolve(chain, next_number=chain.next_number + 1, garbage=(*chain.garbage, name))
        )
        return name

    def _base(self) -> tuple[Point | None, str | None]:
        """The point that this one can be an increment to, or None and why not."""
        chain = self._directory.chain
        if self._strange is not None:
            return None, self._strange
        if self._options.full:
            return None, "asked for"
        if not chain.points:
            return None, "the first point"
        last = chain.points[-1]
        try:
            self._refuse_damaged(last)
        except (SnapfsError, OSError) as error:
            return None, str(error)
        with Client(self._mountpoint) as client:
            for bitmap in client.call("bitmap_list")["bitmaps"]:
                if bitmap["name"] == chain.prefix + last.token:
                    if bitmap["inconsistent"]:
                        return None, "the bitmap is inconsistent since the machine went down"
                    return last, None
        return None, f"the image has no bitmap of point {last.name}"

    def _refuse_damaged(self, point: Point) -> None:
        """Raises what is wrong with a point, as far as can be seen without reading it all."""
        directory = self._directory
        why = verified.why_damaged(directory, point)
        if why is not None:
            raise PointDamaged(why)
        for each in directory.chain.lineage(point):
            directory.refuse_partial(each)
            directory.refuse_other_sums(each)

    def _take_snapshot(
        self, label: str, parent: Point | None, why: str | None
    ) -> tuple[Point | None, str | None, dict[str, Any]]:
        with Client(self._mountpoint) as client:
            if parent is not None:
                bitmap = self._directory.chain.prefix + parent.token
                try:
                    snapshot = client.call("create", name=label, bitmap=bitmap, next=label)
                    if snapshot["size"]:
                        return parent, None, snapshot
                    return None, "the image is empty", snapshot  # qcow2 cannot be shrunk to that
                except RemoteError as error:
                    if error.exit_status != ExitCode.BITMAP_UNUSABLE:
                        raise
                    why = str(error)
            snapshot = client.call("create", name=label, next=label)
        expected = self._options.full or not self._directory.chain.points
        (self._options.chat if expected else self._options.say)(f"a full backup: {why}")
        return None, why, snapshot

    def _copy(
        self, name: str, token: str, label: str, parent: Point | None
    ) -> tuple[Point, Copied]:
        options, directory = self._options, self._directory
        path = os.path.join(self._mountpoint, "snapshots", label)
        final = directory.image_of(name)
        partial = f"{final}.partial"
        with Source(path, discard=True) as source:
            plan = source.plan()
            below = Extents() if parent is None else directory.data_of(parent)
            if not options.force:
                room = os.statvfs(directory.path)
                needed = qcow2_bytes(plan, below)
                check_room(room.f_bavail * room.f_frsize, needed, directory.path)
            alone = int(self._image["cluster_size"]) % QCOW2_CLUSTER == 0
            backing = None if parent is None else directory.image_of(parent.name)
            qemu.create(partial, source.size, backing, alone=alone)
            target = Qcow2Target(partial, source.size, resumable=False, alone=alone, below=below)
            try:
                copied = self._run_copy(source, target, plan)
                target.finish()
            except BaseException:
                target.abandon()
                raise
            self._refuse_incomplete(source, plan, copied, full=parent is None)
            described = source.described
        sums = dump(copied.units)
        records.replace_durably(directory.sums_of(name), sums)
        os.rename(partial, final)
        records.sync_directory(directory.path)
        return (
            Point(
                number=int(name.split("-", maxsplit=1)[0]),
                name=name,
                token=token,
                created=described["created"],
                size=described["size"],
                parent=None if parent is None else parent.name,
                image=self._image["path"],
                machine=belonging.machine_id(),
                data_bytes=copied.data,
                zero_bytes=copied.zero,
                digest=digest_of(sums),
            ),
            copied,
        )

    def _run_copy(self, source: Source, target: Qcow2Target, plan: Plan) -> Copied:
        options = self._options
        total = plan.total(Kind.DATA) + plan.total(Kind.ZERO)
        with Progress("backup", total, options) as progress:
            return Copying(
                source,
                target,
                durable=lambda position: None,
                progress=progress.advance,
                discard=True,
                bytes_per_second=options.bytes_per_second,
                checksums=True,
            ).run(plan)

    def _refuse_incomplete(self, source: Source, plan: Plan, copied: Copied, *, full: bool) -> None:
        state = source.look()
        if state["state"] != "ok":
            raise SnapshotIncomplete(
                f"the snapshot lost clusters while it was copied ({state['reason']}); nothing was "
                "added to the backup, and the next run will have these changes too"
            )
        missing = copied.missing or (plan.ranges(Kind.MISSING) if full else [])
        if missing:
            raise PartialCopy(
                f"somebody discarded {describe_ranges(missing)} (offset+length) of {source.name} "
                "while it was copied; nothing was added to the backup"
            )

    def _undo(self, label: str) -> None:
        """After a failure: as before, if that can be; else the next run does it."""
        with suppress(SnapfsError, OSError), Client(self._mountpoint) as client:
            for command in ("delete", "bitmap_remove"):
                with suppress(RemoteError):
                    client.call(command, name=label)
        with suppress(SnapfsError, OSError):
            self._directory.sweep()

    def _forget(self, label: str, parent: Point | None) -> None:
        """After success: what is not needed any more; else the next run does it."""
        chain = self._directory.chain
        try:
            with Client(self._mountpoint) as client:
                client.call("delete", name=label)
                for bitmap in client.call("bitmap_list")["bitmaps"]:
                    if bitmap["name"].startswith(chain.prefix) and bitmap["name"] != label:
                        client.call("bitmap_remove", name=bitmap["name"])
        except (SnapfsError, OSError) as error:
            self._options.say(f"the point is complete, but not cleaned up after: {error}")
