"""The process: builds the parts in order, fires the triggers, hears signals, talks to systemd, drains.

Threads of its own: one worker folds, one tells targets, one executes people's commands, one serves HTTP, and
one for each remote source fetches; apscheduler only decides when a source is looked at. Signal handlers only
set flags. Knows nothing of folding.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from apscheduler.schedulers.background import BackgroundScheduler

from streammerge import (
    aside,
    configfile,
    credentials,
    files,
    gates,
    machine,
    operations,
    reconcile,
    recovery,
    reports,
    rollout,
    screen,
    turns,
)
from streammerge.errors import ConfigError, Stopped, StreammergeError, TryAgain, Unable
from streammerge.ledger import now
from streammerge.metrics import Metrics
from streammerge.once import raise_if_set
from streammerge.recipes import check_cap, check_method
from streammerge.server import HubHook, Server, Views, make_app
from streammerge.sources import open_source
from streammerge.targets import open_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.recipes import FoldingMerge
    from streammerge.sources import Source

TICK_SECONDS = 0.2
IDLE_SECONDS = 1.0
DEBOUNCE_SECONDS = 0.25
LOOKS_APART = 5.0  # times as long as a look takes, so that looks leave the processor to the folds
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
        self.merge: FoldingMerge | None = None
        self.sources: dict[str, Source] = {}
        self.scheduler = BackgroundScheduler(
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}, timezone="UTC"
        )
        self._asked_to_stop = self._asked_to_reload = False
        self._heartbeat = time.monotonic()
        self._looking = {part.name: threading.Lock() for part in config.sources}
        self._look_again: set[str] = set()
        self._look_seconds: dict[str, float] = {}
        self._watchers: dict[str, Callable[[], None]] = {}
        self._fetchers: dict[str, threading.Thread] = {}
        self._fold_bytes = 0
        self._last_extension = 0.0

    # Life

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises what forbids to go on: ConfigError, Locked, Damaged."""
        gates.require(self.config.gates)
        store = recovery.prepare_folder(self.config)
        with machine.errors("opening the store", store.root), files.locked(store.lock):
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
        try:
            self.merge = recovery.open_merge(
                self.config, recovery.engine_of(self.config, self._beat, self._progress), self.metrics
            )
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
            gc.freeze()  # what is here stays: a full collection, soon and cheap, is of what came since
            notify("READY=1")
            log.info(
                "daemon.ready",
                store=str(self.config.store),
                http=self.config.http.listen,
                head=self.merge.head.version,
            )
            self._supervise()
        finally:
            self._drain([*threads, *self._fetchers.values()])
            server.stop()  # before the ledger: it reads it
            self.merge.ledger.close()

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(name, target), name=name, daemon=True)
        thread.start()
        return thread

    def _guarded(self, name: str, target: Callable[[], None]) -> None:
        """Run a thread's loop; what it cannot handle stops the process in order, never silently."""
        try:
            with machine.errors(name, self.config.store):
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
                break
            if self._asked_to_reload:
                self._asked_to_reload = False
                self._reload()
            self.metrics.ready.set(not self._problems())
            if time.monotonic() >= next_ping and self._is_alive():
                notify(f"WATCHDOG=1\nSTATUS={self._status_line()}")
                next_ping = time.monotonic() + (period / 3 if period else 10.0)
        if self._asked_to_stop:  # the worker may have noticed first
            log.info("daemon.stopping")

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
        stopping = partial(raise_if_set, self.stopping)
        before = {part.name: part for part in self.config.sources if part.name in self.sources}
        sources = {
            part.name: self.sources[part.name]
            if before.get(part.name) == part
            else open_source(part, config, stopping)
            for part in config.sources
        }
        for name in [name for name in self._watchers if self.sources[name] is not sources.get(name)]:
            self._watchers.pop(name)()
        self.scheduler.remove_all_jobs()
        self.config = config
        self.merge.take(config)
        self.sources = sources
        reconcile.drop_sources(self.merge, sources)
        for name in [name for name, source in sources.items() if source.is_remote]:
            if name not in self._fetchers or not self._fetchers[name].is_alive():
                self._fetchers[name] = self._thread(f"fetch {name}", partial(self._fetch, name))
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
        lists = (config.sources, config.targets, config.gates)
        self.metrics.introduce(*([part.name for part in parts] for parts in lists))
        self.metrics.reload_time.set_to_current_time()
        self.work_there.set()
        self.news_there.set()

    def _reload(self) -> None:
        """Take the changed configuration whole, or keep the old one whole."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._take(self._read_again())
            self.metrics.reload_ok.set(1)
            log.info("config.reloaded", file=str(self.config_path))
        except ConfigError as exc:
            self.metrics.reload_ok.set(0)
            log.error("config.reload_refused", error=exc.message, hint=exc.hint)  # noqa: TRY400 -- no traceback for a typing error
        notify("READY=1")

    def _read_again(self) -> Config:
        """Read the configuration file; raises ConfigError for a change that only a restart can take."""
        fresh, _ = configfile.load(self.config_path)
        if fixed := configfile.changed_fixed(self.config, fresh):
            raise ConfigError(f"{', '.join(fixed)} cannot change while the daemon runs", hint="restart it")
        check_method(fresh)
        gates.require(fresh.gates)
        if self.merge is not None:
            check_cap(fresh, self.merge.head)
        return fresh

    # Sources

    def _look(self, name: str) -> None:
        """Look at one source; a look that is still going is told to look once more."""
        if self.stopping.is_set() or name not in self.sources:
            return
        if not self._looking[name].acquire(blocking=False):
            self._look_again.add(name)
            self.metrics.triggers_missed.labels(name).inc()
            return
        started = time.monotonic()
        try:
            self._look_again.discard(name)
            turns.look_at(self._merge(), self.sources[name], self._look_later)
            if not self.sources[name].is_remote:  # what waits for a network takes no processor
                self._look_seconds[name] = time.monotonic() - started
            self._watch(name)
        except Stopped:
            return
        except TryAgain as exc:
            if isinstance(exc, Unable):
                aside.note_unable(self._merge(), exc)
            if stop := self._watchers.pop(name, None):
                stop()
        except Exception:
            log.exception("daemon.bug", source=name)
        finally:
            self._looking[name].release()
        self.work_there.set()
        if name in self._look_again:
            self._look_later(name, self._pause(name))

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
            hint = partial(self._hinted, name)
            self._watchers[name] = self.sources[name].watch(hint)

    def _hinted(self, name: str) -> None:
        self._look_later(name, self._pause(name))

    def _pause(self, name: str) -> float:
        """How long file events gather before the next look: longer where a look takes long."""
        return max(DEBOUNCE_SECONDS, LOOKS_APART * self._look_seconds.get(name, 0.0))

    # The worker

    def _work(self) -> None:
        """Fold what is pending, one at a time, for as long as the process lives."""
        merge = self._merge()
        unchecked = turns.check_served(merge)

        def turn() -> None:
            self._beat()
            self.work_there.clear()
            self._fold_bytes = 0
            if turns.work_once(merge, self.sources, fetched_elsewhere=self._remote()):
                self.news_there.set()
            elif not (turns.prepare_another(merge) or turns.check_another(merge, unchecked)):
                self.work_there.wait(IDLE_SECONDS)

        self._for_ever(turn)

    def _remote(self) -> set[str]:
        return {name for name, source in self.sources.items() if source.is_remote}

    def _fetch(self, name: str) -> None:
        """Bring what one remote source announced, beside the folding, for as long as it is configured."""
        merge = self._merge()

        def turn() -> None:
            source = self.sources.get(name)
            if source and turns.fetch_once(merge, source):
                self.work_there.set()
            else:
                self.stopping.wait(TICK_SECONDS)

        self._for_ever(turn, lambda: name in self.sources)

    def _tell(self) -> None:
        """Tell targets what was promoted, and see that they go on serving it."""
        merge = self._merge()
        stopping = partial(raise_if_set, self.stopping)

        def turn() -> None:
            self.news_there.clear()
            config = merge.config
            targets = [open_target(part, config, stopping) for part in config.targets]
            due = rollout.deliver(merge, targets, stopping)
            rollout.look(merge, targets, stopping)
            self.news_there.wait(min(IDLE_SECONDS, max(0.05, due - now())) if due else IDLE_SECONDS)

        self._for_ever(turn)

    def _obey(self) -> None:
        """Execute people's commands, never behind a fold; those that fold are the worker's."""
        merge = self._merge()

        def turn() -> None:
            if operations.work_off(merge):
                self.work_there.set()
                self.news_there.set()
            if operations.asked_for(merge, operations.FOLDING):
                self.work_there.set()
            self.stopping.wait(TICK_SECONDS)

        self._for_ever(turn)

    def _for_ever(self, turn: Callable[[], None], wanted: Callable[[], bool] = lambda: True) -> None:
        """Take turn after turn; where the machine cannot, not even write that down, say so and wait."""
        merge, wait = self._merge(), IDLE_SECONDS
        while not self.stopping.is_set() and wanted():
            try:
                with machine.errors("going on", merge.store.root):
                    turn()
                wait = IDLE_SECONDS
            except Unable as exc:
                aside.note_unable(merge, exc)
                self.stopping.wait(wait)
                wait = min(2 * wait, aside.UNABLE_SECONDS)

    def _merge(self) -> FoldingMerge:
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
        found += [self.merge.unable.message] if self.merge.unable else []
        found += [self.merge.broken_gate] if self.merge.broken_gate else []
        found += [] if self._is_alive() else ["the worker shows no sign of life"]
        return found

    def _status_line(self) -> str:
        if self.merge is None:
            return "opening the store"
        with suppress(TryAgain), machine.errors("reading the status", self.config.store):
            head = self.merge.head
            return f"version {head.version}, {len(head.fine_tunes)} fine-tunes" + (
                f"; held: {self.merge.held}" if self.merge.held else ""
            )
        return "the store cannot be read now"

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

        def registry() -> Any:  # noqa: ANN401 -- prometheus_client's registry, which is not imported here
            self.metrics.heartbeat.labels("worker").set(time.time() - (time.monotonic() - self._heartbeat))
            if self.merge is not None:
                turns.refresh(self.merge)
            return self.metrics.registry

        def mention(name: str) -> bool:
            heard = [source.name for source in self.sources.values() if source.mention(name)]
            for source in heard:
                self._look_later(source, 0.0)
            return bool(heard)

        secret = credentials.read(self.config.http.hub_secret_file, credential="hub-webhook")
        hook = HubHook(secret, mention)
        return Views(
            status,
            rows(reports.history),
            rows(reports.fine_tunes),
            self._problems,
            self._is_alive,
            registry,
            hook,
        )
