"""A state directory looked over while it is not mounted, and repaired where no guess is needed.

Everything is read as the next mount would (`recovery.py`), but nothing is written
unless a repair is asked for, and then only inside the state directory.
The grades of what is found are in `findings.py`, the layers in `layercheck.py`.

A repair removes what is in no list, clears bits beyond the end, takes the
right to write away from others, and makes an empty record of losses anew after
a clean unmount, when the list has those numbers too.  Nothing of a snapshot is
touched while the manifest cannot be read, and no temp data is freed while the
image is not the one it belongs to.

All functions block.
"""

from __future__ import annotations

import mmap
import os
import socket
import stat
from functools import partial

from ..engine.dirty import BitmapRecord
from ..engine.geometry import Geometry
from ..errors import InUse, NotFound, StateError, UsageError
from ..storage.locks import lock_exclusively
from . import dirtyfiles, statefiles
from .activity import Activity
from .activitywords import FILE_BYTES
from .findings import Grade, Report, Unusable, printable, read_all
from .layercheck import LayerInspector
from .manifest import MAX_BYTES, ImageStamp, Manifest
from .recovery import distrust, holders
from .store import CONTROL_SOCKET

_NAMES = "name the image, or what -o state= names"
KNOWN = {
    "manifest.json", "activity", "lock", "reserve", CONTROL_SOCKET, "snapshots", "bitmaps",
    "manifest.json.new", "daemon.log",
}  # fmt: skip


