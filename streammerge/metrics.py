"""Every Prometheus metric, declared in one place: bounded labels, timestamps instead of ages.

All children start at zero. Every object has a registry of its own; nothing is global. Label values come from
the configuration or from closed sets.
"""

from __future__ import annotations

import platform
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from streammerge import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LONG_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1800, 3600, 7200)
SHORT_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300)
DECISIONS = ("folded", "refused", "quarantined", "superseded", "ignored", "gone", "replaced", "retracted")
STAGES = ("announce", "queue", "fetch", "fold", "render", "tune", "seal", "gate", "promote")
POLL_RESULTS = ("ok", "error")
TOLD_RESULTS = ("ok", "failed", "wrong")
GATE_VERDICTS = ("passed", "refused", "later", "broken")


class Metrics:
    """The daemon's metrics on one registry."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.stage_seconds.labels(name).observe(time.monotonic() - started)

    def __init__(self, reasons: Iterable[str] = ()) -> None:
        """`reasons` are all words a fine-tune can be refused for: each starts at zero."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # half of all series, and nobody asks for them
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        at = self.registry
        build = Info("streammerge_build", "Version of streammerge and of what it runs on", registry=at)
        build.info({"version": __version__, "python_version": platform.python_version()})
        self._declare_process(at)
        self._declare_arrivals(at)
        self._declare_folds(at)
        self._declare_versions(at)
        self._declare_targets(at)
        self._declare_trouble(at)
        for reason in reasons:
            self.refused.labels(reason)
        for result in ("done", "refused", "abandoned"):
            self.folds.labels(result)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for cause in ("first", "fold", "retract", "rollback", "answered-wrong"):
            self.promotions.labels(cause)

    def _declare_process(self, at: CollectorRegistry) -> None:
        """The daemon itself: start, configuration, readiness."""
        self.started = Gauge("streammerge_start_timestamp_seconds", "When this daemon started", registry=at)
        self.started.set(time.time())
        self.reload_ok = Gauge(
            "streammerge_config_last_reload_successful",
            "1 if the last reload of the configuration worked",
            registry=at,
        )
        self.reload_ok.set(1)
        self.reload_time = Gauge(
            "streammerge_config_last_reload_success_timestamp_seconds",
            "When a configuration was last taken",
            registry=at,
        )
        self.reload_time.set_to_current_time()
        self.ready = Gauge("streammerge_ready", "1 if /readyz answers 200", registry=at)

    def _declare_arrivals(self, at: CollectorRegistry) -> None:
        """Sources, and what became of the fine-tunes they announced."""
        self.polls = Counter(
            "streammerge_source_polls_total",
            "Looks at a source",
            ["source", "result"],
            registry=at,
        )
        self.poll_seconds = Histogram(
            "streammerge_source_poll_duration_seconds",
            "Time of one look at a source",
            ["source"],
            buckets=SHORT_SECONDS,
            registry=at,
        )
        self.source_success = Gauge(
            "streammerge_source_last_success_timestamp_seconds",
            "When a source was last seen",
            ["source"],
            registry=at,
        )
        self.source_up = Gauge(
            "streammerge_source_up",
            "1 if the last look at the source worked",
            ["source"],
            registry=at,
        )
        self.discovered = Counter(
            "streammerge_finetunes_discovered_total",
            "Fine-tune revisions announced",
            ["source"],
            registry=at,
        )
        self.decided = Counter(
            "streammerge_finetunes_total",
            "Fine-tunes by what became of them",
            ["source", "decision"],
            registry=at,
        )
        self.refused = Counter(
            "streammerge_finetunes_refused_total",
            "Fine-tunes refused or quarantined, by reason",
            ["reason"],
            registry=at,
        )
        self.pending = Gauge(
            "streammerge_finetunes_pending",
            "Fine-tunes announced and not yet decided",
            ["source"],
            registry=at,
        )
        self.oldest_pending = Gauge(
            "streammerge_oldest_pending_timestamp_seconds",
            "When the oldest pending fine-tune was first seen; 0 if none",
            registry=at,
        )
        self.fetched_bytes = Counter(
            "streammerge_fetched_bytes_total",
            "Bytes brought into the inbox",
            ["source"],
            registry=at,
        )

    def _declare_folds(self, at: CollectorRegistry) -> None:
        """Folding: stages, progress, and the figures of the merge."""
        self.folds = Counter("streammerge_folds_total", "Folds by result", ["result"], registry=at)
        self.device_full = Counter(
            "streammerge_device_out_of_memory_total", "Folds that the GPU had no memory for", registry=at
        )
        self.stage_seconds = Histogram(
            "streammerge_stage_duration_seconds",
            "Time of one stage of a journey",
            ["stage"],
            buckets=LONG_SECONDS,
            registry=at,
        )
        self.folding = Gauge("streammerge_fold_in_progress", "1 while a fine-tune is folded", registry=at)
        self.fold_started = Gauge(
            "streammerge_fold_started_timestamp_seconds",
            "When the last fold started; 0 if none",
            registry=at,
        )
        self.fold_progress = Gauge(
            "streammerge_fold_progress_ratio",
            "Share of the running fold's bytes that are read",
            registry=at,
        )
        self.merged = Gauge("streammerge_merged_finetunes", "Fine-tunes in the head version", registry=at)
        self.scale = Gauge(
            "streammerge_merge_lambda",
            "The adaptive scale lambda of head; near the root of the count",
            registry=at,
        )
        self.norm_ratio = Gauge(
            "streammerge_merge_norm_ratio",
            "Norm of head's merged delta over its largest input's",
            registry=at,
        )
        self.kept_energy = Gauge(
            "streammerge_projection_kept_energy_ratio",
            "Share of the last delta's energy that was kept",
            registry=at,
        )
        self.orthogonality = Gauge(
            "streammerge_projection_orthogonality",
            "Largest |<P,D>|/(|P||D|) of the last fold; near 0",
            registry=at,
        )

    def _declare_versions(self, at: CollectorRegistry) -> None:
        """Versions: head, the one served, those on disk."""
        self.head_version = Gauge(
            "streammerge_head_version", "Version that the next fold starts from", registry=at
        )
        self.current_version = Gauge("streammerge_current_version", "Version being served", registry=at)
        self.current_time = Gauge(
            "streammerge_current_timestamp_seconds",
            "When the served version was promoted",
            registry=at,
        )
        self.retained = Gauge("streammerge_snapshots_retained", "Accepted versions on disk", registry=at)
        self.promotions = Counter(
            "streammerge_promotions_total", "Switches of current", ["cause"], registry=at
        )

        self.gate_verdicts = Counter(
            "streammerge_gate_verdicts_total",
            "Candidates judged, by gate and what it said",
            ["gate", "verdict"],
            registry=at,
        )
        self.gate_seconds = Histogram(
            "streammerge_gate_duration_seconds",
            "Time a gate took for one candidate",
            ["gate"],
            buckets=LONG_SECONDS,
            registry=at,
        )

    def _declare_targets(self, at: CollectorRegistry) -> None:
        """Targets, and what they confirmed."""
        self.told = Counter(
            "streammerge_notifications_total",
            "Attempts to tell a target",
            ["target", "result"],
            registry=at,
        )
        self.told_seconds = Histogram(
            "streammerge_notification_duration_seconds",
            "Time of one attempt",
            ["target"],
            buckets=SHORT_SECONDS,
            registry=at,
        )
        self.outbox = Gauge(
            "streammerge_notification_outbox",
            "Promotions a target was not told of yet",
            ["target"],
            registry=at,
        )
        self.served = Gauge(
            "streammerge_served_snapshot_matches",
            "1 if the target confirmed the current version",
            ["target"],
            registry=at,
        )
        self.drifts = Counter(
            "streammerge_target_drifts_total",
            "Times that a target served something else than it had confirmed",
            ["target"],
            registry=at,
        )
        self.served_seconds = Histogram(
            "streammerge_publish_to_serve_seconds",
            "From publication to confirmed served",
            ["target"],
            buckets=LONG_SECONDS,
            registry=at,
        )

    def _declare_trouble(self, at: CollectorRegistry) -> None:
        """What needs a person: holds, a full disk, damage, a silent worker, looks skipped."""
        self.held = Gauge("streammerge_held", "1 while a hold stops folding and promotion", registry=at)
        self.disk_free = Gauge(
            "streammerge_store_free_bytes", "Free space on the store's file system", registry=at
        )
        self.disk_full = Gauge("streammerge_disk_full", "1 while work waits for disk space", registry=at)
        self.disk_failing = Gauge(
            "streammerge_disk_failing",
            "1 while work waits for a disk that fails, or can only be read",
            registry=at,
        )
        self.disk_errors = Counter(
            "streammerge_disk_errors_total", "Work abandoned because the disk failed", registry=at
        )
        self.memory_short = Gauge("streammerge_memory_short", "1 while work waits for memory", registry=at)
        self.damaged = Gauge(
            "streammerge_damaged_snapshots",
            "Older versions whose content no longer verifies",
            registry=at,
        )
        self.heartbeat = Gauge(
            "streammerge_worker_last_heartbeat_timestamp_seconds",
            "Sign of life of a worker",
            ["worker"],
            registry=at,
        )
        self.triggers_missed = Counter(
            "streammerge_triggers_skipped_total",
            "Looks skipped because one was still going",
            ["source"],
            registry=at,
        )

    def introduce(self, sources: Iterable[str], targets: Iterable[str], gates: Iterable[str] = ()) -> None:
        """Start every series of the configured sources, targets and gates at zero."""
        for source in sources:
            for result in POLL_RESULTS:
                self.polls.labels(source, result)
            for decision in DECISIONS:
                self.decided.labels(source, decision)
            for metric in (
                self.discovered,
                self.fetched_bytes,
                self.pending,
                self.poll_seconds,
                self.triggers_missed,
                self.source_up,
            ):
                metric.labels(source)
        for target in targets:
            for result in TOLD_RESULTS:
                self.told.labels(target, result)
            for metric in (self.told_seconds, self.outbox, self.served, self.drifts, self.served_seconds):
                metric.labels(target)
        for gate in gates:
            self.gate_seconds.labels(gate)
            for verdict in GATE_VERDICTS:
                self.gate_verdicts.labels(gate, verdict)
