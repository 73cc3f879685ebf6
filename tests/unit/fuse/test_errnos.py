from __future__ import annotations

import errno
import logging

import pytest

from snapfs import errors
from snapfs.engine.events import Events
from snapfs.fuse.errnos import Errnos


@pytest.fixture
async def errnos() -> Errnos:
    return Errnos(Events())


async def test_an_errno_that_the_kernel_does_not_take_is_eio_and_logged(errnos, caplog):
    for number in (512, 524, 528, 4095, -5):  # ERESTARTSYS, ENOTSUPP and EJUKEBOX, for three
        caplog.clear()
        assert errno.EIO == errnos.errno_of(OSError(number, "odd"), f"write {number}")
        assert [logging.ERROR] == [record.levelno for record in caplog.records]
        assert "odd" in caplog.text
    assert 511 == errnos.errno_of(OSError(511, "the last"), "write")
    assert errnos.unhealthy is None


async def test_enosys_of_storage_does_not_switch_requests_off(errnos):
    assert errno.EOPNOTSUPP == errnos.errno_of(OSError(errno.ENOSYS, ""), "fsync")


async def test_no_memory_is_said_and_makes_nothing_unhealthy(errnos, caplog):
    assert errno.ENOMEM == errnos.errno_of(MemoryError(), "setattr")
    assert errnos.unhealthy is None
    assert "setattr: MemoryError()" in caplog.text


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.NameTooLong(""), errno.ENAMETOOLONG),
        (errors.InvalidName(""), errno.EINVAL),
        (errors.ImageTooLarge(""), errno.EFBIG),
    ],
)
async def test_each_domain_error_has_its_errno(errnos, error, number):
    assert number == errnos.errno_of(error, "something")


async def test_what_nobody_expected_is_eio_and_unhealthy(errnos):
    assert errno.EIO == errnos.errno_of(ValueError("a bug"), "read")
    assert "a bug" in (errnos.unhealthy or "")
