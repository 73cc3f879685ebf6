"""What daemons of earlier versions do not say: a mount may live longer than the program.

Each function adds to an answer what it lacks, as far as that follows from the rest.
"""

from __future__ import annotations

from typing import Any

Answer = dict[str, Any]


def complete_status(answer: Answer) -> Answer:
    """The answer to status."""
    mount = answer["mount"]
    if "problems" not in answer:
        found = []
        if not mount["healthy"]:
            found.append(_problem("internal", mount.get("reason") or "it is not healthy"))
        for state in ("lost", "incomplete"):
            names = [each["name"] for each in answer["snapshots"] if each["state"] == state]
            if names:
                found.append(_problem(state, f"snapshots are {state}: {', '.join(names[:3])}"))
        if any(each["inconsistent"] for each in answer["bitmaps"]):
            found.append(_problem("bitmaps", "bitmaps are inconsistent"))
        answer["problems"] = found
        mount["healthy"] = not found
    mount.setdefault("since", None)
    answer["temp"].setdefault("bytes_per_second", 0)
    answer.setdefault("copies", {"count": 0, "seconds": 0.0, "buckets": [[None, 0]]})
    answer.setdefault("open", {"readers": 0, "writers": 0})
    answer["counters"].setdefault("write_errors", 0)
    complete_list(answer)
    return answer


def _problem(kind: str, message: str) -> Answer:
    remedy = "unmount and mount it again with this version, which says more"
    return {"severity": "error", "kind": kind, "message": message, "remedy": remedy}


def complete_list(answer: Answer) -> Answer:
    """The answer to list."""
    for each in answer["snapshots"]:
        for key, value in (("open", 0), ("note", None), ("pinned", False)):
            each.setdefault(key, value)
    return answer
