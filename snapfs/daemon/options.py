"""Mount options, as mount(8), fstab and `snapfs mount -o` give them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from attrs import define, field

from ..errors import UsageError

# Words of fstab and mount(8) that are for others, and what holds anyway.
IGNORED = frozenset(
    {
        "_netdev",
        "nofail",
        "noauto",
        "auto",
        "user",
        "users",
        "owner",
        "group",
        "defaults",
        "rw",
        "atime",
        "diratime",
        "relatime",
        "norelatime",
        "nostrictatime",
        "nolazytime",
        "dev",
        "suid",
        "exec",
        "async",
        "loud",
        "symfollow",
        "subtype",
    }
)
# What the kernel does with the mount: as flags, and as words for FUSE.
PASSED_ON = frozenset(
    {
        "allow_other",
        "allow_root",
        "default_permissions",
        "nodev",
        "nosuid",
        "noexec",
        "noatime",
        "nodiratime",
        "strictatime",
        "lazytime",
        "sync",
        "dirsync",
        "nosymfollow",
        "silent",
    }
)
REFUSED = {
    "auto_unmount": "auto_unmount is refused: a dead daemon must not leave an empty directory "
    "behind, which rsync --delete would take for the backup's source",
    "remount": "a snapfs cannot be mounted anew with other options: unmount it and mount it "
    "again; for flags of the kernel such as noexec: mount -i -o remount,bind,noexec MOUNTPOINT",
}
LOG_LEVELS = ("debug", "info", "warning", "error")

GID_DIGITS = 10  # of a number of a group, at most
MIN_READ = 4096  # below a page the kernel could read nothing

_UNITS = ("", "K", "M", "G", "T", "P", "E")


def parse_size(text: str) -> int:
    """A number of bytes as fstrim(8) takes it: K, KiB = 1024, KB = 1000, and so on.

    Raises UsageError.
    """
    match = re.fullmatch(r"(\d+)\s*(?:([KMGTPE])(iB|B)?|B)?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write for example 65536, 64K or 1GiB")
    letter, suffix = (match[2] or "").upper(), (match[3] or "").upper()
    if suffix == "B":
        return int(match[1]) * int(1000 ** _UNITS.index(letter))
    return int(match[1]) * int(1024 ** _UNITS.index(letter))


@define
class MountOptions:
    """What the options say; None: the default."""

    state: str | None = None
    cluster_size: int | None = None
    on_cbw_error: str = "break-snapshot"
    cbw_timeout: float = 15.0
    durability: str = "process"
    temp_dir: str | None = None  # None: as before
    temp_limit: int | None = None
    temp_reserve: int | None = None  # None: see `Store.default_reserve`
    max_size: int | None = None  # None: see `ActiveImage`
    uid: int | None = None
    gid: int | None = None
    umask: int = 0
    control_group: int | None = None  # whose members may look at the mount; a gid
    log_level: str = "info"
    max_read: int | None = None
    read_only: bool = False
    writeback_cache: bool = False
    no_fastpath: bool = False
    any_fs: bool = False
    fsname: str | None = None  # None: the image
    fuse: list[str] = field(factory=list)  # of PASSED_ON, and max_read=


def _choice(name: str, choices: Iterable[str]) -> Callable[[str], str]:
    def convert(value: str) -> str:
        if value not in choices:
            raise UsageError(f"{name}={value}: choose one of {', '.join(choices)}")
        return value

    return convert


def _number(name: str, base: int) -> Callable[[str], int]:
    def convert(value: str) -> int:
        try:
            number = int(value, base)
        except ValueError:
            number = -1
        if number < 0:
            raise UsageError(f"{name}={value} is not a number that it can be")
        return number

    return convert


def _seconds(value: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", value, re.ASCII):
        raise UsageError(f"cbw-timeout={value} is not a number of seconds; 0 means none")
    return float(value)


def _max_read(value: str) -> int:
    size = parse_size(value)
    if not MIN_READ <= size < 1 << 32:
        raise UsageError(f"max_read={value} is not a size from 4K to 4G")
    return size


def _cluster_size(value: str) -> int:
    size = parse_size(value)
    if size & (size - 1) or not 4096 <= size <= 4 << 20:
        raise UsageError(f"cluster-size={value} is not a power of two from 4K to 4M")
    return size


def _group(value: str) -> int:
    """The number of a group.  Raises UsageError."""
    import grp  # noqa: PLC0415 - for most mounts not needed

    try:
        found = grp.getgrnam(value).gr_gid
    except KeyError:
        number = value if len(value) <= GID_DIGITS and value.isascii() else ""
        if not (number.isdigit() and int(number) < (1 << 32) - 1):
            raise UsageError(
                f"control-group={value}: there is no such group; make it: groupadd {value}"
            ) from None
        found = int(value)
    if found == _overflow_gid():
        raise UsageError(
            f"control-group={value} is the group of those whose group has no number here, which "
            "can be anybody; choose another"
        )
    return found


def _overflow_gid() -> int:
    """What the kernel calls groups that are unknown in this user namespace."""
    try:
        with open("/proc/sys/kernel/overflowgid") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534


OWN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "state": ("state", str),
    "cluster-size": ("cluster_size", _cluster_size),
    "on-cbw-error": (
        "on_cbw_error",
        _choice("on-cbw-error", ("break-snapshot", "break-guest-write")),
    ),
    "cbw-timeout": ("cbw_timeout", _seconds),
    "durability": ("durability", _choice("durability", ("process", "power"))),
    "temp-dir": ("temp_dir", str),
    "temp-limit": ("temp_limit", parse_size),
    "temp-reserve": ("temp_reserve", parse_size),
    "max-size": ("max_size", parse_size),
    "uid": ("uid", _number("uid", 10)),
    "gid": ("gid", _number("gid", 10)),
    "umask": ("umask", _number("umask", 8)),
    "fsname": ("fsname", str),
    "max_read": ("max_read", _max_read),
    "control-group": ("control_group", _group),
    "log-level": ("log_level", _choice("log-level", LOG_LEVELS)),
}
FLAGS = {
    "ro": "read_only",
    "writeback_cache": "writeback_cache",
    "no_fastpath": "no_fastpath",
    "any_fs": "any_fs",
}


def parse_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Options from the arguments of -o, each a comma-separated list.

    A comma that belongs to a value has a backslash before it, and so has such a backslash.
    Raises UsageError, naming the nearest option for an unknown one, which
    `sloppy` (-s of mount(8)) passes over.
    """
    options = MountOptions()
    for option in _split(texts):
        name, has_value, value = option.partition("=")
        if not option or name in IGNORED or name == "comment" or name.lower().startswith("x-"):
            continue
        if name in REFUSED:
            raise UsageError(REFUSED[name])
        if name in OWN:
            attribute, convert = OWN[name]
            if not has_value or not value:
                raise UsageError(f"the option {name} needs a value: {name}=...")
            setattr(options, attribute, convert(value))
        elif name in FLAGS and not has_value:
            setattr(options, FLAGS[name], True)
        elif name in PASSED_ON and not has_value:
            if name not in options.fuse:
                options.fuse.append(name)
        elif not sloppy:
            known = [*OWN, *FLAGS, *PASSED_ON, *IGNORED]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown mount option {name!r}{hint}")
    if options.read_only:
        options.fuse.append("ro")
    if options.max_read is not None:
        options.fuse.append(f"max_read={options.max_read}")
    return options


def _split(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for option in re.findall(r"(?:\\.|[^,])+", text, re.DOTALL):
            yield re.sub(r"\\([\\,])", r"\1", option)
