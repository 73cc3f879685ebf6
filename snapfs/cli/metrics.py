"""`snapfs metrics`: what Prometheus may know of mounts and backups."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..client.documents import error_values
from ..errors import ExitCode, SnapfsError, code_of
from .arguments import Verbs
from .output import complain

if TYPE_CHECKING:
    from prometheus_client.core import Metric

STATES = ("ok", "incomplete", "lost")


def add_to(verbs: Verbs) -> None:
    """Add our command."""
    verb = verbs.add_parser("metrics", help="print metrics for Prometheus")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="default: all")
    verb.add_argument(
        "--backup", action="append", default=[], metavar="DIR", help="a backup directory, too"
    )
    verb.add_argument(
        "--textfile", metavar="FILE", help="replace FILE, for node_exporter; its name ends in .prom"
    )
    verb.set_defaults(run=metrics)


def metrics(arguments: argparse.Namespace) -> int:
    """snapfs metrics [MOUNTPOINT]: 3 if not all that was asked for could be told."""
    library()
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415

    from ..client.newfiles import replace  # noqa: PLC0415

    found = _Found()
    found.ask(arguments.mountpoint, arguments.backup)

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return families(found.mounts, found.backups)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    text = generate_latest(registry)
    if arguments.textfile is None:
        sys.stdout.write(text.decode())
    else:
        replace(arguments.textfile, text)
    return found.status


def library() -> None:
    """Raise SnapfsError that names the remedy if prometheus-client is not there."""
    try:
        import prometheus_client  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise SnapfsError(
            "metrics need the library prometheus-client: "
            f"{sys.executable} -m pip install prometheus-client"
        ) from None


class _Found:
    """What mounts and backup directories say; the others are complained about.

    `mounts`: by mountpoint the answer to status, None if there is none.  `backups`: by directory
    the points, the oldest first, None if they cannot be read.
    """

    def __init__(self) -> None:
        self.status = int(ExitCode.OK)
        self.mounts: dict[str, Mapping[str, Any] | None] = {}
        self.backups: dict[str, Sequence[Mapping[str, Any]] | None] = {}

    def ask(self, mountpoint: str | None, directories: Sequence[str]) -> None:
        from ..client import everywhere, older, wire  # noqa: PLC0415

        if mountpoint is not None:
            with wire.Client(mountpoint) as client:
                self.mounts[client.mount.mountpoint] = older.complete_status(client.call("status"))
        else:
            for mount, answer in everywhere.ask("status"):
                if isinstance(answer, SnapfsError):
                    if error_values(answer)["code"] == code_of("NotPermitted"):
                        continue  # it is somebody else's, and not for us to watch
                    self._missing(mount.mountpoint, answer)
                    self.mounts[mount.mountpoint] = None
                else:
                    self.mounts[mount.mountpoint] = answer
        for directory in directories:
            try:
                self.backups[directory] = self._points(directory)
            except (SnapfsError, OSError) as error:
                self._missing(directory, error)
                self.backups[directory] = None

    def _points(self, directory: str) -> Sequence[Mapping[str, Any]]:
        from ..backup import listing  # noqa: PLC0415 - it takes a while to import

        return listing.points(directory)

    def _missing(self, what: str, error: Exception) -> None:
        text = str(error)
        complain(text if what in text else f"{what}: {text}", ExitCode.PARTIAL)
        self.status = ExitCode.PARTIAL


def families(
    mounts: Mapping[str, Mapping[str, Any] | None],
    backups: Mapping[str, Sequence[Mapping[str, Any]] | None],
) -> Iterator[Metric]:
    """All metrics of the answers to status by mountpoint, and of backups' points by directory."""
    yield _each("snapfs_up", "Whether the daemon of a mount answers.", {
        where: float(status is not None) for where, status in mounts.items()
    })  # fmt: skip
    answers = {where: status for where, status in mounts.items() if status is not None}
    yield from _mounts(answers)
    yield from _snapshots(answers)
    yield from _copies(answers)
    yield from _requests(answers)
    yield from _backups(backups)


Answers = Mapping[str, Mapping[str, Any]]


def _each(name: str, text: str, values: Mapping[str, float | None]) -> Metric:
    """A gauge of each mount; None: there is none."""
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    family = GaugeMetricFamily(name, text, labels=["mountpoint"])
    for where, value in values.items():
        if value is not None:
            family.add_metric([_label(where)], value)
    return family


def _label(text: str) -> str:
    """A path in UTF-8, as Prometheus wants it."""
    return text.encode(errors="replace").decode()