def check(path: str, *, repair: bool = False) -> Report:
    """Look a state directory over; `path` is it, or its image.

    Raises NotFound or UsageError if it is neither, InUse if it is mounted,
    StateError if the directory itself cannot be trusted, and OSError.
    """
    directory, image = _find(path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        checker = _Checker(directory, fd, repair)
        checker.run(image)
        return checker.report
    finally:
        os.close(fd)


def _find(path: str) -> tuple[str, str | None]:
    """The state directory, and the image if that was named."""
    image = None
    directory = os.path.abspath(path)
    if os.path.isfile(path):
        image = os.path.realpath(path)
        directory = f"{image}.snapfs"
    if os.path.islink(directory):
        raise StateError(f"{directory} is a symbolic link; name the directory itself")
    if not os.path.lexists(directory):
        raise NotFound(f"there is no state directory {directory}; {_NAMES}")
    if not os.path.isdir(directory):
        raise UsageError(f"{directory} is not a directory; {_NAMES}")
    if not KNOWN & set(os.listdir(directory)) - {"daemon.log"}:
        raise UsageError(f"{directory} is not a state directory of snapfs; {_NAMES}")
    return directory, image


class _Checker(LayerInspector):
    """One check of one directory."""

    # The order of things

    def run(self, image: str | None) -> None:
        """Fill the report."""
        lock_fd = self._lock()
        try:
            self.check_status(self.fd, ".", stat.S_ISDIR)
            self._small_files()
            known = self._manifest()
            if known is not None:
                self._all_of(known, image)
        except Unusable:
            pass  # the directory itself
        finally:
            if lock_fd >= 0:
                os.close(lock_fd)

    def _lock(self) -> int:
        """Lock the directory as a mount does, so that none begins meanwhile."""
        mounted = InUse(f"{self.directory} is mounted; run snapfs umount first")
        statefiles.wait_for_witness(self.directory)
        try:
            fd = self.open(self.fd, "lock", "lock")
        except FileNotFoundError:
            if self._answers():
                raise mounted from None
            if not self.repair:
                self.found(Grade.NOTE, "lock", "is missing; the next mount makes it")
                return -1
            fd = statefiles.open_file(self.fd, "lock", os.O_RDWR | os.O_CREAT)
        except Unusable:
            why = self.report.findings[-1].text
            raise StateError(f"lock in {self.directory} {why}") from None
        if not lock_exclusively(fd):
            os.close(fd)
            raise mounted
        return fd

    def _answers(self) -> bool:
        """Does a daemon answer on the control socket?"""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.connect(f"/proc/self/fd/{self.fd}/{CONTROL_SOCKET}")
            except OSError:
                return False
        return True

    def _small_files(self) -> None:
        names = set(os.listdir(self.fd))
        for name in sorted(names - KNOWN):
            self.found(Grade.NOTE, name, "is not known to snapfs and left alone")
        if CONTROL_SOCKET in names:
            self.leftover(self.fd, CONTROL_SOCKET, CONTROL_SOCKET, "of a daemon that died")
        try:
            mode = os.stat("reserve", dir_fd=self.fd, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                self.found(
                    Grade.REPAIRABLE, "reserve", "is not a regular file",
                    partial(statefiles.remove, self.fd, "reserve"),
                )  # fmt: skip
            else:
                with self.opened(self.fd, "reserve", "reserve"):
                    pass
        except FileNotFoundError:
            self.found(Grade.NOTE, "reserve", "is missing; it is made when there is room")
        except Unusable:
            pass

    def _manifest(self) -> Manifest | None:
        """The manifest; None if there is none, which is reported unless nothing needs it."""
        where = "manifest.json"
        try:
            with self.opened(self.fd, where, where) as fd:
                data = read_all(fd, MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise StateError(f"{where} is larger than {MAX_BYTES} bytes")
                known = Manifest.loads(bytes(data), where)
        except Unusable:
            return None
        except FileNotFoundError:
            if self._names("snapshots") or self._names("bitmaps"):
                text = "is missing, which says what the snapshots and bitmaps are"
                self.found(Grade.DAMAGE, where, text)
            return None
        except (StateError, OSError) as error:
            why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.found(Grade.DAMAGE, where, why.removeprefix(f"{where} "))
            return None
        if os.path.lexists(f"/proc/self/fd/{self.fd}/{where}.new"):
            self.leftover(self.fd, f"{where}.new", f"{where}.new", "was never finished")
        return known

    def _names(self, name: str) -> list[str]:
        """What is in a directory; nothing if it is missing or cannot be used."""
        try:
            with self.opened(self.fd, name, name, "directory") as fd:
                return sorted(os.listdir(fd))
        except (FileNotFoundError, Unusable):
            return []

    def _all_of(self, known: Manifest, image: str | None) -> None:
        self.report.clean = known.clean
        self.report.snapshots = sum(record.name is not None for record in known.layers)
        self.report.bitmaps = len(known.bitmaps)
        stamp, now = self._image(known, image)
        activity = self._activity(known)
        reason, wrong, judged = None, False, False
        if stamp is not None and activity is not None:
            try:
                reason, wrong = distrust(known, stamp, activity, now)
                judged = True
            except StateError:
                self.found(
                    Grade.DAMAGE, "activity",
                    "holds no record, so nobody can tell whether the image was changed "
                    "since the daemon died",
                )  # fmt: skip
        trusted = judged and reason is None
        layers = self.check_layers(known, trusted)
        try:
            if judged and stamp is not None and len(layers) == len(known.layers):
                self.foresee(known, stamp, layers, reason, wrong)
        finally:
            for layer in layers:
                layer.temp.close()
        self._bitmaps(known, stamp, reason)

    # The image

    def _image(
        self, known: Manifest, image: str | None
    ) -> tuple[ImageStamp | None, dict[str, str]]:
        """What the image looks like now, and what holds it and the rest (`holders`).

        O_PATH, so that nothing is opened for a look.
        """
        beside = self.directory.removesuffix(".snapfs")
        if image is None and beside != self.directory and os.path.isfile(beside):
            image = os.path.realpath(beside)
        path = image or known.image.path
        self.report.image = printable(path)
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: not a path at all
            if known.layers or known.bitmaps:
                why = error.strerror if isinstance(error, OSError) else "not a path"
                text = f"the image {path} is not there ({why}); name it instead of the directory"
                self.found(Grade.DAMAGE, "manifest.json", text)
            return None, {}
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                self.found(Grade.DAMAGE, "manifest.json", f"the image {path} is not a file")
                return None, {}
            return ImageStamp.of(path, fd), self._holders(known, fd)
        finally:
            os.close(fd)

    def _holders(self, known: Manifest, image: int) -> dict[str, str]:
        temps = {}
        try:
            for record in known.layers:
                if record.temp_dir is not None and record.temp_dir not in temps:
                    try:
                        temps[record.temp_dir] = os.open(record.temp_dir, os.O_PATH | os.O_CLOEXEC)
                    except OSError:
                        pass  # which is reported with the layer
            return holders(image, self.fd, temps)
        finally:
            for fd in temps.values():
                os.close(fd)

    def _activity(self, known: Manifest) -> Activity | None:
        where = "activity"
        record = mmap.mmap(-1, FILE_BYTES)
        try:
            with self.opened(self.fd, where, where) as fd:
                size = os.fstat(fd).st_size
                if size in (0, FILE_BYTES):
                    record[:size] = read_all(fd, size)
                else:
                    text = f"has {size} bytes and must have {FILE_BYTES}"
                    if known.clean:  # then nobody needs it
                        remove = partial(statefiles.remove, self.fd, where)
                        self.found(Grade.REPAIRABLE, where, text, remove)
                    else:
                        self.found(Grade.DAMAGE, where, text)
                        return None
        except FileNotFoundError:
            pass
        except Unusable:
            return None
        return Activity(record, -1)

    # Dirty bitmaps

    def _bitmaps(self, known: Manifest, stamp: ImageStamp | None, reason: str | None) -> None:
        try:
            with self.opened(self.fd, "bitmaps", "bitmaps", "directory") as directory:
                listed = {str(record.id) for record in known.bitmaps}
                for name in sorted(set(os.listdir(directory)) - listed):
                    self.leftover(directory, name, f"bitmaps/{name}", "is in no list")
                for record in known.bitmaps:
                    why = record.reason or self._distrusted(directory, record, known, stamp)
                    why = why or reason
                    if why is not None:
                        self._inconsistent(record, why)
        except FileNotFoundError:
            for record in known.bitmaps:
                self._inconsistent(record, "it is missing")
        except Unusable:
            pass

    def _inconsistent(self, record: BitmapRecord, why: str) -> None:
        text = f"bitmap {record.name!r} is inconsistent: {why}"
        self.found(Grade.LOST, f"bitmaps/{record.id}", text)

    def _distrusted(
        self, directory: int, record: BitmapRecord, known: Manifest, stamp: ImageStamp | None
    ) -> str | None:
        """Why the next mount would not trust the file of a bitmap, if so."""
        try:
            with self.opened(directory, str(record.id), f"bitmaps/{record.id}") as fd:
                size = os.fstat(fd).st_size
                head = bytes(read_all(fd, dirtyfiles.HEAD_BYTES))
        except FileNotFoundError:
            return "it is missing"
        except Unusable:
            return "it cannot be read"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        if not dirtyfiles.is_plausible(size):
            return f"its file has {size} bytes"
        clusters = 0 if stamp is None else Geometry(stamp.size, known.cluster_size).clusters
        if size < dirtyfiles.file_bytes(clusters):
            return f"its file has no room for the {clusters} clusters of the image"
        return dirtyfiles.distrusted(head)
