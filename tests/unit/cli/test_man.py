"""The manual pages say what the program has, and nothing else."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.cli.parser import build_parser
from snapfs.daemon.options import FLAGS, IGNORED, OWN, PASSED_ON
from snapfs.errors import ExitCode, HelperExit
from tests.support.mounted import PATIENCE

MAN = Path(__file__).parents[3] / "man"
PAGES = sorted(path.name for path in MAN.glob("*.[1-8]"))
COMMANDS = [page for page in PAGES if page.endswith(".1")]


def plain(page: str) -> str:
    """A page without the marks of roff."""
    text = (MAN / page).read_text().replace("\\-", "-")
    text = re.sub(r"\\f[BIRP]", "", text)
    return re.sub(r"^\.[A-Z]+ ?", "", text, flags=re.MULTILINE)


def section(page: str, title: str) -> str:
    text = (MAN / page).read_text()
    return text.split(f".SH {title}\n")[1].split("\n.SH ")[0].replace("\\-", "-")


def synopsis(page: str) -> list[str]:
    """A line for each command."""
    text = re.sub(r"\\f[BIR]", "", section(page, "SYNOPSIS"))
    return re.sub(r"\n    ", " ", text).splitlines()[1:-1]


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    below = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if not below:
        yield parser
    for each in below:
        for leaf in each.choices.values():
            yield from leaves(leaf)


LEAVES = {leaf.prog.removeprefix("snapfs "): leaf for leaf in leaves(build_parser()[0])}


def described(command: str) -> tuple[str, str]:
    """The page, and the line of its synopsis, that has a command."""
    *above, verb = command.split()
    found = [
        (page, line)
        for page in COMMANDS
        for line in synopsis(page)
        if line.startswith(" ".join(["snapfs", *above, ""]))
        and (above or line.split()[1] != "bitmap")
        and re.search(rf"(^{' '.join(['snapfs', *above])}|\\|) {verb}( |$)", line)
    ]
    pages = {page for page, _ in found}
    assert 1 == len(pages), (command, pages)
    return found[0][0], " ".join(line for _, line in found)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {
        option
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help") and action.help != argparse.SUPPRESS
    }


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_and_option_is_in_one_page(command):
    page, _ = described(command)
    text = plain(page)
    for option in options_of(LEAVES[command]):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), (page, option)


@pytest.mark.parametrize("command", LEAVES)
def test_every_option_in_the_synopsis_exists(command):
    _, line = described(command)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)) <= options_of(LEAVES[command])


def test_nothing_is_in_a_synopsis_that_there_is_not():
    verbs = {command.split()[0] for command in LEAVES}
    for page in COMMANDS:
        for line in synopsis(page):
            assert line.split()[1] in verbs, line


def test_each_page_is_named_by_the_others_and_where_there_is_one():
    names = {f"{page[:-2]} ({page[-1]})" for page in PAGES}
    for page in PAGES:
        text = (MAN / page).read_text().replace("\\-", "-")
        named = set(re.findall(r"^\.BR (\S*snapfs\S*) (\(\d\))", text, re.MULTILINE))
        assert {" ".join(each) for each in named} <= names, page
    first = (MAN / "snapfs.1").read_text().replace("\\-", "-")
    for name in names:
        assert name in first, name


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
    assert {int(line) for line in lines} == {int(code) for code in ExitCode}


@pytest.mark.parametrize("page", ["mount.snapfs.8", "umount.fuse.snapfs.8"])
def test_the_exit_statuses_of_the_helpers_are_those_of_the_program(page):
    written = re.findall(r"^\.B (\d+)$", section(page, "EXIT STATUS"), re.MULTILINE)
    assert written
    assert {int(each) for each in written} <= {int(code) for code in HelperExit}


@pytest.mark.parametrize(
    "command",
    [["man", "--warnings=w", "-l"], ["groff", "-ww", "-man", "-Tutf8", "-z"]],
    ids=["man", "groff"],
)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_rendered_without_warnings(page, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(
        [*command, MAN / page], capture_output=True, text=True, timeout=PATIENCE, check=True,
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
    )  # fmt: skip
    assert "" == done.stderr
