"""The endpoint of a run: run-level series that outlive workers, series of each rank while it trains, and its page.

Counters are those of the last heartbeat that was written, so that a restart does not look like a reset. Series of ranks
are made at each scrape from the figures of the newest step, so that none of an ended group remain.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.errors import PortTakenError
from jobs.metrics.endpoint import Endpoint, served, url_of
from jobs.metrics.rank_figures import FigureTable, RankFigures
from jobs.run.patience import persevere
from jobs.run.probe_rows import PROBE_NAMES, ProbeCurve

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

RANKS_SILENT_SECONDS = 20.0
"""Series of ranks end when no step was reported for this long, or for RANKS_SILENT_STEPS of the slowest rank's."""
RANKS_SILENT_STEPS = 3

GAUGES = {
    "step": ("convmae_step", "Optimizer steps done."),
    "total_steps": ("convmae_total_steps", "Optimizer steps that the run will make."),
    "epoch": ("convmae_epoch", "Epoch of the last step, from 0."),
    "loss": ("convmae_loss", "Mean loss of the last global batch."),
    "learning_rate": ("convmae_learning_rate", "Learning rate of the last step."),
    "validation_top1": (
        "convmae_validation_accuracy_ratio",
        "Share of validation samples whose class a fine-tuning gets.",
    ),
    "validation_top5": (
        "convmae_validation_top_five_ratio",
        "Share of them whose class is among the first five; no series with up to five classes.",
    ),
    "validation_low": (
        "convmae_validation_accuracy_low_ratio",
        "Lower end of the 95 % confidence interval of the newest validation accuracy.",
    ),
    "validation_high": ("convmae_validation_accuracy_high_ratio", "Upper end of it."),
    "validation_best_low": (
        "convmae_validation_best_accuracy_low_ratio",
        "Lower end of the interval of the best validation accuracy that the run has had.",
    ),
    "gradient_norm": ("convmae_gradient_norm", "Global gradient norm of the last step."),
    "images_per_second": ("convmae_images_per_second", "Images trained per second over the last steps, all ranks."),
    "device_flops_per_second": (
        "convmae_device_flops_per_second",
        "Operations of the model per second over the last steps, of one device.",
    ),
    "mfu_ratio": (
        "convmae_mfu_ratio",
        "Share of the devices' peak that these are; no series where the peak is not known.",
    ),
    "data_wait_ratio": ("convmae_data_wait_ratio", "Share of the last steps that the slowest rank waited for data."),
    "quarantined": ("convmae_quarantined_samples", "Distinct samples that were found unusable."),
    "block_cache_bytes": ("convmae_block_cache_bytes", "Bytes in the disk cache of rank 0's node."),
    "block_cache_off_ranks": ("convmae_block_cache_off_ranks", "Ranks that no longer store blocks: their disk failed."),
    "stragglers": ("convmae_straggler_ranks", "Ranks that make the others wait, now."),
    "world_size": ("convmae_world_size_ranks", "Ranks that train; 0 while the worker group restarts."),
    "target_world_size": ("convmae_target_world_size_ranks", "Most ranks that the run can use: max_workers."),
    "eta_seconds": ("convmae_eta_seconds", "Predicted seconds to the end of the run."),
    "ending": ("convmae_ending", "1 once all steps are done or the run was asked to stop; 0 before."),
    "last_step_at_seconds": ("convmae_last_step_timestamp_seconds", "Unix time of the last step."),
    "checkpoint_every_steps": (
        "convmae_checkpoint_interval_steps",
        "Steps between checkpoints; no series where the interval is one of time.",
    ),
    "checkpoint_interval_seconds": (
        "convmae_checkpoint_interval_seconds",
        "Seconds from one checkpoint to the next; no series where the interval is one of steps.",
    ),
    "checkpoint_step": ("convmae_checkpoint_step", "Step of the newest committed checkpoint."),
    "checkpoint_at_seconds": ("convmae_checkpoint_timestamp_seconds", "Unix time of the newest committed checkpoint."),
    "checkpoint_bytes": ("convmae_checkpoint_bytes", "Size of the newest committed checkpoint."),
    "checkpoint_seconds": ("convmae_checkpoint_duration_seconds", "Seconds from its beginning to its commit."),
    "checkpoint_stall_seconds": ("convmae_checkpoint_last_stall_seconds", "Seconds that training paused for it."),
    "memory_checkpoint_step": ("convmae_memory_checkpoint_step", "Step of the newest memory checkpoint."),
    "memory_checkpoint_at_seconds": (
        "convmae_memory_checkpoint_timestamp_seconds",
        "Unix time of the newest memory checkpoint.",
    ),
    "memory_checkpoint_bytes": ("convmae_memory_checkpoint_bytes", "Size of the newest memory checkpoint, one copy."),
    "memory_checkpoint_stall_seconds": (
        "convmae_memory_checkpoint_last_stall_seconds",
        "Seconds that training paused for it.",
    ),
    "probe_epoch": ("convmae_probe_epoch", "Epochs finished by the weights that were probed last."),
    "probe_seconds": ("convmae_probe_duration_seconds", "Seconds that the last probe took."),
}

