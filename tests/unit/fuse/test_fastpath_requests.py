"""Requests that lie, more than there is room for, junk: answered truly or left to Python."""

from __future__ import annotations

import random

import pytest

from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from snapfs.fuse.handles import SLOTS
from tests.support.fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    IN_HEADER,
    IO_IN,
    NEW,
    OLD,
    READ,
    SIZE,
    WRITE,
    Rig,
    read_request,
    write_request,
    written,
)
from tests.support.naive import check_bitmaps


@pytest.mark.parametrize("what", ["read", "write"])
async def test_a_request_that_lies_is_pythons(image, what):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        await rig.engine.write(0, OLD[: 4 * CLUSTER])  # nothing is pending there
        before = image.read_bytes()
        if what == "read":
            good = read_request(ACTIVE, ACTIVE_HANDLE, 0, 100)
            bad = [
                read_request(ACTIVE, handle, 0, 1),  # another file's
                read_request(inode, ACTIVE_HANDLE, 0, 1),
                read_request(ACTIVE, 0, 0, 1),
                read_request(ACTIVE, ACTIVE_HANDLE + 4096, 0, 1),  # the same slot
                read_request(1, ACTIVE_HANDLE, 0, 1),
                read_request(inode + 1, handle, 0, 1),
                read_request(ACTIVE, ACTIVE_HANDLE, 0, (1 << 20) + 1),
                read_request(ACTIVE, ACTIVE_HANDLE, 0, (1 << 32) - 1),
                read_request(ACTIVE, ACTIVE_HANDLE, (1 << 64) - 1, 1),
                read_request(inode, handle, (1 << 63) - 1, 1),
                read_request(inode, handle, (1 << 64) - 4096, 4096),
            ]
        else:
            good = write_request(ACTIVE_HANDLE, 0, NEW)
            bad = [
                write_request(ACTIVE_HANDLE, 0, NEW, size=CLUSTER + 1),
                write_request(ACTIVE_HANDLE, 0, NEW, size=CLUSTER - 1),
                write_request(ACTIVE_HANDLE, 0, NEW, size=(1 << 32) - 1),
                write_request(ACTIVE_HANDLE, 0, b""),
                write_request(ACTIVE_HANDLE, (1 << 64) - 1, NEW),
                write_request(ACTIVE_HANDLE, (1 << 64) - CLUSTER, NEW),
                write_request(ACTIVE_HANDLE, (1 << 63) - 1, NEW),
                write_request(ACTIVE_HANDLE, 0, NEW, flags=1 << 3),
                write_request(handle, 0, NEW),
                write_request(handle, 0, NEW, inode=inode),
                write_request(ACTIVE_HANDLE, 0, NEW, inode=inode),
                write_request(0, 0, NEW),
            ]
        kind = READ if what == "read" else WRITE
        for size in (0, 1, 39, 40, 79, len(good) - 1, len(good) + 1):
            header = IN_HEADER.pack(size, kind, 7, ACTIVE, 0, 0, 1, 0, 0)
            bad.append((header + good[40:] + b"x")[:size])
            bad.append(header + good[40:])  # the header's length is not the request's
        for request in bad:
            assert rig.send(request) is None, request[:80]
        requestfilter.handle_closed(ACTIVE_HANDLE)
        assert rig.send(good) is None
        assert before == image.read_bytes()


@pytest.mark.parametrize("flags", [0, 1, 2, 4, 7])
async def test_known_flags_of_a_write_change_nothing(image, flags):
    async with Rig.make(image) as rig:
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 0, NEW, flags=flags))


async def test_of_two_handles_in_one_slot_the_earlier_one_stays(image):
    later = ACTIVE_HANDLE + SLOTS
    async with Rig.make(image) as rig:
        requestfilter.handle_opened(later, ACTIVE)
        assert rig.send(read_request(ACTIVE, later, 0, 1)) is None
        requestfilter.handle_closed(later)  # does not know it
        assert (0, OLD[:1]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1))
        requestfilter.handle_closed(ACTIVE_HANDLE)
        requestfilter.handle_opened(later, ACTIVE)
        assert (0, OLD[:1]) == rig.send(read_request(ACTIVE, later, 0, 1))
        requestfilter.handle_closed(later)