def _mounts(answers: Answers) -> Iterator[Metric]:
    for name, text, part, key in (
        ("snapfs_healthy", "Whether nothing is wrong with a mount.", "mount", "healthy"),
        ("snapfs_image_bytes", "Size of the image.", "image", "size"),
        ("snapfs_temp_bytes", "Space that temp images take.", "temp", "used_bytes"),
        ("snapfs_temp_limit_bytes", "Space that they may take, if limited.", "temp", "limit_bytes"),
        ("snapfs_temp_room_bytes", "Space that is left for them.", "temp", "room_bytes"),
        ("snapfs_temp_full_seconds", "When it is gone at the present rate, if there is one.",
         "temp", "seconds_left"),
        ("snapfs_temp_age_seconds", "Age of these numbers.", "temp", "age_seconds"),
        ("snapfs_fastpath_on", "Whether native code answers requests.", "mount", "fastpath"),
        ("snapfs_open_writers", "Open files of active, for writing.", "open", "writers"),
        ("snapfs_open_readers", "Open files of active and snapshots, for reading.",
         "open", "readers"),
    ):  # fmt: skip
        yield _each(name, text, {where: answer[part][key] for where, answer in answers.items()})
    yield _each("snapfs_start_time_seconds", "When it was mounted, since 1970.", {
        where: _seconds(since) if (since := answer["mount"]["since"]) else None
        for where, answer in answers.items()
    })  # fmt: skip
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    family = GaugeMetricFamily(
        "snapfs_problem", "What is wrong, by kind and severity.",
        labels=["mountpoint", "kind", "severity"],
    )  # fmt: skip
    for where, answer in answers.items():
        for kind, severity in sorted({(p["kind"], p["severity"]) for p in answer["problems"]}):
            family.add_metric([_label(where), _label(kind), _label(severity)], 1)
    yield family


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _snapshots(answers: Answers) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    states = GaugeMetricFamily(
        "snapfs_snapshots", "Snapshots, by state.", labels=["mountpoint", "state"]
    )
    one = GaugeMetricFamily(
        "snapfs_snapshot_state", "1 for the state that a snapshot is in.",
        labels=["mountpoint", "snapshot", "state"],
    )  # fmt: skip
    created = GaugeMetricFamily(
        "snapfs_snapshot_created_seconds", "When a snapshot was taken, since 1970.",
        labels=["mountpoint", "snapshot"],
    )  # fmt: skip
    lost = GaugeMetricFamily(
        "snapfs_lost_clusters", "Clusters that could not be kept.",
        labels=["mountpoint", "snapshot"],
    )  # fmt: skip
    for where, answer in answers.items():
        mount, found = _label(where), answer["snapshots"]
        for state in STATES:
            states.add_metric([mount, state], sum(each["state"] == state for each in found))
        for each in found:
            name = _label(each["name"])
            for state in STATES:
                one.add_metric([mount, name, state], float(each["state"] == state))
            created.add_metric([mount, name], _seconds(each["created"]))
            lost.add_metric([mount, name], each["clusters"]["lost"])
    yield from (states, one, created, lost)
    bitmaps = GaugeMetricFamily(
        "snapfs_bitmap_dirty_bytes", "What a dirty bitmap has; not of an inconsistent one.",
        labels=["mountpoint", "bitmap"],
    )  # fmt: skip
    broken = GaugeMetricFamily(
        "snapfs_bitmap_inconsistent", "Whether a full copy is needed.",
        labels=["mountpoint", "bitmap"],
    )  # fmt: skip
    for where, answer in answers.items():
        for each in answer["bitmaps"]:
            labels = [_label(where), _label(each["name"])]
            broken.add_metric(labels, float(each["inconsistent"]))
            if not each["inconsistent"]:
                bitmaps.add_metric(labels, each["count"])
    yield from (bitmaps, broken)


def _copies(answers: Answers) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415

    family = HistogramMetricFamily(
        "snapfs_cbw_seconds",
        "How long copies before a write took, native ones included, each of a run of clusters.",
        labels=["mountpoint"],
    )
    for where, answer in answers.items():
        times = answer["copies"]
        buckets = [
            ("+Inf" if bound is None else str(bound), count) for bound, count in times["buckets"]
        ]
        family.add_metric([_label(where)], buckets, times["seconds"])
    yield family


def _requests(answers: Answers) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415

    for key, name, text in (
        ("cbw_copies", "snapfs_cbw_copies", "Clusters that were copied before a write."),
        ("cbw_bytes", "snapfs_cbw_bytes", "Bytes that were, without zeros."),
        ("cbw_errors", "snapfs_cbw_errors", "Clusters whose copy failed."),
        ("write_errors", "snapfs_write_errors", "Writes to active that failed."),
        ("reads", "snapfs_reads", "Reads of active."),
        ("writes", "snapfs_writes", "Writes to active."),
        ("snapshot_reads", "snapfs_snapshot_reads", "Reads of snapshots."),
        ("discarded_bytes", "snapfs_discarded_bytes", "Bytes of snapshots that were given up."),
        ("fastpath_requests", "snapfs_fastpath_requests", "Requests that native code answered."),
    ):
        family = CounterMetricFamily(name, text, labels=["mountpoint"])
        for where, answer in answers.items():
            family.add_metric([_label(where)], answer["counters"][key])
        yield family
    yield _each("snapfs_fastpath_share", "Of reads and writes, native code's share, 0 to 1.", {
        where: _share(answer["counters"]) for where, answer in answers.items()
    })  # fmt: skip


def _share(counters: Mapping[str, Any]) -> float | None:
    total = counters["reads"] + counters["writes"] + counters["snapshot_reads"]
    return counters["fastpath_requests"] / total if total else None


def _backups(backups: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    up = GaugeMetricFamily(
        "snapfs_backup_up", "Whether a backup directory can be read.", labels=["directory"]
    )
    count = GaugeMetricFamily("snapfs_backup_points", "Points of a backup.", labels=["directory"])
    newest = GaugeMetricFamily(
        "snapfs_backup_newest_seconds", "When the newest point was taken, since 1970.",
        labels=["directory"],
    )  # fmt: skip
    damaged = GaugeMetricFamily(
        "snapfs_backup_damaged_points", "Points that verify found to be damaged.",
        labels=["directory"],
    )  # fmt: skip
    for directory, points in backups.items():
        labels = [_label(directory)]
        up.add_metric(labels, float(points is not None))
        if points is None:
            continue
        count.add_metric(labels, len(points))
        bad = [each for each in points if each["verified"] and not each["verified"]["good"]]
        damaged.add_metric(labels, len(bad))
        if points:
            newest.add_metric(labels, max(_seconds(each["time"]) for each in points))
    yield from (up, count, newest, damaged)
