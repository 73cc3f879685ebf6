"""Helpers that several test files share; no test file imports another, nor a conftest.

mounted.py       Mounted: an image and its mount by the real daemon; how tests run programs
installed.py     a script, where mount(8) and the shell find snapfs as if it were installed
terminal.py      Terminal: a program on a terminal of any width
calls.py         one call on such a mount, or question to it: punch, map, copy, state, errno
backedup.py      Disk: a mount with a backup directory, and what the image was at each point
points.py        Backup: a backup directory and its points, made without a mount
year.py          a program: a year of backups in minutes, and every restore compared
streams.py       streams as `snapfs send` writes them, without a mount
patterns.py      contents of images, such as that of the cases in the semantics
devices.py       Device: a file system that is shut down, frozen, and mounted again
filesystems.py   file systems on `active` and under the state: loop devices, tmpfs
terminals.py     Terminal: a program on a terminal, what it shows there, and keys
patched.py       Patched: the daemon with a part of it replaced, held where a test wants it
writing.py       somebody who writes until the daemon is killed
dying.py         a program: snapfs, killed at its Nth step
hanging.py       storage that hangs when it is told to: memoryfs.py in a process
filtered.py      a program: a file system of one file behind the request filter
memoryfs.py      a program: a FUSE file system in memory
images.py        MemoryImage: an image in memory, with faults and stalls
fakes.py         MemoryStore: a state directory in memory; Bench: an engine over it
naive.py         the specification of the engine, written down naively
world/           the engine beside plain bytes: steps, model and checks of its property test
answers.py       what a daemon answers to status and regions, made up
stores.py        sessions of the engine over a real state directory
fastpaths.py     Rig: the fast path over real files, fed with requests without a kernel
disk.py          Recorder: what a power cut at any moment may leave of a directory
sanitized.py     a build of snapfs whose C is under address and undefined-behaviour checks
watched.py       tests that run with watch.c in front of libc (crash/test_watched.py starts them)
watch.c          to be preloaded: tells of every native write and sync
hold.c           to be preloaded: each large write waits before it begins and when it is over
"""
