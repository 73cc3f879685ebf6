"""Checking: the state directory looked over, without a daemon."""

from __future__ import annotations

import argparse

from attrs import asdict

from ..errors import ExitCode
from .arguments import Verbs, add_json
from .output import dump


def add_to(verbs: Verbs) -> None:
    """Add our command."""
    verb = verbs.add_parser("check", help="look a state directory over, not mounted")
    verb.add_argument("state", metavar="STATE", help="the state directory, or its image")
    verb.add_argument("--repair", action="store_true", help="put right what needs no guess")
    add_json(verb)
    verb.set_defaults(run=check)


def check(arguments: argparse.Namespace) -> int:
    """snapfs check STATE: 3 if a repair is all it takes, or took, 4 if something is lost."""
    from ..state.check import check as look_over  # noqa: PLC0415 - trio, which the others do not need

    report = look_over(arguments.state, repair=arguments.repair)
    sound = report.exit_code == ExitCode.OK
    if arguments.json:
        findings = [asdict(finding) for finding in report.findings]
        dump("check", {**asdict(report), "findings": findings, "sound": sound})
    else:
        for finding in report.findings:
            remedy = " (--repair puts it right)" if finding.grade == "repairable" else ""
            outcome = " (repaired)" if finding.repaired else remedy
            print(f"{finding.grade}: {finding.where} {finding.text}{outcome}")
        if sound:
            print(f"sound: {report.snapshots} snapshots, {report.bitmaps} bitmaps")
    return report.exit_code