COUNTERS = {
    "images": "Images trained, including redone ones.",
    "steps_redone": "Steps that were redone after restarts.",
    "worker_seconds": "Seconds that ranks trained, summed over them, from their restore to their newest step.",
    "checkpoint_stall_seconds": "Seconds that training paused for committed checkpoints.",
    "checkpoints": "Checkpoints committed.",
    "checkpoint_failures": "Checkpoints that could not be uploaded or committed.",
    "memory_checkpoints": "Memory checkpoints that were whole.",
    "memory_checkpoint_failures": "Memory checkpoints that were not.",
    "hangs": "Ranks that hung and were killed.",
    "straggler_spells": "Spells in which a rank made the others wait.",
    "corruptions": "Verified steps in which ranks computed different gradients.",
    "preflight_failures": "Nodes that failed the check before ranks start.",
    "skipped_steps": "Steps without an update, since a loss or gradient was not finite, including redone ones.",
    "rollbacks": "Returns to a checkpoint since a loss or gradient was not finite.",
    "consolidation_failures": "Milestones, or last checkpoints, whose weights could not be written.",
    "probes": "Probes made.",
    "probe_failures": "Probes that failed, including tries that were repeated.",
    "substitutions": "Samples that were replaced since they are unusable, including redone ones.",
    "storage_requests": "Ranged reads of images from the object store, all ranks.",
    "storage_read_bytes": "Bytes of images received from the object store, all ranks.",
    "block_cache_hits": "Reads that the disk caches served, all ranks.",
    "block_cache_misses": "Reads that the disk caches could not serve, all ranks.",
    "block_cache_damaged": "Blocks that were found damaged on the disk of a cache and read again, all ranks.",
    "block_cache_evictions": "Blocks that the disk caches evicted, all ranks.",
}
"""Run-level counters `convmae_<name>_total`; a commit keeps them."""

LABELLED_COUNTERS = {
    "restarts": ("reason", "Restarts of the worker group."),
    "failures": ("cause", "Failures of the worker group, by the class of their root cause."),
}
"""The same with one more label, which has few values."""
KNOWN_LABELS = {
    "restarts": ("restart", "resize"),
    "failures": ("NonFiniteLossError", "StalledError", "other"),
}
"""Their series start at zero, since `increase` does not see one that appears with its first event."""

PROBE_GAUGES = {
    "accuracy": "Top-1 accuracy of the newest weights that were probed.",
    "accuracy_low": "Lower end of its 95 % confidence interval.",
    "accuracy_high": "Upper end of its 95 % confidence interval.",
    "control_accuracy": "Top-1 accuracy before training: of random weights, unless the run starts from others.",
    "best_accuracy_low": "Lower end of the interval of the best accuracy that the run has had.",
}
"""Gauges `convmae_probe_<name>_ratio`, by probe."""

