"""The process: builds the parts in order, fires the triggers, hears signals, talks to systemd, drains.

Four threads of its own: one worker folds, one tells targets, one executes people's commands, one serves HTTP;
apscheduler only decides when a source is looked at. Signal handlers only set flags. Knows nothing of folding.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from apscheduler.schedulers.background import BackgroundScheduler

from streammerge import config as configuration
from streammerge import files, operations, pipeline, promote, reconcile, recovery, reports, screen, snapshots
from streammerge.engine import Engine
from streammerge.errors import ConfigError, NoSpace, Stopped, StreammergeError, TryAgain
from streammerge.ledger import now
from streammerge.metrics import Metrics
from streammerge.server import Server, Views, make_app
from streammerge.sources import open_source
from streammerge.targets import open_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.sources import Source

TICK_SECONDS = 0.2
IDLE_SECONDS = 1.0
DEBOUNCE_SECONDS = 0.25
HEARTBEAT_SECONDS = 120.0  # without WATCHDOG_USEC: after this a silent worker counts as stuck
DRAIN_SECONDS = 300.0

log = structlog.get_logger()


def notify(message: str) -> None:
    """Tell systemd, if it listens (sd_notify(3)): one datagram to $NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        try:
            out.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as exc:
            log.warning("systemd.unreachable", error=str(exc))


