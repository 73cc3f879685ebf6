"""What is measured: each piece of work gives a number, for what is served."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .builds import Failed, run
from .images import MIB
from .serving import Serving

CLUSTER = 1 << 16

# What it gives, or several numbers, each with what is added to the name of the row.
Work = Callable[[Path, Path], float | dict[str, float]]


class Bench(Serving):
    """Work on what is served; higher is better unless the unit is one of time or memory."""

    def _fio(
        self,
        file: Path,
        rw: str,
        block: str,
        depth: int,
        *,
        amount: int = 0,
        size: int | None = None,
        direct: bool = True,
        seconds: float = 2,
        jobs: int = 1,
    ) -> list[object]:
        """A command: so many bytes of requests in [0, size), or for so long if `amount` is 0.

        Each of the `jobs` is a process with so many requests at once.
        """
        engine = "libaio" if direct else "psync"
        size = min(size or self.size, self.size)
        return [
            "fio", "--name=bench", f"--filename={file}", f"--rw={rw}", f"--bs={block}",
            f"--iodepth={depth}", f"--ioengine={engine}", f"--numjobs={jobs}",
            "--group_reporting", f"--direct={int(direct)}", f"--size={size}",
            "--invalidate=0", "--randrepeat=0", "--allow_file_create=0", "--output-format=json",
            *([f"--io_size={amount}"] if amount else [f"--runtime={seconds}", "--time_based"]),
        ]  # fmt: skip

    def _report(self, command: list[object]) -> dict[str, Any]:
        return self._side(run(*command))

    def _side(self, output: str) -> dict[str, Any]:
        job = json.loads(output)["jobs"][0]
        side: dict[str, Any] = job["read"] if job["read"]["iops"] else job["write"]
        return side

    def fio(self, file: Path, rw: str, block: str, depth: int, **how: Any) -> float:
        """Requests per second, as `_fio` has them."""
        return float(self._report(self._fio(file, rw, block, depth, **how))["iops"])

    def active(self, rw: str, block: str, depth: int, **how: Any) -> Work:
        """Requests of one kind to `active`, per second."""
        return lambda active, snapshots: self.fio(active, rw, block, depth, **how)

    def latency(self, percentile: int) -> Work:
        """Of a 4 KiB read, one at a time, in microseconds."""

        def measure(active: Path, snapshots: Path) -> float:
            report = self._report(self._fio(active, "randread", "4k", 1))
            return float(report["clat_ns"]["percentile"][f"{percentile}.000000"]) / 1000

        return measure

    def processor_time(self, rw: str) -> Work:
        """What the daemon spends on a request, in microseconds."""

        def measure(active: Path, snapshots: Path) -> float:
            pid = self.daemon(snapshots)
            before = self._spent(pid)
            report = self._report(self._fio(active, rw, "4k", 16, size=64 * MIB))
            return 1e6 * (self._spent(pid) - before) / float(report["total_ios"])

        return measure

    def _spent(self, pid: int) -> float:
        """Seconds of processor time that a process has used."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cached(self, active: Path, snapshots: Path) -> float:
        """A second pass over what the kernel has in its page cache of the mount."""
        for _ in range(2):
            rate = self.fio(active, "read", "1M", 1, amount=self.size, direct=False)
        return rate

    def small_snapshot_read(self, active: Path, snapshots: Path) -> float:
        return self.fio(snapshots / "s0", "randread", "4k", 16)

    def half_copied_read(self, active: Path, snapshots: Path) -> float:
        self.fio(active, "write", "1M", 1, amount=self.size // 2, size=self.size // 2)
        return self.fio(snapshots / "s0", "read", "1M", 1)

    def beside(self, wanted: str) -> Callable[[Path, Path], float]:
        """Reader of a snapshot and writer of `active` at once; the rate of one of them."""

        def measure(active: Path, snapshots: Path) -> float:
            sides = {
                "reader": self._fio(snapshots / "s0", "read", "1M", 1, seconds=3),
                "writer": self._fio(active, "randwrite", "4k", 16, size=64 * MIB, seconds=3),
            }
            with ThreadPoolExecutor() as pool:
                running = {name: pool.submit(run, *command) for name, command in sides.items()}
            return float(self._side(running[wanted].result())["iops"])

        return measure

    def cold(self, active: Path, snapshots: Path) -> float:
        run("sync")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return self.fio(active, "randread", "4k", 16, amount=32 * MIB)

    def snapshot_read(self, active: Path, snapshots: Path) -> float:
        return self.fio(snapshots / "s0", "read", "1M", 1)

    def first_writes(self, active: Path, snapshots: Path) -> float:
        return self.fio(active, "write", "1M", 1, amount=self.size)

    def small_first_writes(self, active: Path, snapshots: Path) -> float:
        amount = self.size // CLUSTER * 4096
        return self.fio(active, "randwrite", "4k", 16, amount=amount)

    def copies(self, cluster: int) -> Work:
        """Copies per second for 4 KiB writes to clusters in any order, 16 at a time, each once."""
        return lambda active, snapshots: self._copies(active, cluster)

    def _copies(self, active: Path, cluster: int) -> float:
        log = self.directory / "iolog"
        offsets = [where * cluster for where in self._some_clusters(cluster)]
        writes = "".join(f"{active} write {offset} 4096\n" for offset in offsets)
        log.write_text(
            f"fio version 2 iolog\n{active} add\n{active} open\n{writes}{active} close\n"
        )
        command = self._fio(active, "randwrite", "4k", 16, amount=len(offsets) * 4096)
        rate = float(self._report([*command, f"--read_iolog={log}", "--replay_no_stall=1"])["iops"])
        log.unlink()
        return rate

    def _some_clusters(self, cluster: int) -> list[int]:
        """Half of what would be clusters of 64 KiB, in any order."""
        return random.sample(range(self.size // cluster), self.size // CLUSTER // 2)

    def pairs_of_syncs(self, cluster: int, seconds: float) -> Work:
        """A loop of copies with a pair of syncs each, which take so much longer than they do."""
        return lambda image, directory: self._pairs_of_syncs(image, directory, cluster, seconds)

    def _pairs_of_syncs(self, image: Path, directory: Path, cluster: int, longer: float) -> float:
        def sync(fd: int) -> None:
            time.sleep(longer) if longer else None
            os.fdatasync(fd)

        clusters = self._some_clusters(cluster)
        source = os.open(image, os.O_RDONLY)
        temp, done = (
            os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in ("temp", "done")
        )
        os.ftruncate(temp, self.size)
        os.posix_fallocate(done, 0, self.size // cluster)
        os.fsync(done)
        with mmap.mmap(done, self.size // cluster) as bits:
            started = time.perf_counter()
            for where in clusters:
                os.pwrite(temp, os.pread(source, cluster, where * cluster), where * cluster)
                sync(temp)
                bits[where // 8] |= 1 << where % 8
                sync(done)
            seconds = time.perf_counter() - started
        for fd in (source, temp, done):
            os.close(fd)
        for name in ("temp", "done"):
            (directory / name).unlink()
        return len(clusters) / seconds

    def compare(self, active: Path, snapshots: Path) -> float:
        return self._cold_rate("cmp", snapshots / "s0", snapshots / "s1")

    def copy(self, active: Path, snapshots: Path) -> float:
        target = self.directory / "copy"
        try:
            return self._rate(2 << 30, "cp", "--sparse=auto", snapshots / "s0", target)
        finally:
            target.unlink()

    def cold_copy(self, active: Path, snapshots: Path) -> float:
        return self._cold_rate("cp", "--sparse=auto", snapshots / "s0", self.directory / "copy")

    def _cold_rate(self, *command: object) -> float:
        run("sync")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return self._rate(self.size, *command)

    def _rate(self, amount: int, *command: object) -> float:
        started = time.perf_counter()
        run(*command)
        return amount / 1e6 / (time.perf_counter() - started)

    def stall(self, active: Path, snapshots: Path) -> float:
        """The longest a writer waited while a snapshot was made, in ms."""
        spans: list[tuple[float, float]] = []
        ending = threading.Event()

        def write() -> None:
            page = mmap.mmap(-1, 4096)
            page.write(b"x" * 4096)
            fd = os.open(active, os.O_WRONLY | os.O_DIRECT)
            while not ending.is_set():
                offset = random.randrange(1 << 24) << 16
                started = time.perf_counter()
                os.pwrite(fd, page, offset)
                spans.append((started, time.perf_counter()))
            os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        while len(spans) < 100:
            time.sleep(0.01)
        started = time.perf_counter()
        (snapshots / "fifth").touch()
        ended = time.perf_counter()
        ending.set()
        writer.join()
        (snapshots / "fifth").unlink()
        return 1000 * max(b - a for a, b in spans if a < ended and b > started)

    def crowded(self, active: Path, snapshots: Path) -> dict[str, float]:
        """Several numbers at once: to make a thousand snapshots takes longer than all of them."""
        creations = self._creations(snapshots)
        reads = self.small_snapshot_read(active, snapshots)
        small = self.small_first_writes(active, snapshots)
        (snapshots / "again").touch()  # which needs every cluster
        return {
            ": creations": creations,
            ": 4 KiB reads of the oldest": reads,
            ": first writes 4 KiB, depth 16": small,
            ": first writes 1 MiB": self.first_writes(active, snapshots),
        }

    def _creations(self, snapshots: Path) -> float:
        """One after the other, a second."""
        started = time.perf_counter()
        for number in range(10):
            (snapshots / f"more{number}").touch()
        return 10 / (time.perf_counter() - started)

    def increment(self, active: Path, snapshots: Path) -> float:
        """The time of an incremental backup of 1 % of the data, in per cent of the full's."""
        where, mountpoint = self.directory / "backup", snapshots.parent
        run(self.build.snapfs, "backup", "--init", where)
        full = self._seconds(self.build.snapfs, "backup", mountpoint, where)
        data = [at for at in range(0, 16 << 30, CLUSTER) if at % (4 * MIB) < 2 * MIB]
        spans = []
        for _ in range(5):
            with open(active, "r+b", buffering=0) as file:
                for offset in random.sample(data, len(data) // 100):
                    os.pwrite(file.fileno(), os.urandom(CLUSTER), offset)
            spans.append(self._seconds(self.build.snapfs, "backup", mountpoint, where))
        shutil.rmtree(where)
        print(f"    full {full:.2f} s, increments", *(f"{span:.2f}" for span in spans), flush=True)
        return 100 * statistics.median(spans) / full

    def restore(self, active: Path, snapshots: Path) -> float:
        """The speed of restoring four points, in per cent of that of qemu-img convert."""
        where, mountpoint = self.directory / "backup", snapshots.parent
        run(self.build.snapfs, "backup", "--init", where)
        data = range(0, active.stat().st_size // CLUSTER * CLUSTER, CLUSTER)
        for _ in range(4):
            run(self.build.snapfs, "backup", mountpoint, where)
            with open(active, "r+b", buffering=0) as file:
                for offset in random.sample(data, len(data) // 20):
                    os.pwrite(file.fileno(), os.urandom(CLUSTER), offset)
        newest = max(where.glob("*.qcow2"))
        dest = self.directory / "restored"
        ratios = []
        for _ in range(5):
            theirs = self._seconds("qemu-img", "convert", "-O", "raw", newest, dest)
            dest.unlink()
            ours = self._seconds(self.build.snapfs, "restore", where, dest)
            dest.unlink()
            ratios.append(theirs / ours)
        shutil.rmtree(where)
        print("    restores", *(f"{ratio:.2f}" for ratio in ratios), flush=True)
        return 100 * statistics.median(ratios)

    def _seconds(self, *command: object) -> float:
        run("sync")
        started = time.perf_counter()
        run(*command)
        return time.perf_counter() - started

    def map_seconds(self, active: Path, snapshots: Path) -> float:
        return self._seconds(self.build.snapfs, "map", "--json", active)

    def map_memory(self, active: Path, snapshots: Path) -> float:
        """Most memory of the command, or of the daemon after it, in MiB."""
        with subprocess.Popen(
            [self.build.snapfs, "map", "--json", active], stdout=subprocess.DEVNULL
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise Failed("snapfs map failed")
        client = usage.ru_maxrss / 1024
        return max(client, self.resident(active, snapshots))

    def resident(self, active: Path, snapshots: Path) -> float:
        """Resident memory of the daemon in MiB."""
        for line in Path(f"/proc/{self.daemon(snapshots)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")