RANK_GAUGES = {
    "step_seconds": "Seconds between the last two steps of the rank.",
    "data_wait_seconds": "Of these, seconds without a batch.",
    "read_wait_seconds": "Of these, seconds for bytes to be read; the rest is for images to be decoded.",
    "compute_seconds": "Seconds that the rank computed by itself in the step before, until it met the others.",
    "images": "Images for which it computed then.",
    "storage_requests": "Ranged reads of images since the worker started.",
    "storage_read_bytes": "Bytes of images received since the worker started.",
    "block_cache_hits": "Reads that the disk cache served since the worker started.",
    "block_cache_misses": "Reads that the disk cache could not serve since the worker started.",
    "memory_bytes": "Resident memory of the worker's process.",
    "device_memory_bytes": "Most memory that PyTorch held on the GPU; 0 on a CPU.",
    "disk_free_ratio": "Free share of the fullest disk to which the worker writes.",
}
assert tuple(RANK_GAUGES) == RankFigures._fields


def saved_counters(saved: Mapping[str, Any]) -> dict[str, float]:
    """The totals in a heartbeat or a commit: every counter without another label, and those counted with one.

    Returns:
        By `<name>_total`, or `<name>_total:<label>`.
    """
    plain = {f"{name}_total": float(saved.get(f"{name}_total", 0.0)) for name in COUNTERS}
    prefixes = tuple(f"{name}_total:" for name in LABELLED_COUNTERS)
    return plain | {key: float(value) for key, value in saved.items() if key.startswith(prefixes)}


def name_and_label(key: str, total: float) -> tuple[str, float, str]:
    """A total as `RunExporter.count` takes it: name, amount and label, from a key that `saved_counters` gives."""
    name, _, label = key.partition(":")
    return name.removesuffix("_total"), total, label


class RankSeries(Collector):
    """The gauges `convmae_rank_*` of the ranks that train now."""

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._reported: tuple[float, FigureTable] = (0.0, _table(()))

    def update(self, ranks: FigureTable | Sequence[RankFigures]) -> None:
        """Take the figures of the newest step, by rank; none remove all ranks."""
        self._reported = (self._clock(), _table(ranks))

    def alive(self) -> FigureTable:
        """The newest figures; none if the ranks fell silent."""
        at, ranks = self._reported
        slowest = float(ranks[:, RankFigures._fields.index("step_seconds")].max(initial=0.0))
        patience = max(RANKS_SILENT_SECONDS, RANKS_SILENT_STEPS * slowest)
        return ranks if self._clock() - at <= patience else _table(())

    def collect(self) -> Iterator[Metric]:
        """The series of a scrape; none if the ranks fell silent."""
        for (name, text), column in zip(RANK_GAUGES.items(), self.alive().T.tolist(), strict=True):
            family = GaugeMetricFamily(f"convmae_rank_{name}", text, labels=["run", "rank"])
            for rank, figure in enumerate(column):
                family.add_metric([self._run, str(rank)], figure)
            yield family


def _table(ranks: FigureTable | Sequence[RankFigures]) -> FigureTable:
    return np.asarray(ranks, np.float64).reshape(-1, len(RankFigures._fields))