class Daemon:
    """One running daemon; `run` returns when it was told to stop."""

    def __init__(self, config_path: Path, config: Config) -> None:
        """Nothing is opened yet."""
        self.config_path = config_path
        self.config = config
        self.metrics = Metrics(screen.REASONS)
        self.stopping = threading.Event()
        self.work_there = threading.Event()
        self.news_there = threading.Event()
        self.fatal: StreammergeError | None = None
        self.merge: Merge | None = None
        self.sources: dict[str, Source] = {}
        self.scheduler = BackgroundScheduler(
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}, timezone="UTC"
        )
        self._asked_to_stop = self._asked_to_reload = False
        self._heartbeat = time.monotonic()
        self._looking = {part.name: threading.Lock() for part in config.sources}
        self._look_again: set[str] = set()
        self._watchers: dict[str, Callable[[], None]] = {}
        self._fold_bytes = 0
        self._last_extension = 0.0

    # Life

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises what forbids to go on: ConfigError, Locked, Damaged."""
        store = recovery.prepare_folder(self.config)
        with files.locked(store.lock):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_stop)
            signal.signal(signal.SIGHUP, self._on_reload)
            server = Server(make_app(self._views()), self.config.http.address)
            try:
                self._serve(server)
            finally:
                server.stop()
        if self.fatal:
            raise self.fatal

    def _serve(self, server: Server) -> None:
        del server  # it answers, not ready, while the store is opened
        try:
            self.merge = recovery.open_merge(self.config, self._engine(), self.metrics)
        except Stopped:
            return
        threads = []
        try:
            operations.work_off(self.merge)
            self._take(self.config)
            threads = [
                self._thread("worker", self._work),
                self._thread("targets", self._tell),
                self._thread("commands", self._obey),
            ]
            self.scheduler.start()
            notify("READY=1")
            log.info(
                "daemon.ready",
                store=str(self.config.store),
                http=self.config.http.listen,
                head=self.merge.head.version,
            )
            self._supervise()
        finally:
            self._drain(threads)
            self.merge.ledger.close()

    def _engine(self) -> Engine:
        return Engine(
            device=self.config.device,
            threads=self.config.threads,
            residency=self.config.residency,
            beat=self._beat,
            progress=self._progress,
        )

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(name, target), name=name, daemon=True)
        thread.start()
        return thread

    def _guarded(self, name: str, target: Callable[[], None]) -> None:
        """Run a thread's loop; what it cannot handle stops the process in order, never silently."""
        try:
            target()
        except Stopped:
            pass
        except StreammergeError as exc:
            self.fatal = exc
            log.critical("daemon.cannot_go_on", thread=name, error=exc.message, hint=exc.hint)
        except Exception as exc:
            log.exception("daemon.bug", thread=name)
            self.fatal = StreammergeError(
                f"{name} stopped: {exc!r}", hint="this is a bug; please report the log lines above"
            )
        finally:
            self.stopping.set()

    def _supervise(self) -> None:
        """Wait for signals; pet the watchdog only while the worker shows signs of life."""
        period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        next_ping = 0.0
        while not self.stopping.wait(TICK_SECONDS):
            if self._asked_to_stop:
                log.info("daemon.stopping")
                return
            if self._asked_to_reload:
                self._asked_to_reload = False
                self._reload()
            self.metrics.ready.set(not self._problems())
            if time.monotonic() >= next_ping and self._is_alive():
                notify(f"WATCHDOG=1\nSTATUS={self._status_line()}")
                next_ping = time.monotonic() + (period / 3 if period else 10.0)

    def _drain(self, threads: list[threading.Thread]) -> None:
        """Stop at the next weight boundary; what was half done leaves no trace."""
        notify("STOPPING=1")
        self.stopping.set()
        self.work_there.set()
        self.news_there.set()
        for stop in self._watchers.values():
            stop()
        if self.scheduler.running:
            self.scheduler.shutdown(wait=False)
        for thread in threads:
            thread.join(timeout=DRAIN_SECONDS)
        log.info("daemon.stopped")

    def _on_stop(self, _number: int, _frame: object) -> None:
        self._asked_to_stop = True  # no logging, no locks: we are inside a signal handler

    def _on_reload(self, _number: int, _frame: object) -> None:
        self._asked_to_reload = True

    def _beat(self) -> None:
        """Sign of life from the worker; the place where a stop takes effect."""
        self._heartbeat = time.monotonic()
        if self.merge is None and self._heartbeat - self._last_extension > 5.0:
            self._last_extension = self._heartbeat
            notify("EXTEND_TIMEOUT_USEC=60000000\nSTATUS=reading the base")
        if self.stopping.is_set() or self._asked_to_stop:
            raise Stopped("a stop was asked for", hint="the work is done again at the next start")

    def _progress(self, read_bytes: int) -> None:
        """Show how far a fold is; it reads base and fine-tune, then the base again."""
        if self.merge is None:
            return
        self._fold_bytes += read_bytes
        whole = 3 * max(1, sum(e.stop - e.start for e in self.merge.base_entries.values()))
        self.metrics.fold_progress.set(min(1.0, self._fold_bytes / whole))

    # Configuration

    def _take(self, config: Config) -> None:
        """Build sources, targets and triggers from a configuration that was checked."""
        assert self.merge is not None
        stopping = partial(_raise_if_set, self.stopping)
        sources = {part.name: open_source(part, stopping) for part in config.sources}
        for stop in self._watchers.values():
            stop()
        self._watchers.clear()
        self.scheduler.remove_all_jobs()
        self.config = self.merge.config = config
        self.sources = sources
        for part in config.sources:
            self._looking.setdefault(part.name, threading.Lock())
            self.scheduler.add_job(
                self._look,
                "interval",
                args=[part.name],
                id=f"poll {part.name}",
                seconds=part.poll,
                next_run_time=datetime.now().astimezone(),
            )
        self.metrics.introduce([part.name for part in config.sources], [part.name for part in config.targets])
        self.metrics.reload_time.set_to_current_time()
        self.work_there.set()
        self.news_there.set()

    def _reload(self) -> None:
        """Take the changed configuration whole, or keep the old one whole."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            fresh, _ = configuration.load(self.config_path)
            if fixed := configuration.changed_fixed(self.config, fresh):
                raise ConfigError(
                    f"{', '.join(fixed)} cannot change while the daemon runs", hint="restart it"
                )
            self._take(fresh)
            self.metrics.reload_ok.set(1)
            log.info("config.reloaded", file=str(self.config_path))
        except ConfigError as exc:
            self.metrics.reload_ok.set(0)
            log.error("config.reload_refused", error=exc.message, hint=exc.hint)
        notify("READY=1")

    # Sources

    def _look(self, name: str) -> None:
        """Look at one source; a look that is still going is told to look once more."""
        if self.stopping.is_set() or name not in self.sources:
            return
        if not self._looking[name].acquire(blocking=False):
            self._look_again.add(name)
            self.metrics.triggers_missed.labels(name).inc()
            return
        try:
            self._look_again.discard(name)
            look_at(self._merge(), self.sources[name], self._look_later)
            self._watch(name)
        except Stopped:
            return
        except TryAgain:
            if stop := self._watchers.pop(name, None):
                stop()
        except Exception:
            log.exception("daemon.bug", source=name)
        finally:
            self._looking[name].release()
        self.work_there.set()
        if name in self._look_again:
            self._look_later(name, DEBOUNCE_SECONDS)

    def _look_later(self, name: str, seconds: float) -> None:
        """Look again soon, on top of the poll; a look already planned sooner stays."""
        at = datetime.now().astimezone() + timedelta(seconds=max(seconds, 0.05))
        planned = self.scheduler.get_job(f"soon {name}")
        if not self.stopping.is_set() and not (
            planned and planned.next_run_time and planned.next_run_time <= at
        ):
            self.scheduler.add_job(
                self._look, "date", args=[name], id=f"soon {name}", run_date=at, replace_existing=True
            )

    def _watch(self, name: str) -> None:
        if name not in self._watchers and not self.stopping.is_set():
            self._watchers[name] = self.sources[name].watch(lambda: self._look_later(name, DEBOUNCE_SECONDS))

    # The worker

    def _work(self) -> None:
        """Fold what is pending, one at a time, for as long as the process lives."""
        merge = self._merge()
        check_served(merge)
        while not self.stopping.is_set():
            self._beat()
            self.work_there.clear()
            self._fold_bytes = 0
            if not work_once(merge, self.sources):
                self.work_there.wait(IDLE_SECONDS)
            else:
                self.news_there.set()

    def _tell(self) -> None:
        """Tell targets what was promoted."""
        merge = self._merge()
        while not self.stopping.is_set():
            self.news_there.clear()
            due = promote.deliver(merge, [open_target(part) for part in merge.config.targets])
            self.news_there.wait(min(IDLE_SECONDS, max(0.05, due - now())) if due else IDLE_SECONDS)

    def _obey(self) -> None:
        """Execute people's commands; never behind a fold."""
        merge = self._merge()
        while not self.stopping.wait(TICK_SECONDS):
            if operations.work_off(merge):
                self.work_there.set()
                self.news_there.set()

    def _merge(self) -> Merge:
        assert self.merge is not None
        return self.merge

    # What others may see

    def _is_alive(self) -> bool:
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 or HEARTBEAT_SECONDS
        return self.fatal is None and time.monotonic() - self._heartbeat < limit

    def _problems(self) -> list[str]:
        """Say why the daemon is not ready; empty if it is."""
        if self.merge is None:
            return ["the store is being opened"]
        found = [self.fatal.message] if self.fatal else []
        found += [self.merge.full_disk] if self.merge.full_disk else []
        found += [self.merge.broken_gate] if self.merge.broken_gate else []
        found += [] if self._is_alive() else ["the worker shows no sign of life"]
        return found

    def _status_line(self) -> str:
        if self.merge is None:
            return "opening the store"
        head = self.merge.head
        return f"version {head.version}, {len(head.fine_tunes)} fine-tunes" + (
            f"; held: {self.merge.held}" if self.merge.held else ""
        )

    def _views(self) -> Views:
        def status() -> dict[str, Any]:
            if self.merge is None:
                return {
                    "current": None,
                    "head": None,
                    "count": 0,
                    "pending": 0,
                    "held": None,
                    "method": self.config.method,
                }
            return reports.status(self.config, self.merge.store, self.merge.ledger)

        def rows(view: Callable[..., list[dict[str, Any]]]) -> Callable[[], list[dict[str, Any]]]:
            return lambda: view(self.merge.ledger) if self.merge else []

        def registry() -> Any:  # noqa: ANN401 -- prometheus_client's
            self.metrics.heartbeat.labels("worker").set(time.time() - (time.monotonic() - self._heartbeat))
            if self.merge is not None:
                refresh(self.merge)
            return self.metrics.registry

        return Views(
            status, rows(reports.history), rows(reports.fine_tunes), self._problems, self._is_alive, registry
        )