async def test_more_layers_or_ranges_than_there_is_room_for(image, monkeypatch):
    async with Rig.make(image) as rig:
        plain = rig.engine.published_state()
        layer = await rig.engine.create_snapshot("s")
        for name, value in (
            ("frozen", (1, 2)),
            ("copying", (1, 2)),
            ("dirty", bytearray(9)),
            ("layers", rig.engine.published_state().layers[0]),
        ):
            for count, answer in ((256, (0, OLD[:9])), (257, None), (0, (0, OLD[:9]))):
                full = plain._replace(**{name: [value] * count})
                monkeypatch.setattr(rig.engine, "published_state", lambda full=full: full)
                assert answer == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9)), name
        assert layer.live


async def test_an_empty_image(tmp_path):
    image = tmp_path / "empty"
    image.touch()
    async with Rig.make(image) as rig:
        assert (0, b"") == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 4096))
        assert rig.send(write_request(ACTIVE_HANDLE, 0, b"x")) is None


@pytest.mark.parametrize(
    "state",
    [
        7,
        (),
        (1, 2),
        (0, 1, 12, True, False, [], False, [], [], [], [], None, bytearray(), bytearray(56)),
    ],
    ids=["not a tuple", "empty", "short", "bitmap too short"],
)
async def test_nonsense_switches_it_off(image, state, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(str(args.exc_value)))
    async with Rig.make(image) as rig:
        requestfilter.set_fastpath(lambda suspect: state, int, print)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert not rig.fast.collect()["on"]


async def test_off_or_not_now_everything_is_pythons(image):
    async with Rig.make(image, on=False) as rig:
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        requestfilter.set_fastpath(lambda suspect: None, int, print)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert rig.fast.collect()["on"]


@pytest.mark.parametrize("seed", range(4))
async def test_junk_is_answered_by_nobody_or_truly(image, seed):
    """Requests with random bytes in them: what is answered is what they say."""
    chance = random.Random(seed)
    content = bytearray(OLD)
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.discard(layer, 12 * CLUSTER, CLUSTER)
        handle, inode = rig.handle(layer), FIRST_SNAPSHOT + layer.id
        answered = 0
        for _ in range(5000):
            data = chance.randbytes(chance.randrange(9000))
            request = bytearray(
                chance.choice(
                    (
                        read_request(ACTIVE, ACTIVE_HANDLE, chance.randrange(SIZE), 4096),
                        read_request(inode, handle, chance.randrange(SIZE), CLUSTER * 3),
                        write_request(ACTIVE_HANDLE, chance.randrange(SIZE), data),
                    )
                )
            )
            for _ in range(chance.randrange(4)):
                request[chance.randrange(min(len(request), 80))] = chance.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
                )
            del request[chance.choice((len(request), chance.randrange(len(request) + 1))) :]
            reply = rig.send(bytes(request))
            if reply is None:
                continue
            answered += 1
            _, kind, _, inode_, *_ = IN_HEADER.unpack_from(request)
            _, offset, size, *_ = IO_IN.unpack_from(request, IN_HEADER.size)
            if kind == WRITE:
                assert written(size) == reply
                assert (ACTIVE, size) == (inode_, len(request) - 80)
                content[offset : offset + size] = request[80:]
            else:
                source = content if inode_ == ACTIVE else OLD
                assert (0, bytes(source[offset : offset + size])) == reply
                assert inode_ == ACTIVE or not {12} & set(
                    layer.geometry.touched(offset, min(size, SIZE - offset))
                )
        assert answered > 500
        first = 12 * CLUSTER
        assert OLD[:first] == bytes(await rig.engine.read_snapshot(layer, 0, first))
        check_bitmaps(rig.engine)
    assert content == image.read_bytes()
