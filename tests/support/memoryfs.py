"""A FUSE file system in memory: `python memoryfs.py MOUNTPOINT`.

None of the kernel's answers about it is kept.  Not to be imported by tests: pyfuse3
must come after the request filter.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio
from attrs import define, field

BLOCK = 4096
SIZE = 1 << 30


@define(eq=False)
class File:
    inode: int
    is_directory: bool = False
    data: bytearray = field(factory=bytearray)
    blocks: set[int] = field(factory=set)


class MemoryFS(pyfuse3.Operations):
    """Files, which take the blocks that were written, and directories."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[int, File] = {}
        self._names: dict[tuple[int, bytes], File] = {}  # by directory and name

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_blksize = BLOCK
        if inode == pyfuse3.ROOT_INODE or self._files[inode].is_directory:
            entry.st_mode = stat.S_IFDIR | 0o700
            return entry
        entry.st_mode = stat.S_IFREG | 0o600
        entry.st_size = len(self._files[inode].data)
        entry.st_blocks = len(self._files[inode].blocks) * BLOCK // 512
        return entry

    async def getattr(self, inode, ctx):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_size:
            file = self._files[inode]
            del file.data[attr.st_size :]
            file.data.extend(bytes(attr.st_size - len(file.data)))
            file.blocks = {each for each in file.blocks if each * BLOCK < attr.st_size}
        return self._attributes(inode)

    async def lookup(self, parent_inode, name, ctx):
        if (parent_inode, name) not in self._names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(self._names[parent_inode, name].inode)

    def _make(self, parent: int, name: bytes, *, is_directory: bool = False) -> int:
        file = File(max([1, *self._files]) + 1, is_directory)
        self._files[file.inode] = self._names[parent, name] = file
        return file.inode

    async def create(self, parent_inode, name, mode, flags, ctx):
        inode = self._make(parent_inode, name)
        return pyfuse3.FileInfo(fh=inode), self._attributes(inode)

    async def mkdir(self, parent_inode, name, mode, ctx):
        return self._attributes(self._make(parent_inode, name, is_directory=True))

    async def rmdir(self, parent_inode, name, ctx):
        inode = self._names[parent_inode, name].inode
        if any(parent == inode for parent, _ in self._names):
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        del self._names[parent_inode, name]

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh, off, size):
        return bytes(self._files[fh].data[off : off + size])

    async def write(self, fh, off, buf):
        file = self._files[fh]
        file.data.extend(bytes(max(0, off + len(buf) - len(file.data))))
        file.data[off : off + len(buf)] = buf
        file.blocks.update(range(off // BLOCK, -(-(off + len(buf)) // BLOCK)))
        return len(buf)

    async def unlink(self, parent_inode, name, ctx):
        del self._names[parent_inode, name]

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for (parent, name), file in self._names.items():
            if (
                parent == fh
                and file.inode > start_id
                and not pyfuse3.readdir_reply(token, name, self._attributes(file.inode), file.inode)
            ):
                return

    # No flush: the kernel asks at the first close(2) and then never again, so a process
    # that has files open can end while this hangs.

    async def fsync(self, fh, datasync):
        pass

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


def main(where: str) -> None:
    pyfuse3.init(MemoryFS(), where, {"fsname=memory", "default_permissions"})
    print("mounted", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(sys.argv[1])
