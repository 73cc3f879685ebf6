"""Numbers of mounts that are never given again, from statmount(2) and listmount(2) of Linux 6.8.

The id in mountinfo is, as soon as the mount is gone: perhaps to the next one, which may have
its device number, too.
"""

from __future__ import annotations

import ctypes
import struct

SYS_STATMOUNT, SYS_LISTMOUNT = 457, 458  # the same for all machines but alpha
STATMOUNT_MNT_BASIC = 0x2  # linux/mount.h
LSMT_ROOT = (1 << 64) - 1  # all mounts
AT_ONCE = 512

_REQUEST = struct.Struct("=IIQQ")  # struct mnt_id_req, MNT_ID_REQ_SIZE_VER0
_STATMOUNT_BYTES = 1024
_MNT_ID_OLD = 56  # offset in struct statmount

_libc = ctypes.CDLL(None, use_errno=True)


def number_of(mount_id: int) -> int | None:
    """The number of the mount that has an id now; None: there is none, or it cannot be known."""
    last = 0
    found = (ctypes.c_uint64 * AT_ONCE)()
    while True:
        request = _REQUEST.pack(_REQUEST.size, 0, LSMT_ROOT, last)
        count = _call(SYS_LISTMOUNT, request, found, AT_ONCE)
        for number in found[: max(0, count)]:
            if id_of(number) == mount_id:
                return int(number)
        if count < AT_ONCE:
            return None
        last = found[count - 1]


def id_of(number: int) -> int | None:
    """The id that a mount has; None if it is gone."""
    found = ctypes.create_string_buffer(_STATMOUNT_BYTES)
    request = _REQUEST.pack(_REQUEST.size, 0, number, STATMOUNT_MNT_BASIC)
    if _call(SYS_STATMOUNT, request, found, _STATMOUNT_BYTES) < 0:
        return None
    return int(struct.unpack_from("=I", found, _MNT_ID_OLD)[0])


def _call(call: int, request: bytes, found: object, size: int) -> int:
    return int(_libc.syscall(call, request, found, ctypes.c_size_t(size), ctypes.c_uint(0)))
