"""What is looked at before a mount, so that what cannot work touches nothing."""

from __future__ import annotations

import os
from pathlib import Path

from attrs import field, frozen

from .. import errors
from ..client import mountinfo
from ..fuse.mounting import Mountpoint
from .options import MountOptions
from .process import largest_file


def _real_path(path: str) -> str:
    return os.path.realpath(path)


@frozen
class Config:
    """What to mount where.

    Paths are resolved here, once: after the mount even a look at the mountpoint
    from the trio thread would wait for itself.
    """

    image: str = field(converter=_real_path)
    where: Mountpoint
    options: MountOptions

    @property
    def state(self) -> str:
        """The state directory."""
        return os.path.abspath(self.options.state or f"{self.image}.snapfs")


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is touched.  Blocks.

    Raises UsageError, MountError and NotPermitted that name the remedy.  Anything but another
    snapfs may be mounted on the mountpoint: an automount, or the volume of a container.
    """
    where = config.where.path
    mount = config.where.busy()
    if mount is not None:
        raise errors.MountError(f"{where} is busy: {mount.source} is mounted there")
    if os.path.commonpath((config.state, where)) == where:  # no further look at it
        raise errors.UsageError(
            f"the state directory {config.state} is under the mountpoint {where}"
        )
    state = os.path.realpath(config.state)
    for path, what in ((config.image, "image"), (state, "state directory")):
        if os.path.commonpath((path, where)) == where:
            raise errors.UsageError(f"the {what} {path} is under the mountpoint {where}")
    if os.path.commonpath((state, where)) == state:
        raise errors.UsageError(f"the mountpoint {where} is under the state directory {state}")
    for path, what in ((config.image, "image"), (os.path.dirname(state), "state directory")):
        _check_backing(path, what, where)
    _check_size(config)
    if config.options.temp_dir is not None:
        check_temp_dir(os.path.realpath(config.options.temp_dir), where)
    if not os.path.exists("/dev/fuse"):
        raise errors.MountError("there is no /dev/fuse; load the kernel module: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise errors.NotPermitted(
            "you may not open /dev/fuse; root can allow it: chmod 666 /dev/fuse"
        )
    others = [word for word in ("allow_other", "allow_root") if word in config.options.fuse]
    if others and os.geteuid() and not _user_allow_other():
        raise errors.NotPermitted(f"{others[0]} needs the line user_allow_other in /etc/fuse.conf")


def dry_run(image: str, mountpoint: str, options: MountOptions) -> None:
    """`check` for who does not mount."""
    where = Mountpoint.open(mountpoint)
    try:
        check(Config(image, where, options))
    finally:
        where.close()


def check_temp_dir(path: str, where: str) -> None:
    """Refuse a directory for temp images that is on the mount `where`.  Blocks.  UsageError."""
    if os.path.commonpath((path, where)) == where:
        raise errors.UsageError(f"the temp-dir {path} is under the mountpoint {where}")
    _check_backing(path, "temp-dir", where)


def _check_size(config: Config) -> None:
    """Whoever writes to `active`, or makes a snapshot, would be refused, not whoever mounts."""
    limit = largest_file()
    try:
        size = os.stat(config.image).st_size
    except OSError:
        return  # whoever opens it is told
    if limit is not None and size > limit and not config.options.read_only:
        raise errors.MountError(
            f"the image has {size} bytes, and files may have {limit} at most here: raise the limit "
            "(ulimit -f, LimitFSIZE= of a systemd service), or mount it with -o ro"
        )


def _check_backing(path: str, what: str, where: str) -> None:
    for backing in mountinfo.lives_on(path):
        if os.path.commonpath((backing, where)) == where:
            raise errors.UsageError(
                f"the {what} is on a file system that lives on {backing}: "
                "a copy would wait for itself; put it elsewhere"
            )


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
