from __future__ import annotations

import pytest

from snapfs.daemon.options import parse_options, parse_size
from snapfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("65536", 65536), ("64K", 65536), ("64k", 65536), ("1GiB", 1 << 30),
     ("1 MB", 10**6), ("3B", 3), ("2t", 2 << 40)],
)  # fmt: skip
def test_sizes_as_fstrim_takes_them(text, size):
    assert size == parse_size(text)


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "K", "0x10", "1 2", "64KKB", "٣"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_options_of_fstab_are_sorted_out():
    options = parse_options(
        ["defaults,noauto,x-systemd.automount,ro,allow_other", "cluster-size=128K,umask=027"]
    )
    assert (True, 131072, 0o027) == (options.read_only, options.cluster_size, options.umask)
    assert ["allow_other", "ro"] == options.fuse


def test_a_comma_in_a_value_has_a_backslash():
    options = parse_options([r"state=/a\,b\\\,c\d,fsname=x,umask=7", "ro"])
    assert (r"/a,b\,c\d", "x", 7) == (options.state, options.fsname, options.umask)


def test_what_is_for_the_kernel_keeps_its_order():
    options = parse_options(["noatime,max_read=64K,noexec,noatime,atime"])
    assert ["noatime", "noexec", "max_read=65536"] == options.fuse


@pytest.mark.parametrize(
    ("text", "words"),
    [("remount,ro", "unmount it and mount it again"), ("auto_unmount", "refused"),
     ("max_read=1", "from 4K"), ("noatime=1", "unknown")],
)  # fmt: skip
def test_what_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_options([text])


def test_the_last_of_two_wins():
    assert 2.5 == parse_options(["cbw-timeout=9,cbw-timeout=2.5"]).cbw_timeout


def test_unknown_options_are_refused_with_the_nearest_and_passed_over_when_sloppy():
    with pytest.raises(UsageError, match="did you mean state"):
        parse_options(["stat=/x"])
    assert parse_options([]) == parse_options(["stat=/x,whatever"], sloppy=True)


def test_the_control_group_is_a_name_or_a_number_and_nobody_in_particular():
    assert 0 == parse_options(["control-group=root"]).control_group
    assert 4711 == parse_options(["control-group=4711"]).control_group
    for value, words in (
        ("no-such-group", "groupadd no-such-group"),
        ("65534", "anybody"),
        ("-1", "no such group"),
        (str((1 << 32) - 1), "no such group"),
        ("", "needs a value"),
        ("1" * 5000, "no such group"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_options([f"control-group={value}"])
