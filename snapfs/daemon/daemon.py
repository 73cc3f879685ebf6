"""The daemon of one mount: puts the parts together, and takes them apart in order.

One nursery holds everything that runs.  Order of the start: lock and recover
the state, mount, serve, listen; then the mount answers and the caller is told.
Order of the end: no more requests, copies finished, everything durable and
marked clean, and only then the process is gone, which is what umount waits
for.  The daemon unmounts in order or not at all: an empty directory where a
backup's source was could make rsync delete the backup.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from .. import errors
from ..client import holders
from ..client.mountinfo import Mount
from ..client.reasons import why
from ..client.unmounting import unmount
from ..client.wire import free_addresses
from ..engine.copier import Settings
from ..engine.engine import Engine
from ..fuse import requestfilter
from ..fuse.outsider import Outsider
from ..state.activity import SYNC_SECONDS, WATCH_SECONDS
from ..state.store import CONTROL_SOCKET, Store
from ..storage.offload import in_thread, keep_thread
from . import signals
from .commands import Commands
from .control import ControlServer, failure
from .farewell import Farewell
from .preflight import Config, check, check_temp_dir
from .process import raise_limits, set_io_flusher, spare_from_oom
from .sdnotify import notify, tell_ready, tell_status

log = logging.getLogger(__name__)

IO_THREADS = 16  # blocking calls on image and temp images at once
BARRIER_SECONDS = 5  # for the kernel to write back what a busy mount has in mappings
ASK_SECONDS = 0.5  # between two questions to the files whether they could be written back
LAST_SECONDS = 60  # for the end of everything; then the process gives up


class Daemon:
    """One mount, from `run` to its end."""

    def __init__(self, config: Config, outsider: Outsider, ready: Callable[[], None]) -> None:
        self._config = config
        self._outsider = outsider
        self._ready = ready
        self._stopping = False
        self._served = False
        self._farewell = Farewell()

    async def run(self) -> None:
        """Serve until unmounted or told to stop; who waits for the end is told how it was.

        Raises SnapfsError or OSError if it could not be mounted, or if something
        could not be made durable: at the end, or before and nobody has removed it since.
        """
        try:
            await self._run()
        except BaseException as error:
            first = _first(error) if isinstance(error, BaseExceptionGroup) else error
            self._farewell.tell(failure(first))
            raise
        self._farewell.tell({"ok": True, "result": {}})

    async def _run(self) -> None:
        options = self._config.options
        await in_thread(check, self._config)
        try:
            store = await Store.open(
                self._config.image,
                state_dir=options.state,
                cluster_size=options.cluster_size,
                read_only=options.read_only,
                durability=options.durability,  # type: ignore[arg-type]
                temp_dir=options.temp_dir,
                any_fs=options.any_fs,
                limiter=trio.CapacityLimiter(IO_THREADS),
            )
        except errors.StateError as error:
            place = options.state or self._config.image
            raise errors.StateError(f"{error}; to look it over: snapfs check {place}") from error
        for notice in store.notices:
            log.warning("%s", notice)
        engine: Engine | None = None
        in_order = False
        try:
            for path in store.temp_directories:  # an earlier mount may have chosen them
                await in_thread(check_temp_dir, path, self._config.where.path)
            settings = await in_thread(self._settings, store)
            async with trio.open_nursery() as nursery:
                engine = Engine(
                    store.image,
                    store.geometry,
                    store,
                    nursery,
                    layers=store.layers,
                    bitmaps=store.dirty,
                    next_id=store.next_id,
                    settings=settings,
                    read_only=options.read_only,
                )
                await engine.space.refresh()
                engine.check_storage()  # what the page cache lost since an earlier mount
                await self._serve(engine, store, nursery)
                nursery.cancel_scope.cancel()
            in_order = True
        finally:
            layers = store.layers if engine is None else engine.layers
            bitmaps = store.dirty if engine is None else list(engine.tracker.bitmaps)
            with trio.CancelScope(shield=True):
                untouched = not self._served and (engine is None or not engine.counters.writes)
                clean = in_order or untouched
                complaints: list[str] = []
                try:
                    if engine is not None:
                        complaints += await engine.finish()
                        clean = clean and engine.writeback.image_error is None
                except OSError as error:
                    complaints.append(f"what was lost could not be recorded: {why(error)}")
                    clean = False
                try:
                    await store.close(
                        layers,
                        bitmaps,
                        clean=clean,
                        unused=not self._served,
                        synced=engine is not None,
                    )
                except OSError as error:
                    complaints.append(f"the state could not be made durable: {why(error)}")
                if complaints:
                    raise errors.NotStored("; ".join(complaints))

    def _settings(self, store: Store) -> Settings:
        """The engine's settings.  Blocks."""
        options = self._config.options
        reserve = options.temp_reserve
        if reserve is None:
            reserve = store.default_reserve()
        if store.free_bytes() <= reserve and not options.read_only:
            log.warning(
                "only %d bytes are free for temp images, and temp-reserve=%d keeps all of them: "
                "copies will fail",
                store.free_bytes(), reserve,
            )  # fmt: skip
        return Settings(
            options.on_cbw_error,  # type: ignore[arg-type]
            _bounded_timeout(options.cbw_timeout),
            options.temp_limit,
            reserve,
            options.max_size,
        )

    async def _serve(self, engine: Engine, store: Store, nursery: trio.Nursery) -> None:
        # Here, since they import pyfuse3, which must find the filter loaded.
        from ..fuse.fastpath import FastPath  # noqa: PLC0415
        from ..fuse.fusefs import SnapshotFS  # noqa: PLC0415
        from ..fuse.pagecache import PageCache  # noqa: PLC0415
        from ..fuse.session import Session  # noqa: PLC0415
        from ..fuse.tree import Ownership, Tree  # noqa: PLC0415

        options = self._config.options
        where = self._config.where
        cache = PageCache(self._outsider)
        fast_path = FastPath(engine, cache, store.activity_page, nursery)
        ownership = Ownership(options.uid, options.gid, options.umask)
        tree = Tree(engine, store.image.fd, str(store.directory), ownership)
        fs = SnapshotFS(
            engine,
            tree,
            store.image.fd,
            cache,
            fast_path,
            nursery,
            writeback_cache=options.writeback_cache,
        )
        source = self._config.image if options.fsname is None else options.fsname
        session = Session(fs, where, source, ["default_permissions", *options.fuse])
        clean = False
        try:
            commands = Commands(
                engine,
                self._config.image,
                where.path,
                options.durability,
                fast_path.collect,
                store.temp_directory,
                lambda: fs.errnos.unhealthy,
                lambda: fs.open_files,
                fast_path.region_reads,
            )
            if not options.no_fastpath and not fast_path.start():
                log.warning("the fast path is off: this machine's byte order is not served")
            uids = frozenset({os.geteuid(), tree.owner()})
            server = ControlServer(
                str(store.directory / CONTROL_SOCKET),
                commands.table(),
                uids,
                self._farewell,
                also=free_addresses(session.mount),
                group=options.control_group,
                visible=commands.visible(),
            )
            async with trio.open_nursery() as serving:
                await serving.start(keep_thread)
                await serving.start(_watch_witness, store)
                serving.start_soon(_watch_storage, engine)
                serving.start_soon(_beat_durably, store)
                await serving.start(self._outsider.run)
                await serving.start(server.serve)
                await serving.start(self._watch_signals, engine, session)
                serving.start_soon(self._announce, cache, engine, session.mount)
                await session.run()
                serving.cancel_scope.cancel()
            clean = not self._stopping
        finally:
            _end_soon(self._farewell)
            fast_path.stop()
            if not self._served:
                try:
                    unmount(session.mount, lazy=True)  # nobody has been told that it is there
                except OSError as error:
                    log.info("cannot unmount %s: %s", where.path, error.strerror)
            if not clean:
                session.connection.abort()
            session.close()

    async def _announce(self, cache: Any, engine: Engine, mount: Mount) -> None:
        await cache.begin(mount)
        self._served = True
        log.info("%s is mounted on %s", self._config.image, mount.mountpoint)
        self._ready()
        await tell_ready()
        await tell_status(self._config.image, engine)

    async def _watch_signals(
        self,
        engine: Engine,
        session: Any,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """On a signal to end unmount; if the mount is in use, end it in order all the same."""
        mount = session.mount
        with trio.open_signal_receiver(*signals.ending()) as received:
            task_status.started()
            async for number_ in received:
                log.info("%s: unmounting %s", signal.Signals(number_).name, mount.mountpoint)
                _end_soon(self._farewell)
                others = await in_thread(_named, holders.others, mount)
                try:
                    await self._outsider.call("unmount")
                    if not others:
                        return  # the session ends by itself
                except OSError as error:
                    log.warning("cannot unmount %s: %s", mount.mountpoint, error.strerror)
                    others = await in_thread(_named, holders.users, mount) + others
                names = ", ".join(others) or "an unknown process"
                log.warning("%s is in use by %s", mount.mountpoint, names)
                if engine.barrier is not None and not engine.read_only:
                    with trio.move_on_after(BARRIER_SECONDS):
                        await engine.barrier()
                self._stopping = True
                session.terminate()
                return


def _bounded_timeout(timeout: float) -> float:
    """cbw-timeout, lowered if the kernel gives up on a request, and on the mount, sooner."""
    limits = []
    for name in ("default_request_timeout", "max_request_timeout"):
        try:
            limits.append(int(Path("/proc/sys/fs/fuse", name).read_text()))
        except (OSError, ValueError):
            pass  # a kernel without them
    shortest = min((limit for limit in limits if limit > 0), default=0)
    if not shortest or 0 < timeout <= shortest / 2:
        return timeout
    log.warning(
        "fs.fuse.*_request_timeout ends the mount after %d s without an answer: "
        "cbw-timeout is %g s instead of %g s",
        shortest, shortest / 2, timeout,
    )  # fmt: skip
    return shortest / 2


def _named(who: Callable[[Mount], list[str]], mount: Mount) -> list[str]:
    """What a function of `holders` says, where it does not matter much."""
    try:
        return who(mount)
    except OSError:  # no descriptor left, for one
        return []


async def _watch_witness(
    store: Store, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await store.keep_witness()
    task_status.started()
    while True:
        await trio.sleep(WATCH_SECONDS)
        await store.keep_witness()


async def _watch_storage(engine: Engine) -> None:
    while True:
        await trio.sleep(ASK_SECONDS)
        engine.check_storage()


async def _beat_durably(store: Store) -> None:
    while True:
        await trio.sleep(SYNC_SECONDS)
        await store.beat_durably()


def _end_soon(farewell: Farewell) -> None:
    """From now on storage that does not answer does not keep the process alive."""
    notify("STOPPING=1")
    signal.signal(signal.SIGALRM, lambda *_signal: _give_up(farewell))
    signal.alarm(LAST_SECONDS)


def _give_up(farewell: Farewell) -> None:
    text = "gave up waiting for the storage; the mount is not marked clean"
    farewell.tell(failure(errors.NotStored(text)))
    log.critical("%s", text)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(errors.ExitCode.NOT_STORED)


def serve(config: Config, ready: Callable[[], None], outsider: Outsider | None = None) -> None:
    """Run a daemon in this process until its end; raises as `Daemon.run`.

    `outsider`: of the process group of whoever mounts, if we have left that.
    """
    requestfilter.load()
    os.umask(0o077)
    raise_limits()
    set_io_flusher()
    spare_from_oom()
    sys.setswitchinterval(0.0005)  # an I/O thread must not wait 5 ms for the GIL
    if outsider is None:
        outsider = Outsider.start(config.where)
    try:
        trio.run(Daemon(config, outsider, ready).run)
    except BaseExceptionGroup as group:
        expected, unexpected = group.split((errors.SnapfsError, OSError))
        if expected is None or unexpected is not None:
            raise
        raise _first(expected) from group
    finally:
        outsider.close()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
