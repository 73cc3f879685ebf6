"""snapfs check: the state directory looked over, without a daemon."""

from __future__ import annotations

import argparse

from attrs import asdict

from ..check import check as look_over
from ..errors import ExitCode
from ..findings import Finding, Grade, Report
from .output import dump


def check(arguments: argparse.Namespace) -> int:
    """snapfs check STATE: 3 if a repair is all it takes, or took, 4 if something is lost."""
    report = look_over(arguments.state, repair=arguments.repair)
    if arguments.json:
        findings = [asdict(finding) for finding in report.findings]
        dump("check", {**asdict(report), "findings": findings, "sound": _sound(report)})
    else:
        for finding in report.findings:
            print(f"{finding.grade}: {finding.where} {finding.text}{_outcome(finding)}")
        if _sound(report):
            print(f"sound: {report.snapshots} snapshots, {report.bitmaps} bitmaps")
    return report.exit_code


def _sound(report: Report) -> bool:
    return report.exit_code == ExitCode.OK


def _outcome(finding: Finding) -> str:
    if finding.repaired:
        return " (repaired)"
    return " (--repair puts it right)" if finding.grade == Grade.REPAIRABLE else ""
