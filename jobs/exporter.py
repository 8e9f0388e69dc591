"""The run's /metrics endpoint: run-level series that outlive workers.

Counters take up where the checkpoint left them, so that a restart does not look like a reset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

_GAUGES = {
    "step": ("convmae_step", "Optimizer steps done."),
    "total_steps": ("convmae_total_steps", "Optimizer steps that the run will make."),
    "epoch": ("convmae_epoch", "Epoch of the last step, from 0."),
    "loss": ("convmae_loss", "Mean loss of the last global batch."),
    "learning_rate": ("convmae_learning_rate", "Learning rate of the last step."),
    "gradient_norm": ("convmae_gradient_norm", "Global gradient norm of the last step."),
    "images_per_second": ("convmae_images_per_second", "Images trained per second over the last steps, all ranks."),
    "data_wait_ratio": ("convmae_data_wait_ratio", "Share of the last steps that the slowest rank waited for data."),
    "quarantined": ("convmae_quarantined_samples", "Distinct samples that were found unusable."),
    "block_cache_bytes": ("convmae_block_cache_bytes", "Bytes in the disk cache of rank 0's node."),
    "block_cache_off_ranks": ("convmae_block_cache_off_ranks", "Ranks that no longer store blocks: their disk failed."),
    "world_size": ("convmae_world_size_ranks", "Ranks that train."),
    "eta_seconds": ("convmae_eta_seconds", "Predicted seconds to the end of the run."),
    "last_step_at_seconds": ("convmae_last_step_timestamp_seconds", "Unix time of the last step."),
    "checkpoint_step": ("convmae_checkpoint_step", "Step of the newest committed checkpoint."),
    "checkpoint_at_seconds": ("convmae_checkpoint_timestamp_seconds", "Unix time of the newest committed checkpoint."),
    "checkpoint_bytes": ("convmae_checkpoint_bytes", "Size of the newest committed checkpoint."),
    "checkpoint_seconds": ("convmae_checkpoint_duration_seconds", "Seconds from its beginning to its commit."),
    "checkpoint_stall_seconds": ("convmae_checkpoint_last_stall_seconds", "Seconds that training stood still for it."),
}

COUNTERS = {
    "images": "Images trained, redone ones included.",
    "checkpoint_stall_seconds": "Seconds that training stood still for committed checkpoints.",
    "checkpoint_failures": "Checkpoints that could not be uploaded or committed.",
    "hangs": "Ranks that stood still and were killed.",
    "skipped_steps": "Steps without an update, since a loss or gradient was not finite, redone ones included.",
    "rollbacks": "Returns to a checkpoint since a loss or gradient was not finite.",
    "substitutions": "Samples that were replaced since they are unusable, redone ones included.",
    "storage_requests": "Ranged reads of images from the object store, all ranks.",
    "storage_read_bytes": "Bytes of images received from the object store, all ranks.",
    "block_cache_hits": "Reads that the disk caches served, all ranks.",
    "block_cache_misses": "Reads that the disk caches could not serve, all ranks.",
    "block_cache_damaged": "Blocks that were found damaged on a cache's disk and read again, all ranks.",
    "block_cache_evictions": "Blocks that the disk caches evicted, all ranks.",
}
"""Run-level counters `convmae_<name>_total`; a commit keeps them."""


class RunExporter:
    """Serves one run's series over HTTP.

    Owns: the server thread and the registry. Blocking: `update` is O(1) and does no I/O.
    """

    def __init__(self, run: str, host: str, port: int) -> None:
        """Start serving.

        Args:
            run: The run's name, the only label.
            host: Address to listen on.
            port: Port to listen on; 0: any free one.
        """
        registry = CollectorRegistry()
        labels = ["run"]
        self._run = run
        self._gauges = {key: Gauge(name, text, labels, registry=registry) for key, (name, text) in _GAUGES.items()}
        self._counters = {
            name: Counter(f"convmae_{name}", text, labels, registry=registry) for name, text in COUNTERS.items()
        }
        self._restarts = Counter(
            "convmae_restarts", "Restarts of the worker group.", ["run", "reason"], registry=registry
        )
        text = (
            "Seconds of the last restart, from the last step before it to the first after it, by phase and all (down)."
        )
        self._recovery = Gauge("convmae_last_recovery_seconds", text, ["run", "phase"], registry=registry)
        for counter in self._counters.values():
            counter.labels(run)
        server, _ = start_http_server(port, addr=host, registry=registry)
        self.address = f"{host}:{server.server_port}"

    @property
    def url(self) -> str:
        """Where Prometheus scrapes."""
        return f"http://{self.address}/metrics"

    def update(self, status: Mapping[str, Any]) -> None:
        """Set every gauge that `status` has a value for."""
        for key, gauge in self._gauges.items():
            if status.get(key) is not None:
                gauge.labels(self._run).set(status[key])

    def count(self, name: str, amount: float) -> None:
        """Add to one of COUNTERS."""
        self._counters[name].labels(self._run).inc(amount)

    def count_restart(self, reason: str) -> None:
        """Add a restart; `reason` is one of a few words."""
        self._restarts.labels(self._run, reason).inc()

    def recovered(self, seconds: Mapping[str, float]) -> None:
        """Set how long each phase of a restart took; a phase that the last one had not is gone."""
        self._recovery.clear()
        for phase, value in seconds.items():
            self._recovery.labels(self._run, phase).set(value)

    def announce(self, folder: Path) -> None:
        """Let the Prometheus of the local stack, which watches `folder`, find this endpoint."""
        target = [{"targets": [self.address], "labels": {"job": "convmae"}}]
        temporary = folder / f".{self._run}.json.tmp"
        temporary.write_text(json.dumps(target))
        temporary.replace(folder / f"{self._run}.json")
