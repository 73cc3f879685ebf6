"""The manual pages say what the program has, and nothing else."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from snapfs.cli.parser import build_parser
from snapfs.daemon.options import FLAGS, IGNORED, OWN, PASSED_ON
from snapfs.errors import ExitCode, HelperExit

MAN = Path(__file__).parents[3] / "man"


def plain(page: str) -> str:
    """A page without the marks of roff."""
    text = (MAN / page).read_text().replace("\\-", "-")
    text = re.sub(r"\\f[BIRP]", "", text)
    return re.sub(r"^\.[A-Z]+ ?", "", text, flags=re.MULTILINE)


def section(page: str, title: str) -> str:
    text = (MAN / page).read_text()
    return text.split(f".SH {title}\n")[1].split("\n.SH ")[0].replace("\\-", "-")


def subparsers() -> dict[str, argparse.ArgumentParser]:
    return dict(build_parser()[1])


@pytest.mark.parametrize("verb", subparsers())
def test_every_command_and_option_is_in_the_manual(verb):
    text = plain("snapfs.1")
    assert re.search(rf"(\bsnapfs|\|) {verb}\b", text)
    for action in subparsers()[verb]._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help") and action.help != argparse.SUPPRESS:
                assert re.search(rf"(?<![\w-]){option}\b", text), option


def test_every_option_in_the_synopsis_exists():
    known = {"--version", "--help"}
    for parser in subparsers().values():
        for action in parser._actions:
            known |= set(action.option_strings)
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section("snapfs.1", "SYNOPSIS")))
    assert written <= known


def test_every_mount_option_is_in_the_manual():
    text = plain("mount.snapfs.8")
    for option in (*OWN, *FLAGS, *PASSED_ON, *IGNORED):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option


def test_no_mount_option_in_the_manual_is_unknown():
    titles = re.findall(r"^\.BI? ([a-z_\\-]+)=", (MAN / "mount.snapfs.8").read_text(), re.MULTILINE)
    assert titles
    assert {title.replace("\\-", "-") for title in titles} <= set(OWN)


def test_the_exit_statuses_are_those_of_the_program():
    lines = re.findall(r"^\.B (\d+)$", section("snapfs.1", "EXIT STATUS"), re.MULTILINE)
    assert lines
    assert {int(line) for line in lines} == {int(code) for code in ExitCode}


@pytest.mark.parametrize("page", ["mount.snapfs.8", "umount.fuse.snapfs.8"])
def test_the_exit_statuses_of_the_helpers_are_those_of_the_program(page):
    written = re.findall(r"^\\?f?B?\.?B? ?(\d+)$", section(page, "EXIT STATUS"), re.MULTILINE)
    assert written
    assert {int(each) for each in written} <= {int(code) for code in HelperExit}
