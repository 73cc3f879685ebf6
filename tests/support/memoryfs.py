"""A FUSE file system in memory: `python memoryfs.py MOUNTPOINT [writeback]`.

None of the kernel's answers about it is kept.  With `writeback` the kernel keeps what is
written and writes it back later, which fails (EIO) for every file whose name matches a
pattern in the extended attribute user.fail of the root (a space between two; "" ends it); the
file with the name in user.fail_fsync fails in its next fsync(2).  Not to be imported by
tests: pyfuse3 must come after the request filter.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
import sys
import time

import pyfuse3
import trio
from attrs import define, field

BLOCK = 4096
SIZE = 1 << 30


@define(eq=False)
class File:
    inode: int
    name: bytes = b""
    mode: int = stat.S_IFREG | 0o600
    data: bytearray = field(factory=bytearray)
    blocks: set[int] = field(factory=set)
    names: dict[bytes, File] = field(factory=dict)  # of a directory
    mtime_ns: int = field(factory=time.time_ns)
    ctime_ns: int = field(factory=time.time_ns)


class MemoryFS(pyfuse3.Operations):
    """Files take the blocks that were written."""

    def __init__(self, writeback: bool) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback
        root = File(pyfuse3.ROOT_INODE, mode=stat.S_IFDIR | 0o700)
        self._files = {root.inode: root}
        self._newest = root.inode
        self._failing: set[bytes] = set()  # patterns
        self._failing_fsync: set[bytes] = set()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        file = self._files[inode]
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_blksize = BLOCK
        entry.st_mode = file.mode
        entry.st_size = len(file.data)
        entry.st_blocks = len(file.blocks) * BLOCK // 512
        entry.st_mtime_ns, entry.st_ctime_ns = file.mtime_ns, file.ctime_ns
        return entry

    async def getattr(self, inode, ctx):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        file = self._files[inode]
        if fields.update_size:
            del file.data[attr.st_size :]
            file.data.extend(bytes(attr.st_size - len(file.data)))
            file.blocks = {each for each in file.blocks if each * BLOCK < attr.st_size}
            file.mtime_ns = file.ctime_ns = time.time_ns()
        if fields.update_mtime:
            file.mtime_ns = attr.st_mtime_ns
        if fields.update_ctime:
            file.ctime_ns = attr.st_ctime_ns
        if fields.update_mode:
            file.mode = stat.S_IFMT(file.mode) | stat.S_IMODE(attr.st_mode)
        return self._attributes(inode)

    async def setxattr(self, inode, name, value, ctx):
        names = set(value.split())
        if name == b"user.fail":
            self._failing = names
        elif name == b"user.fail_fsync":
            self._failing_fsync = names
        else:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    async def lookup(self, parent_inode, name, ctx):
        names = self._files[parent_inode].names
        if name not in names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(names[name].inode)

    def _make(self, parent: int, name: bytes, mode: int) -> File:
        self._newest += 1
        file = File(self._newest, name, mode)
        self._files[file.inode] = self._files[parent].names[name] = file
        return file

    async def create(self, parent_inode, name, mode, flags, ctx):
        file = self._make(parent_inode, name, mode)
        return pyfuse3.FileInfo(fh=file.inode), self._attributes(file.inode)

    async def mknod(self, parent_inode, name, mode, rdev, ctx):
        return self._attributes(self._make(parent_inode, name, mode).inode)

    async def mkdir(self, parent_inode, name, mode, ctx):
        return self._attributes(self._make(parent_inode, name, stat.S_IFDIR | mode).inode)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh, off, size):
        return bytes(self._files[fh].data[off : off + size])

    async def write(self, fh, off, buf):
        file = self._files[fh]
        if any(fnmatch.fnmatchcase(file.name, each) for each in self._failing):
            raise pyfuse3.FUSEError(errno.EIO)
        file.data.extend(bytes(max(0, off + len(buf) - len(file.data))))
        file.data[off : off + len(buf)] = buf
        file.blocks.update(range(off // BLOCK, -(-(off + len(buf)) // BLOCK)))
        file.mtime_ns = file.ctime_ns = time.time_ns()
        return len(buf)

    async def unlink(self, parent_inode, name, ctx):
        del self._files[parent_inode].names[name]

    async def rmdir(self, parent_inode, name, ctx):
        if self._files[parent_inode].names[name].names:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        del self._files[parent_inode].names[name]

    async def rename(self, parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx):
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        file = self._files[parent_inode_old].names.pop(name_old)
        file.name = name_new
        self._files[parent_inode_new].names[name_new] = file

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for name, file in sorted(
            self._files[fh].names.items(), key=lambda each: int(each[1].inode)
        ):
            if file.inode > start_id and not pyfuse3.readdir_reply(
                token, name, self._attributes(file.inode), file.inode
            ):
                return

    # No flush: the kernel asks at the first close(2) and then never again, so a process
    # that has files open can end while this hangs.

    async def fsync(self, fh, datasync):
        name = self._files[fh].name
        if name in self._failing_fsync:
            self._failing_fsync.remove(name)
            raise pyfuse3.FUSEError(errno.EIO)

    async def fsyncdir(self, fh, datasync):
        pass

    async def statfs(self, ctx):
        data = pyfuse3.StatvfsData()
        used = sum(len(file.blocks) for file in self._files.values())
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks = SIZE // BLOCK
        data.f_bfree = data.f_bavail = SIZE // BLOCK - used
        data.f_namemax = 255
        return data


def main(where: str, *options: str) -> None:
    pyfuse3.init(MemoryFS("writeback" in options), where, {"fsname=memory", "default_permissions"})
    print("mounted", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
