"""Completion of our words in a shell: the script, and the names that there are at the moment.

The script is made by shtab from the parser.  For the names of mounts, snapshots, bitmaps and
points it asks us, with the words that are typed already.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..client import mountinfo
from ..client.mountinfo import FS_TYPE, Mount
from ..client.wire import Client
from ..errors import SnapfsError

SHELLS = ("bash", "zsh", "fish")
KINDS = ("mount", "snapshot", "bitmap", "point", "command", "shell")
PATIENCE = 2.0  # seconds that a daemon has to answer: somebody waits for the next letter

# What no shell takes for anything but itself, whatever it does with our answer.
_HARMLESS = re.compile(r"[\w.,:@%+/=-]+", re.ASCII)

# By what stands for an argument in the usage.
_KIND_OF = {
    "MOUNTPOINT": "mount",
    "DIR|MOUNTPOINT": "mount",
    "MOUNTPOINT [NAME]": "mount",
    "MOUNTPOINT NAME": "snapshot",
    "MOUNTPOINT NAME...": "snapshot",
    "MOUNTPOINT NAME TEXT": "snapshot",
    "MOUNTPOINT A [B]": "snapshot",
    "MOUNTPOINT SOURCE TARGET": "bitmap",
    "SNAPSHOT": "snapshot",
    "SNAPSHOT DEST": "snapshot",
    "MOMENT": "snapshot",
    "FILE": "snapshot",
    "B": "bitmap",
    "POINT": "point",
    "COMMAND": "command",
    "bash|zsh|fish": "shell",
    "IMAGE": "file",
    "PREVIOUS": "file",
    "PICTURE": "file",
    "STATE": "file",
    "DEST": "file",
    "DIR": "directory",
}

_SCRIPTS = {
    "bash": """\
_snapfs_names() {
  local found
  found=$("${COMP_WORDS[0]}" completion "--for=$1" -- "$2" "${COMP_WORDS[@]:1:COMP_CWORD-1}" \\
    2>/dev/null)
  if [ -n "$found" ]; then printf '%s\\n' "$found"; else compgen -f -- "$2"; fi
}
""",
    "zsh": """\
_snapfs_names() {
  local -a found
  local -a before=("${(@)words[1,CURRENT-1]}")
  found=(${(f)"$(snapfs completion "--for=$1" -- "$PREFIX" "${before[@]}" 2>/dev/null)"})
  if (( $#found )); then compadd -a found; else _files; fi
}
""",
    "fish": """\
function _snapfs_names
  set -l word (commandline -ct)
  set -l found (snapfs completion --for=$argv[1] -- "$word" (commandline -opc)[2..] 2>/dev/null)
  if test (count $found) -gt 0
    printf '%s\\n' $found
  else
    __fish_complete_path "$word"
  end
end
""",
}


def _complete(kind: str) -> dict[str, Any]:
    """What shtab takes for an argument of a kind."""
    words = {
        "bash": f'_snapfs_{kind}() {{ _snapfs_names {kind} "$1"; }}\n',
        "zsh": f"_snapfs_{kind}() {{ _snapfs_names {kind} }}\n",
        "fish": "",
    }
    return {
        "bash": f"_snapfs_{kind}",
        "zsh": f"_snapfs_{kind}",
        "fish": f"(_snapfs_names {kind})",
        "preamble": {shell: _SCRIPTS[shell] + words[shell] for shell in SHELLS},
    }


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for a shell.  Raises ImportError if there is no shtab."""
    import shtab  # noqa: PLC0415

    plain = {"file": shtab.FILE, "directory": shtab.DIRECTORY}
    for each in _parsers(parser):
        for action in each._actions:
            kind = kind_of(each, action)
            if kind is not None:
                action.complete = plain.get(kind) or _complete(kind)  # type: ignore[attr-defined]
    text = str(shtab.complete(parser, shell=shell))
    if shell == "zsh":  # where shtab has only the first of several arguments completed
        text = re.sub(r'^(  ")\(\*\)::?', r"\1*:", text, flags=re.MULTILINE)
    return text


def kind_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """What an argument of a command is completed with: one of KINDS, file, or directory."""
    if action.nargs == argparse.PARSER or not isinstance(action.metavar, str):
        return None
    kind = _KIND_OF.get(action.metavar)
    if parser.prog.startswith("snapfs bitmap ") and kind == "snapshot":
        return "mount" if parser.prog.endswith(" add") else "bitmap"
    return "file" if action.option_strings and action.metavar == "FILE" else kind


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _parsers(each)


def candidates(kind: str, words: Sequence[str], commands: Iterable[str] = ()) -> list[str]:
    """Names of a kind for a line; the first word is what is typed of the name, the others are
    before it.  `commands`: those that there are."""
    typed, *before = words or [""]
    found: list[str] = []
    if kind in ("command", "shell"):
        found = list(SHELLS if kind == "shell" else commands)
    else:
        with suppress(SnapfsError, OSError, LookupError, ValueError):
            found = list(_names(kind, typed, before))
    return [each for each in found if each.startswith(typed) and _HARMLESS.fullmatch(each)]


def _names(kind: str, typed: str, before: Sequence[str]) -> Iterator[str]:
    if kind == "point":
        yield from _points(before)
        return
    mount = None if kind == "mount" else _mount(before)
    if mount is not None:
        with Client(mount) as client:
            client.be_patient(PATIENCE)
            command = "list" if kind == "snapshot" else "bitmap_list"
            for each in client.call(command)[f"{kind}s"]:
                yield each["name"]
        return
    for each in mountinfo.mounts():
        if each.fs_type == FS_TYPE:
            yield each.mountpoint if not typed.startswith(f"{each.mountpoint}/") else ""


def _mount(words: Sequence[str]) -> Mount | None:
    for word in words:
        found = mountinfo.find(word)
        if found is not None and found.fs_type == FS_TYPE:
            return found
    return None


def _points(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if os.path.isfile(os.path.join(word, "snapfs-backup.json")):
            for path in sorted(Path(word).glob("*.qcow2")):
                yield path.name.removesuffix(".qcow2")
