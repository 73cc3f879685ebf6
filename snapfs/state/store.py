"""The state directory: where snapshots survive the daemon.

    IMAGE.snapfs/
        manifest.json           replaced atomically (manifest.py)
        activity                writes in flight (activity.py)
        lock                    locked while mounted
        reserve                 room for the manifest on a full file system
        control.sock            the control socket (control.py)
        snapshots/ID/access     mapped bitmap
        snapshots/ID/done       mapped bitmap
        snapshots/ID/losses     mapped record of what could not be kept
        snapshots/ID/temp       temp image
        bitmaps/ID              mapped dirty bitmap (dirtyfiles.py)
    TEMP_DIR/snapfs-*/ID-LAYER.temp  with temp-dir= (tempdirs.py): the temp image instead

What the next mount makes of it after the daemon died is in `recovery.py`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from attrs import evolve

from ..engine.dirty import BitmapRecord, DirtyBitmap
from ..engine.geometry import DEFAULT_CLUSTER_SIZE, Geometry
from ..engine.layer import Layer, LayerParts, LayerRecord
from ..errors import InUse, LimitReached, MountError, StateError, UsageError
from ..storage import descriptors, filesystems, mapping
from ..storage.descriptors import Reserve
from ..storage.filesystems import check_directory_kind, check_kind, overcommitted
from ..storage.image import FileImage, Image
from ..storage.locks import lock_exclusively, open_image
from ..storage.offload import in_thread
from . import recovery, statefiles, tempdirs
from .activity import Activity
from .dirtyfiles import DirtyFiles
from .layerstore import LayerDirectory
from .manifest import VERSION, Durability, ImageStamp, Manifest
from .manifestfile import NAME as MANIFEST
from .manifestfile import ManifestFile
from .tempdirs import TempDirs
from .witnesskeeper import WitnessKeeper

log = logging.getLogger(__name__)

CONTROL_SOCKET = "control.sock"
STATE_THREADS = 4
SYNC_THREADS = 16  # at the end; each has two descriptors at once
SPARE_DESCRIPTORS = 4  # a tree is removed with three at once


class Store:
    """The state directory of a mounted image; implements `LayerStore`.

    Made by `open`.  `layers` are the recovered ones, for the engine to take
    over; `notices` say what recovery did, a line each.
    """

    def __init__(
        self, directory: Path, directory_fd: int, image: FileImage, limiter: trio.CapacityLimiter
    ) -> None:
        self.directory = directory
        self.image = image
        self.layers: list[Layer] = []
        self.dirty: list[DirtyBitmap] = []  # recovered, for the engine to take over
        self.bitmaps: DirtyFiles
        self._layers: LayerDirectory
        self.notices: list[str] = []
        self._fd = directory_fd
        self._lock_fd = -1
        self._temp_threads = int(limiter.total_tokens)  # as many as for the image
        self._state_limiter = trio.CapacityLimiter(STATE_THREADS)
        # Temp storage that hangs must neither keep the list from being saved nor, asked
        # again and again, take more than one thread.
        self._layer_limiter = trio.CapacityLimiter(STATE_THREADS)
        # Each file makes the disk empty its cache, changed or not; at one moment it does so once
        # for all that are synced then.
        self._sync_limiter = trio.CapacityLimiter(SYNC_THREADS)
        self._usage_limiter = trio.CapacityLimiter(1)
        self._manifest: Manifest
        self._activity: Activity
        self._read_only = False
        self._made = False
        self._power = False
        self._gone: list[int] = []  # layers whose files go once a list without them is saved
        self._activity_fd = -1
        self._spare = Reserve(SPARE_DESCRIPTORS)  # to delete, and to end in order, without others
        self._file = ManifestFile(directory_fd, directory, self._spare)
        self._daemon_fd = -1  # of "lock", too, but an open file that the witness has not
        self._witness = WitnessKeeper()
        self._opened_layers = self._opened_bitmaps = False

    @classmethod
    async def open(
        cls,
        image_path: str,
        *,
        state_dir: str | None = None,
        cluster_size: int | None = None,
        read_only: bool = False,
        durability: Durability = "process",
        temp_dir: str | None = None,
        any_fs: bool = False,
        limiter: trio.CapacityLimiter,
    ) -> Store:
        """Lock the image and its state directory, made if need be, and recover.

        `cluster_size` None: as before, else the default.  `temp_dir`: see
        `tempdirs.choose`.  `any_fs`: on file systems of any kind, see `check_kind`.
        Raises UsageError,
        InUse, MountError, StateError and OSError; then nothing is held or left behind.
        """
        return await in_thread(
            cls._open, image_path, state_dir, cluster_size, read_only, durability, temp_dir,
            any_fs, limiter, limiter=limiter,
        )  # fmt: skip

    @classmethod
    def _open(
        cls,
        image_path: str,
        state_dir: str | None,
        cluster_size: int | None,
        read_only: bool,
        durability: Durability,
        temp_dir: str | None,
        any_fs: bool,
        limiter: trio.CapacityLimiter,
    ) -> Store:
        path = os.path.realpath(image_path)
        directory = Path(state_dir).absolute() if state_dir else Path(f"{path}.snapfs")
        statefiles.wait_for_witness(directory)
        image_fd = open_image(path, read_only=read_only)
        image = FileImage(image_fd, limiter=limiter, watched=True)
        made = False
        try:
            if not any_fs:
                check_kind(image_fd, f"the image {path}")
                check_directory_kind(directory)
            try:
                directory.mkdir(mode=0o700)
                made = True
            except FileExistsError:
                pass
            except OSError as error:
                raise MountError(
                    f"the state directory {directory} cannot be made: {error.strerror}; "
                    "choose another place with -o state=DIR"
                ) from None
            store = cls(directory, statefiles.open_directory(directory), image, limiter)
            try:
                store._read_only = read_only
                store._made = made
                store._power = durability == "power"
                store._enter(path, image_fd, cluster_size, temp_dir)
                return store
            except BaseException:
                for layer in store.layers:
                    layer.temp.close()
                store._release()
                if made:
                    statefiles.remove_tree(directory)
                raise
        except BaseException:
            image.close()
            raise

    def _enter(
        self, path: str, image_fd: int, cluster_size: int | None, temp_dir: str | None
    ) -> None:
        self._lock_fd = statefiles.open_file(self._fd, "lock", os.O_RDWR | os.O_CREAT)
        if not lock_exclusively(self._lock_fd):
            raise InUse(f"the state directory {self.directory} is in use by another snapfs")
        self._daemon_fd = statefiles.open_file(self._fd, "lock")
        lock_exclusively(self._daemon_fd, statefiles.DAEMON_BYTE)
        self._layers = LayerDirectory.open(
            self._fd, self.directory, self._state_limiter, self._temp_threads, self._spare
        )
        self._layers.power = self._power
        self._opened_layers = True
        self.bitmaps = DirtyFiles.open(self._fd, self._state_limiter, self._power, self._spare)
        self._opened_bitmaps = True
        statefiles.remove(self._fd, CONTROL_SOCKET)
        stamp = ImageStamp.of(path, image_fd)
        known = self._file.read()
        count = len(known.layers) if known is not None else 0
        self._layers.check_room(count, f"a mount with {count} snapshots, deleted ones included,")
        self._activity = Activity.open(self._fd, image_fd)
        if known is None:
            if self._layers.names() or self.bitmaps.names():
                raise StateError(
                    f"{self.directory}/manifest.json is missing, which says what the snapshots and "
                    "bitmaps there are; put it back, or remove the directory and them with it"
                )
            size = DEFAULT_CLUSTER_SIZE if cluster_size is None else cluster_size
            known = Manifest(VERSION, size, stamp, recovery.boot_id(), True, 1)
        elif cluster_size not in (None, known.cluster_size):
            if known.layers or known.bitmaps:
                raise UsageError(
                    f"the snapshots and bitmaps in {self.directory} have a cluster size of "
                    f"{known.cluster_size}; delete them to change it to {cluster_size}"
                )
            known = evolve(known, cluster_size=cluster_size)
        known = self._place_temps(known, temp_dir)
        warning = None if self._read_only else overcommitted(path, image_fd)
        if warning is not None:
            self.notices.append(warning)
        now = recovery.holders(image_fd, self._fd, self._layers.temps.opened())
        recovery.ask_for_errors(
            known, now, (image_fd, self._fd, *self._layers.temps.opened().values()), self._activity
        )
        if not known.clean:
            self.image.drop_clean()  # something of it may not have been stored
        self._recover(known, stamp, now)
        self._activity_fd = statefiles.open_file(self._fd, "activity")
        self._activity.prepare()
        if self._power:
            os.fdatasync(self._activity_fd)
            self.bitmaps.sync_all(self.dirty)  # with what makes them inconsistent now
        self._manifest = evolve(
            known,
            image=stamp,
            boot_id=recovery.boot_id(),
            clean=False,
            durability="power" if self._power else "process",
            layers=self._layers.placed([layer.record() for layer in self.layers]),
            bitmaps=tuple(bitmap.record() for bitmap in self.dirty),
            session=recovery.new_session(),
            held_by=now,
        )
        # The rest is for the control socket: XFS makes no file without blocks to spare.
        self._file.write(self._manifest, statefiles.MANIFEST_RESERVE_BYTES)
        self._activity.begin(self._manifest.session)
        if self._power:
            os.fdatasync(self._activity_fd)
        if self._made and self._power:
            statefiles.sync_entry(self.directory)
        for layer_id in self._gone:
            self._layers.remove(layer_id)

    def _place_temps(self, known: Manifest, wanted: str | None) -> Manifest:
        """Find out where temp images are and shall be; leftovers are removed."""
        home = tempdirs.home_of(self._fd)
        former = known.id if known.home != home and known.id else None
        temp_id = tempdirs.id_at(former, home) if former else known.id or tempdirs.new_id()
        used = {layer.temp_dir for layer in known.layers}
        new = tempdirs.choose(wanted, str(self.directory), known.temp_dir, used)
        temps = TempDirs(temp_id, new, former)
        self._layers.temps = temps
        temps.enter()
        for layer in known.layers:
            if layer.temp_dir is not None:
                with contextlib.suppress(FileNotFoundError):  # `find` will say of what
                    temps.open(layer.temp_dir)
        self.notices += self._layers.remove_unlisted(known.layers, (known.temp_dir, new))
        return evolve(known, id=temp_id, home=home, temp_dir=new)

    def _recover(self, known: Manifest, stamp: ImageStamp, now: dict[str, str]) -> None:
        """Load what the manifest lists and bring it to a state between transitions."""
        self._layers.harden = self._power or known.durability == "power"
        if self._power and known.layers:
            try:
                os.fdatasync(self.image.fd)
            except OSError as error:  # it tells nobody else
                self._activity.fail(error.errno or errno.EIO)
                raise

        def save(layers: list[Layer]) -> None:
            records = self._layers.placed([layer.record() for layer in layers])
            verdict = evolve(known, layers=records)
            statefiles.replace_file(self._fd, MANIFEST, verdict.dumps())

        found = recovery.recover(known, stamp, self._layers, self._activity, now, save)
        self.layers, self._gone = found.layers, found.gone
        for layer in self.layers:  # else what the image has may be in the page cache only
            layer.settled = known.clean or self._power
        clusters = Geometry(stamp.size, known.cluster_size).clusters
        self.dirty, notices = self.bitmaps.recover(known.bitmaps, clusters, found.distrust)
        self.notices += found.notices + notices

    # What the engine calls

    @property
    def geometry(self) -> Geometry:
        """Size of the image when it was opened, and the cluster size."""
        return Geometry(self._manifest.image.size, self._manifest.cluster_size)

    @property
    def next_id(self) -> int:
        """The first id that no layer or bitmap has had."""
        return self._manifest.next_id

    async def create(self, layer_id: int, geometry: Geometry) -> LayerParts:
        self._file.check_room()
        try:
            return await in_thread(
                self._layers.create, layer_id, geometry, limiter=self._layer_limiter
            )
        except LimitReached as refused:
            log.warning("%s", refused)
            raise
        except OSError as error:
            if error.errno not in descriptors.EXHAUSTED:
                raise
            await self.remove(layer_id)  # with those set aside: it may not have been possible
            raise LimitReached(descriptors.explain(error)) from None

    async def save(
        self,
        records: Sequence[LayerRecord],
        geometry: Geometry,
        bitmaps: Sequence[BitmapRecord] = (),
    ) -> None:
        self._manifest = self._manifest.with_lists(self._layers.placed(records), tuple(bitmaps))
        await in_thread(self._write_list, limiter=self._state_limiter)

    def _write_list(self) -> None:
        self._file.write(self._manifest)  # as it is when its turn has come

    async def sync(self, layer_id: int) -> None:
        await in_thread(self._spare.serve, self._layers.sync, layer_id, limiter=self._sync_limiter)

    async def take_errors(self) -> None:
        await in_thread(self._take_errors, limiter=self._state_limiter)

    def _take_errors(self) -> None:
        devices = set()
        for fd in (self.image.fd, self._fd, *self._layers.temps.opened().values()):
            device = os.fstat(fd).st_dev
            if device not in devices:
                devices.add(device)
                error = filesystems.ask_for_errors(fd)
                if error is not None:
                    self._activity.fail(error.errno or errno.EIO)

    def errors_saved(self) -> None:
        self._activity.fail(0)

    async def remove(self, layer_id: int) -> None:
        self._layers.forget(layer_id)
        await in_thread(
            self._spare.serve, self._layers.remove, layer_id, limiter=self._layer_limiter
        )

    async def usage(self, temps: Sequence[Image]) -> tuple[list[int], int]:
        return await in_thread(self._layers.usage, temps, limiter=self._usage_limiter)

    @property
    def temp_directory(self) -> str:
        """Where new temp images go."""
        return self._layers.temp_directory

    @property
    def temp_directories(self) -> set[str]:
        """All directories outside of this one that temp images are in, or go to."""
        found = {self._manifest.temp_dir, *(each.temp_dir for each in self._manifest.layers)}
        return {path for path in found if path is not None}

    def free_bytes(self) -> int:
        """Space that is left for temp images.  Blocks."""
        return self._layers.free_bytes()

    def default_reserve(self) -> int:
        """Bytes to leave free for the image, which may be sparse: 1 GiB, or 5 % if that is less.

        Blocks.
        """
        return self._layers.default_reserve()

    def failures(self) -> int:
        return mapping.failures()

    def write_started(self, size: int) -> None:
        self._activity.started()

    def write_finished(self) -> None:
        self._activity.finished()

    @property
    def activity_page(self) -> Any:
        """The record of changes under way; see `Activity.page`."""
        return self._activity.page

    async def keep_witness(self) -> None:
        """Start the witness (witness.py), if it does not live; logged if that is impossible.

        To be called before the first write, and every `activity.WATCH_SECONDS`.
        """
        if not self._read_only and not self._witness.lives():
            await in_thread(
                self._witness.appoint,
                self.image.fd, self._lock_fd, self._activity_fd, self._manifest.session,
                limiter=self._state_limiter,
            )  # fmt: skip

    async def beat_durably(self) -> None:
        """With durability=power: a durable one, every `activity.SYNC_SECONDS`; logged if not."""
        if self._power:
            self._activity.beat()
            try:
                await in_thread(os.fdatasync, self._activity_fd, limiter=self._state_limiter)
            except OSError as error:
                log.error("cannot record a sign of life: %s", error.strerror)

    # The end

    async def close(
        self,
        layers: Sequence[Layer],
        bitmaps: Sequence[DirtyBitmap],
        *,
        clean: bool = True,
        unused: bool = False,
        synced: bool = False,
    ) -> None:
        """Make everything durable, mark it clean, and let go of it.

        `layers`, `bitmaps`: those of the engine, which must be idle.  `clean` False: it
        ended by a bug, or the image is not what it should be, so the next mount looks as
        after a crash.  `unused`: the mount failed, so a directory that was made for it is
        removed.  `synced`: the engine has synced them (`Engine.finish`).  Raises
        OSError if something could not be made durable; then it is not marked
        clean, but let go of all the same.
        """
        failure = None if synced else await self._sync_all(layers, bitmaps)
        await in_thread(
            self._close, list(layers), list(bitmaps), clean, failure, limiter=self._state_limiter
        )
        if unused and self._made:
            await in_thread(statefiles.remove_tree, self.directory, limiter=self._state_limiter)

    async def _sync_all(
        self, layers: Sequence[Layer], bitmaps: Sequence[DirtyBitmap]
    ) -> Exception | None:
        """Make the files of layers and bitmaps durable; returns a failure."""
        failures: list[Exception] = []

        async def sync(call: Callable[[int], Awaitable[None]], number: int) -> None:
            try:
                await call(number)
            except (OSError, StateError) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for layer in layers:
                nursery.start_soon(sync, self.sync, layer.id)
            for bitmap in bitmaps:
                if bitmap.parts is not None:
                    nursery.start_soon(sync, self.bitmaps.sync, bitmap.id)
        return failures[0] if failures else None

    def _close(
        self,
        layers: list[Layer],
        bitmaps: list[DirtyBitmap],
        clean: bool,
        failure: Exception | None,
    ) -> None:
        try:
            if not self._read_only:
                self.image.sync()  # with its times, which the stamp has
            if failure is not None:
                raise failure
            self.bitmaps.sync_directory()
            if clean:
                self._manifest = evolve(
                    self._manifest,
                    image=ImageStamp.of(self._manifest.image.path, self.image.fd),
                    clean=True,
                    layers=self._layers.placed([layer.record() for layer in layers]),
                    bitmaps=tuple(each.record() for each in bitmaps),
                )
                self._file.write(self._manifest)
            else:
                self._activity.end()
        finally:
            for layer in layers:
                layer.temp.close()
            self._release()
            self.image.close()

    def _release(self) -> None:
        self._spare.close()
        self._witness.dismiss()  # before the locks are let go of
        if self._opened_layers:
            self._layers.close()
        if self._opened_bitmaps:
            self.bitmaps.close()
        for fd in (self._activity_fd, self._daemon_fd, self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