def _raise_if_set(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise Stopped("a stop was asked for", hint="the work is done again at the next start")


def look_at(merge: Merge, source: Source, look_later: Callable[[str, float], None]) -> None:
    """Look at a source once, with its metrics and one log line when its state changes; raises TryAgain."""
    part = next(p for p in merge.config.sources if p.name == source.name)
    started = time.monotonic()
    before = reports.source_status(merge.ledger, source.name)["state"]
    try:
        until = reconcile.observe(merge, source, part)
    except Stopped:
        raise
    except TryAgain as exc:
        reconcile.failed(merge.ledger, source.name, exc.message)
        merge.metrics.polls.labels(source.name, "error").inc()
        merge.metrics.source_up.labels(source.name).set(0)
        if before != "error":
            log.warning("source.unreachable", source=source.name, error=exc.message, hint=exc.hint)
        raise
    finally:
        merge.metrics.poll_seconds.labels(source.name).observe(time.monotonic() - started)
    merge.metrics.polls.labels(source.name, "ok").inc()
    merge.metrics.source_up.labels(source.name).set(1)
    if before == "error":
        log.info("source.reachable", source=source.name)
    if until:
        look_later(source.name, until - now())


def check_served(merge: Merge) -> None:
    """Before the first fold after a start: head and current must be, byte for byte, what was sealed."""
    started = time.monotonic()
    wanted = {merge.head.path, snapshots.current(merge.store) or merge.head.path}
    for path in sorted(wanted):
        snapshots.check_hashes(snapshots.read(path), merge.engine.beat)
    log.info(
        "store.verified",
        versions=[path.name for path in sorted(wanted)],
        seconds=round(time.monotonic() - started, 3),
    )


def work_once(merge: Merge, sources: dict[str, Source]) -> bool:
    """Take up the next thing that can be done; False if there is nothing to do now."""
    if not merge.held:
        conclude_open(merge)
    row = next_row(merge, sources)
    if row is None:
        return False
    try:
        pipeline.journey(merge, row, sources[row["source"]])
    except Stopped:
        raise
    except TryAgain as exc:
        pipeline.put_back(merge, row, exc)
    return True


def conclude_open(merge: Merge) -> None:
    """Gate and accept candidates that a kill or a hold left sealed."""
    for row in merge.ledger.rows("select * from snapshots where state = 'candidate' order by version"):
        path = merge.store.candidates / snapshots.folder_name(row["version"], row["digest"])
        try:
            pipeline.conclude(merge, snapshots.read(path))
        except Stopped:
            raise
        except TryAgain as exc:
            log.warning("candidate.waits", version=row["version"], detail=exc.message)
            merge.full_disk = exc.message if isinstance(exc, NoSpace) else merge.full_disk


def next_row(merge: Merge, sources: dict[str, Source]) -> Row | None:
    """Choose the first pending fine-tune that is due; during a hold, one that is still to be fetched."""
    if merge.ledger.row("select 1 from snapshots where state = 'candidate'") and not merge.held:
        return None
    for row in merge.ledger.fine_tunes("pending"):
        is_due = row["next_try_at"] <= now() and row["source"] in sources
        if is_due and not (merge.held and row["step"] != "announced"):
            return row
    return None


def refresh(merge: Merge) -> None:
    """Bring gauges that mirror the store up to date; called at each scrape."""
    metrics, status = merge.metrics, reports.status(merge.config, merge.store, merge.ledger)
    metrics.head_version.set(status["head"]["version"] if status["head"] else 0)
    metrics.current_version.set(status["current"]["version"] if status["current"] else 0)
    last = merge.ledger.last_promotion()
    metrics.current_time.set((last or {}).get("switched_at") or 0)
    metrics.held.set(bool(status["held"]))
    metrics.disk_free.set(status["disk"]["free_bytes"])
    metrics.disk_full.set(bool(merge.full_disk))
    waiting = merge.ledger.fine_tunes("waiting", "pending", "awaiting_approval")
    metrics.oldest_pending.set(min((row["first_seen_at"] for row in waiting), default=0))
    for part in merge.config.sources:
        metrics.pending.labels(part.name).set(sum(row["source"] == part.name for row in waiting))
        row = merge.ledger.row("select last_success_at from sources where name = ?", part.name)
        metrics.source_success.labels(part.name).set((row or {}).get("last_success_at") or 0)
    for target in status["targets"]:
        metrics.outbox.labels(target["name"]).set(target["open"])
        metrics.served.labels(target["name"]).set(
            bool(status["current"]) and target["snapshot"] == status["current"]["version"]
        )


def run_once(config: Config) -> None:
    """Look at every source, wait out settling, fold what is ready, tell the targets, and end. Opens no port.

    Raises TryAgain where something was left for later: a source that failed, a full disk, a target not confirmed.
    """
    store = recovery.prepare_folder(config)
    with files.locked(store.lock):
        asked_to_stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
        beat = partial(_raise_if_set, asked_to_stop)
        engine = Engine(device=config.device, threads=config.threads, residency=config.residency, beat=beat)
        metrics = Metrics(screen.REASONS)
        metrics.introduce([part.name for part in config.sources], [part.name for part in config.targets])
        merge = recovery.open_merge(config, engine, metrics)
        try:
            check_served(merge)
            operations.work_off(merge)
            sources = {part.name: open_source(part, beat) for part in config.sources}
            failures = look_until_settled(merge, sources, beat)
            while work_once(merge, sources):
                beat()
            promote.deliver(merge, [open_target(part) for part in config.targets])
            left = merge.ledger.fine_tunes("pending") if not merge.held else []
            failures += [f"{row['name']}: {row['detail']}" for row in left]
            failures += [
                f"target {row['target']}: {row['error']}"
                for row in merge.ledger.rows("select * from outbox where state = 'pending'")
            ]
        finally:
            merge.ledger.close()
    if failures:
        raise TryAgain("; ".join(failures), hint="run it again later")


def obey_once(config: Config) -> None:
    """Execute the commands in the ledger without a daemon, and tell the targets once. The caller holds the lock."""
    metrics = Metrics(screen.REASONS)
    metrics.introduce([part.name for part in config.sources], [part.name for part in config.targets])
    merge = recovery.open_merge(config, Engine(device="cpu", threads=config.threads), metrics)
    try:
        operations.work_off(merge)
        promote.deliver(merge, [open_target(part) for part in config.targets])
    finally:
        merge.ledger.close()


def look_until_settled(merge: Merge, sources: dict[str, Source], beat: Callable[[], None]) -> list[str]:
    """Look at every source until none says that it will know more soon; gives what failed."""
    failures = []
    for name, source in sources.items():
        again = [0.0]
        while again:
            again.clear()
            try:
                look_at(merge, source, lambda _name, seconds, again=again: again.append(seconds))  # type: ignore[misc]
            except Stopped:
                raise
            except TryAgain as exc:
                failures.append(exc.message)
            deadline = time.monotonic() + max(again, default=0.0)
            while time.monotonic() < deadline:
                beat()
                time.sleep(min(TICK_SECONDS, max(0.0, deadline - time.monotonic())))
        log.info("source.looked_at", source=name)
    return failures
