"""`snapfs backup`: one run, from the snapshot to the bitmap that the next one starts from.

Crash windows, and why nothing is lost in any of them.  B is the bitmap of the
last point, N the one that begins with the new snapshot:

    before the snapshot         B records
    snapshot taken, N began     B goes on recording as well, in the same instant
    copying, fsync, rename      the manifest still says B: the next run removes N,
                                the snapshot and the files (they are in `garbage`)
    the manifest says N         everything before N is in the new point, durably;
                                the next run removes B and the snapshot

A full point is on record as `begun` instead, with what is durable of it (unfinished.py).
The next run goes on there: the snapshot still has all that is not durable, and N goes on
recording.  If anything of that is not so it begins anew, as for the others.

So a bitmap is the base of the next increment only if the manifest says so, and
every other one of ours is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from typing import Any

from attrs import evolve, field, frozen

from ..client.wire import Client, RemoteError
from ..errors import (
    ExitCode,
    NotStored,
    PartialCopy,
    PointDamaged,
    SnapfsError,
    SnapshotIncomplete,
    SnapshotLost,
    SnapshotNotFound,
    UsageError,
)
from . import belonging, folding, known, qemu, records, verified
from .chain import MANIFEST, Begun, Directory, Point, new_token, opened
from .copying import Copied, Copying, check_room, describe_ranges
from .extents import Extents
from .keys import secret_of
from .listing import disk_bytes
from .plan import Kind, Plan
from .progress import Progress
from .resuming import Wanted, go_on_or_give_up
from .source import Source, refuse_served
from .sums import digest_of, dump, unit_of
from .targets import QCOW2_CLUSTER, Coding, Qcow2Target, qcow2_bytes
from .unfinished import Ledger

KEEP_SNAPSHOT = timedelta(days=3)  # two more nights for a full point, and some hours


@frozen
class BackupOptions:
    """What the command line says."""

    full: bool = False
    force: bool = False
    compress: bool = False
    encrypt: bool | None = None
    key_file: str | None = None
    wait: float = 0.0
    bytes_per_second: int | None = None
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False
    keep_snapshot: timedelta = KEEP_SNAPSHOT  # of a full point that was interrupted
    say: Callable[[str], None] = field(default=print)
    chat: Callable[[str], None] = field(default=print)


def backup(mountpoint: str, path: str, options: BackupOptions) -> dict[str, Any]:
    """Add a point to a backup directory; returns the summary."""
    for program in ("qemu-img", "qemu-nbd"):
        qemu.find_program(program)
    if options.encrypt and options.key_file is None:
        raise UsageError("--encrypt takes --key-file")
    if options.encrypt and options.compress:
        raise UsageError(
            "QEMU cannot encrypt what it compresses; leave --compress or --encrypt out"
        )
    wait, key_file = options.wait, options.key_file
    with opened(path, change=True, wait=wait, key_file=key_file) as directory:
        run = _Run(mountpoint, directory, options)
        run.refuse_stranger()
        run.refuse_to_mix_keys()
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
        cluster = QCOW2_CLUSTER
        if options.compress or options.encrypt:  # whole clusters only: nothing below is read then
            cluster = min(cluster, int(self._image["cluster_size"]))
        self._coding = Coding(cluster, options.compress, directory.key if options.encrypt else None)

    def refuse_stranger(self) -> None:
        """Raises UsageError for an image that the directory does not belong to.

        Before anything else: the bitmaps of a copy of our image are named as ours are.
        """
        chain, image = self._directory.chain, self._image["path"]
        with Client(self._mountpoint) as client:
            bitmaps = {each["name"] for each in client.call("bitmap_list")["bitmaps"]}
        why = belonging.why_strange(chain, image, bitmaps)
        newest = belonging.newest(chain)
        if why is None or newest is None:
            return
        if not self._options.force:
            raise UsageError(
                f"{self._directory.path} holds backups of {newest.image}, and {image}, which is "
                f"mounted on {self._mountpoint}, is another image: {why}.  Give it a directory of "
                "its own (snapfs backup --init); or, if it is to take the other's place, --force "
                "makes a full point of it"
            )
        self._strange = f"{image} takes the place of {newest.image}: {why}"

    def refuse_to_mix_keys(self) -> None:
        """Raises UsageError for plain data on top of what is secret, KeyRefused for another key."""
        directory, options = self._directory, self._options
        points, begun = directory.chain.points, directory.chain.begun
        secret = bool(points) and directory.is_encrypted(points[-1])
        if begun is not None:
            secret |= qemu.is_encrypted(f"{directory.image_of(begun.name)}.partial")
        if secret and options.encrypt is None:
            raise UsageError(
                f"what was backed up last to {directory.path} is encrypted: give --encrypt and "
                "its --key-file, or --no-encrypt to have this point readable by everybody"
            )
        if options.encrypt and not options.full:
            directory.refuse_key(points[-1:])

    def clean_up(self) -> None:
        """Remove what an interrupted run left, here and at the daemon."""
        try:
            if self._directory.chain.fold is not None:
                with self._directory.without_readers():
                    folding.finish(self._directory)
        except (SnapfsError, OSError) as error:  # the point to come is on top of what reads right
            self._options.say(f"what a prune has begun stays unfinished: {error}")
        self._parent, self._why = self._base()
        wanted = Wanted(
            self._mountpoint,
            self._image["path"],
            self._parent,
            self._coding,
            self._options.keep_snapshot,
        )
        go_on_or_give_up(self._directory, wanted, self._options.say)
        self._directory.sweep()
        chain = self._directory.chain
        base = chain.prefix + chain.points[-1].token if chain.points else None
        begun = chain.prefix + chain.begun.token if chain.begun else None
        with Client(self._mountpoint) as client:
            for snapshot in client.call("list")["snapshots"]:
                if snapshot["name"].startswith(chain.prefix) and snapshot["name"] != begun:
                    client.call("delete", name=snapshot["name"])
            for bitmap in client.call("bitmap_list")["bitmaps"]:
                name = bitmap["name"]
                if name.startswith(chain.prefix) and name not in (base, begun):
                    client.call("bitmap_remove", name=name)

    def make_point(self) -> dict[str, Any]:
        """Snapshot, copy, manifest, and only then the new bitmap counts."""
        begun = self._directory.chain.begun
        token = new_token() if begun is None else begun.token
        label = self._directory.chain.prefix + token
        parent, why = self._parent, self._why
        committed = False
        try:
            if begun is None:
                parent, why, snapshot = self._take_snapshot(label, parent, why)
                name = self._announce(snapshot, token, full=parent is None)
            else:
                name = begun.name
            point, copied, resumed_at = self._copy(name, token, label, parent)
            chain = self._directory.chain
            garbage = tuple(each for each in chain.garbage if each != name)
            points = (*chain.points, point)
            self._directory.save(evolve(chain, points=points, garbage=garbage, begun=None))
            committed = True
        except BaseException as error:
            if not committed:
                self._leave(label, error)
            raise
        self._forget(label, name)
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
            "resumed_at": resumed_at,
        }

    def _announce(self, snapshot: dict[str, Any], token: str, *, full: bool) -> str:
        """A name for the point, after the moment of its snapshot, in the manifest."""
        chain = self._directory.chain
        name = chain.new_name(datetime.fromisoformat(snapshot["created"]))
        chain = evolve(chain, next_number=chain.next_number + 1)
        known.note(self._directory, token, snapshot["created"])
        if full:
            begun = Begun(name, token, self._image["path"], belonging.machine_id())
            self._directory.save(evolve(chain, begun=begun))
        else:
            self._directory.save(evolve(chain, garbage=(*chain.garbage, name)))
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
    ) -> tuple[Point, Copied, int]:
        """The point, what was copied now, and where that began."""
        options, directory = self._options, self._directory
        path = os.path.join(self._mountpoint, "snapshots", label)
        final = directory.image_of(name)
        partial = f"{final}.partial"
        with ExitStack() as stack:
            source = stack.enter_context(Source(path, discard=True))
            ledger: Ledger | None = None
            if parent is None and options.keep_snapshot:
                ledger = stack.enter_context(Ledger(directory.ledger_of(name), source.size))
            resumed_at = ledger.position if ledger is not None else 0
            if resumed_at:
                options.chat(
                    f"going on with the full point {name} at {resumed_at} of {source.size} bytes"
                )
            plan = source.plan(resumed_at)
            if ledger is not None:  # what is noted is the image's
                self._refuse_incomplete(source, plan, Copied(), full=True)
            below = Extents() if parent is None else directory.data_of(parent)
            if not options.force:
                room = os.statvfs(directory.path)
                needed = qcow2_bytes(plan, below, self._coding.cluster)
                check_room(room.f_bavail * room.f_frsize, needed, directory.path)
            alone = int(self._image["cluster_size"]) % self._coding.cluster == 0
            if not resumed_at:
                backing = None if parent is None else directory.image_of(parent.name)
                self._coding.create(partial, source.size, backing, alone=alone)
                records.sync_directory(directory.path)
            target = Qcow2Target(
                partial,
                source.size,
                resumable=ledger is not None,
                alone=alone,
                below=below,
                coding=self._coding,
            )
            try:
                if 0 < resumed_at < source.size and self._coding.compress:
                    target.forget_from(resumed_at)
                copied = self._run_copy(source, target, plan, ledger)
                target.finish()
            except BaseException:
                target.abandon()
                raise
            self._refuse_incomplete(source, plan, copied, full=parent is None)
            described = source.described
        units = copied.units if ledger is None else ledger.units
        sums = dump(units)
        records.replace_durably(directory.sums_of(name), sums)
        os.rename(partial, final)
        records.sync_directory(directory.path)
        point = Point(
            number=int(name.split("-", maxsplit=1)[0]),
            name=name,
            token=token,
            created=described["created"],
            size=described["size"],
            parent=None if parent is None else parent.name,
            image=self._image["path"],
            machine=belonging.machine_id(),
            data_bytes=sum(each.length for each in units if each.digest is not None),
            zero_bytes=sum(each.length for each in units if each.digest is None),
            digest=digest_of(sums),
        )
        return point, copied, resumed_at

    def _run_copy(
        self, source: Source, target: Qcow2Target, plan: Plan, ledger: Ledger | None
    ) -> Copied:
        options = self._options
        total = plan.total(Kind.DATA) + plan.total(Kind.ZERO)
        noted = 0
        secret = secret_of(self._coding.key)

        def durable(position: int) -> None:
            nonlocal noted
            if ledger is None:
                return
            copied = copying.copied
            if copied.missing:
                self._refuse_incomplete(source, plan, copied, full=True)
            ledger.append(position, copied.units[noted:])
            noted = len(copied.units)

        if ledger is not None and ledger.position:
            source.give_up_to(ledger.position)
        with Progress("backup", total, options) as progress:
            copying = Copying(
                source,
                target,
                durable=durable,
                progress=progress.advance,
                discard=True,
                bytes_per_second=options.bytes_per_second,
                checksums=lambda start, data: unit_of(start, data, secret),
                alignment=self._coding.cluster if self._coding.compress else 1,
            )
            return copying.run(plan)

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

    def _leave(self, label: str, error: BaseException) -> None:
        """After a failure: what can be gone on with, or as before; else the next run does it."""
        useless = isinstance(
            error, (SnapshotIncomplete, SnapshotLost, SnapshotNotFound, PartialCopy, NotStored)
        )
        begun = self._directory.chain.begun
        goes_on = begun is not None and not useless and bool(self._options.keep_snapshot)
        if begun is not None and goes_on and self._say_how_to_go_on(begun, label):
            return
        with suppress(SnapfsError, OSError), Client(self._mountpoint) as client:
            for command in ("delete", "bitmap_remove"):
                with suppress(RemoteError):
                    client.call(command, name=label)
        with suppress(SnapfsError, OSError):
            self._directory.drop_begun()
            self._directory.sweep()

    def _say_how_to_go_on(self, begun: Begun, label: str) -> bool:
        """Is anything safe of a full point?"""
        directory = self._directory
        try:
            with Ledger(directory.ledger_of(begun.name), 1 << 63) as ledger:
                position = ledger.position
        except (SnapfsError, OSError):
            return False
        if position:
            self._options.say(
                f"{position} bytes of the full point {begun.name} are safe: the same command goes "
                f"on there.  Its snapshot {label} stays for that, and takes space when the image "
                f"changes; the next run with --keep-snapshot-for 0d gives both up"
            )
        return bool(position)

    def _forget(self, label: str, name: str) -> None:
        """After success: what is not needed any more; else the next run does it."""
        chain = self._directory.chain
        try:
            records.remove(self._directory.ledger_of(name))
            with Client(self._mountpoint) as client:
                client.call("delete", name=label)
                for bitmap in client.call("bitmap_list")["bitmaps"]:
                    if bitmap["name"].startswith(chain.prefix) and bitmap["name"] != label:
                        client.call("bitmap_remove", name=bitmap["name"])
        except (SnapfsError, OSError) as error:
            self._options.say(f"the point is complete, but not cleaned up after: {error}")
