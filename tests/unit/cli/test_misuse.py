"""What is said of words and options that there are not, and that help is at hand."""

from __future__ import annotations

import json

import pytest

from snapfs.cli import main
from snapfs.cli.parser import build_parser


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sattus", "/mnt/d"], "there is no command 'sattus'; did you mean status?"),
        (["sattus"], "there is no command 'sattus'; did you mean status?"),
        (["xyzzy", "/mnt/d"], "there is no command 'xyzzy'; see snapfs --help"),
        (["bitmap", "lst", "/mnt/d"], "no action of bitmap 'lst'; did you mean list?"),
        (["help", "delte"], "there is no command 'delte'; did you mean delete?"),
        ([], "say what to do; see snapfs --help"),
    ],
)
def test_a_word_that_is_no_command_names_the_nearest(arguments, said, capsys):
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert "" == out
    assert said in err
    assert err.splitlines()[0].startswith("usage: snapfs ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "/mnt/d", "--jsn"], "there is no option --jsn; did you mean --json?"),
        (["list", "/mnt/d", "more"], "what is 'more' for? that is one argument too many"),
        (["limit"], "the following arguments are required: MOUNTPOINT, SIZE"),
        (["copy", "/mnt/d/snapshots/s"], "it takes a snapshot and where it is to go"),
        (["copy", "a", "b", "--format", "vmdk"], "'vmdk' is none of raw, qcow2"),
        (["delete"], "required: MOUNTPOINT NAME..."),
        (["backup", "--init", "a", "b"], "--init takes one argument"),
        (["completion", "tcsh"], "say for which shell: one of bash, zsh, fish"),
    ],
)
def test_a_usage_error_shows_the_usage_of_that_command(arguments, said, capsys):
    assert 2 == main(arguments)
    usage, *_, message = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: snapfs {arguments[0]} ")
    assert said in message
    assert message.startswith("snapfs: ")


def test_wrong_arguments_are_json_too(capsys):
    assert 2 == main(["show", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {"command": "show", "vers_major": 1, "vers_minor": 0} == document["output_version"]
    assert {"code", "message", "exit_code"} == set(document["error"])
    assert ("misused", 2) == (document["error"]["code"], document["error"]["exit_code"])


def test_help_of_a_command_is_what_its_option_prints(capsys):
    for words in (["list"], ["bitmap", "add"], []):
        printed = []
        for arguments in (["help", *words], [*words, "--help"]):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert not ended.value.code
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        assert printed[0].startswith(f"usage: {' '.join(['snapfs', *words])} ")


def test_options_may_come_between_the_arguments():
    parser, _ = build_parser()
    parsed = parser.parse_args(["copy", "/mnt/d", "--format", "qcow2", "s", "--force", "dest"])
    assert (["/mnt/d", "s", "dest"], "qcow2", True) == (parsed.words, parsed.format, parsed.force)
    assert ["-odd", "s"] == parser.parse_args(["show", "--", "-odd", "s"]).words