class RunExporter:
    """Serves one run's series over HTTP, and the page of whoever has one.

    Owns: the server's threads and the registry. Blocking: `update` is O(1) and does no I/O.
    """

    def __init__(
        self,
        run: str,
        host: str,
        port: int,
        patience_seconds: float = 0.0,
        pages: Mapping[str, WSGIApplication] | None = None,
    ) -> None:
        """Start serving.

        Args:
            run: The run's name, the only label.
            host: Address to listen on.
            port: Port to listen on; 0: any free one.
            patience_seconds: How long to wait for a port of another process, which may be about to end.
            pages: What is served at some paths; at all others, series are.

        Raises:
            PortTakenError: Another process still has the port.
            OSError: The port cannot be listened on.
        """
        # They would show when this process started, not when the run began to count.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        labels = ["run"]
        self._run = run
        self._gauges = {key: Gauge(name, text, labels, registry=registry) for key, (name, text) in GAUGES.items()}
        self._counters = {
            name: Counter(f"convmae_{name}", text, labels, registry=registry) for name, text in COUNTERS.items()
        }
        text = "Seconds of the last restart, from the last step before to the first after, by phase and down (all)."
        self._recovery = Gauge("convmae_last_recovery_seconds", text, ["run", "phase"], registry=registry)
        for counter in self._counters.values():
            counter.labels(run)
        for name, (label, text) in LABELLED_COUNTERS.items():
            self._counters[name] = Counter(f"convmae_{name}", text, [*labels, label], registry=registry)
            for value in KNOWN_LABELS[name]:
                self._counters[name].labels(run, value)
        self._probes = {
            name: Gauge(f"convmae_probe_{name}_ratio", text, ["run", "probe"], registry=registry)
            for name, text in PROBE_GAUGES.items()
        }
        self._ranks = RankSeries(run)
        registry.register(self._ranks)
        app = _by_path(pages or {}, make_wsgi_app(registry))
        server = persevere(lambda: _listening(app, host, port), PortTakenError, patience_seconds)
        self.address = f"{host}:{server.server_port}"
        self.page_url = url_of(host, server.server_port)

    @property
    def url(self) -> str:
        """URL that Prometheus scrapes."""
        return f"http://{self.address}/metrics"

    def update(self, status: Mapping[str, Any]) -> None:
        """Set every gauge that has a value in `status`; None means unknown, and removes the series."""
        for key, gauge in self._gauges.items():
            if status.get(key) is not None:
                gauge.labels(self._run).set(status[key])
            elif key in status:
                gauge.clear()

    def update_ranks(self, ranks: FigureTable | Sequence[RankFigures]) -> None:
        """Take the newest step's figures of each rank; none when the group has ended."""
        self._ranks.update(ranks)

    def ranks(self) -> FigureTable:
        """The figures that are served of ranks."""
        return self._ranks.alive()

    def count(self, name: str, amount: float, label: str = "") -> None:
        """Add to one of COUNTERS, or of LABELLED_COUNTERS with the value of its label."""
        self._counters[name].labels(self._run, *([label] if label else [])).inc(amount)

    def recovered(self, seconds: Mapping[str, float]) -> None:
        """Set how long each phase of a restart took; phases that it did not have are removed."""
        self._recovery.clear()
        for phase, value in seconds.items():
            self._recovery.labels(self._run, phase).set(value)

    def probed(self, curve: ProbeCurve) -> None:
        """Set the accuracies of each probe; what is not known has no series."""
        for gauge in self._probes.values():
            gauge.clear()
        newest, control = curve.newest, curve.control
        for name in PROBE_NAMES:
            found = {"control_accuracy": control.accuracies[name]} if control else {}
            if newest and (best := curve.best(name)):
                low, high = newest.interval(name)
                found |= {"accuracy": newest.accuracies[name], "accuracy_low": low, "accuracy_high": high}
                found["best_accuracy_low"] = best.interval(name)[0]
            for key, value in found.items():
                self._probes[key].labels(self._run, name).set(value)

    def announce(self, folder: Path) -> None:
        """Let the Prometheus of the local stack, which watches `folder`, find this endpoint.

        The run replaces the address as `instance`: each driver listens on another port, so the run's series would
        otherwise end with its driver.
        """
        target = [{"targets": [self.address], "labels": {"job": "convmae", "instance": self._run}}]
        temporary = folder / f".{self._run}.json.tmp"
        temporary.write_text(json.dumps(target), "utf-8")
        temporary.replace(folder / f"{self._run}.json")

    def withdraw(self, folder: Path) -> None:
        """Undo `announce`: a run that has ended is not a target that is down."""
        (folder / f"{self._run}.json").unlink(missing_ok=True)


def _by_path(pages: Mapping[str, WSGIApplication], others: WSGIApplication) -> WSGIApplication:
    def routed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return pages.get(environ.get("PATH_INFO", ""), others)(environ, start_response)

    return routed


def _listening(app: WSGIApplication, host: str, port: int) -> Endpoint:
    try:
        return served(app, host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTakenError.of(port, error) from error
