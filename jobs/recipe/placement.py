"""Fields of a recipe that say where and how a run executes, not what it computes."""

from __future__ import annotations

LIVE_FIELDS = frozenset(
    {
        "min_workers",
        "max_workers",
        "micro_batch_size",
        "recompute",
        "checkpoint_interval",
        "checkpoint_every_steps",
        "checkpoint_every_seconds",
        "checkpoint_min_seconds",
        "checkpoint_max_seconds",
        "keep_checkpoints",
        "memory_checkpoint_every_steps",
        "digest_every_steps",
        "on_damaged_checkpoint",
        "loader_threads",
        "loader_processes",
        "on_bad_sample",
        "max_consecutive_bad_samples",
        "check_etags",
        "cache_dir",
        "cache_bytes",
        "resize_seconds",
        "verify_steps_every",
        "on_nonfinite_loss",
        "max_nonfinite_in_a_row",
        "max_restarts_without_progress",
    }
)
"""Those that may change while a run trains (`convmae set`)."""
DRIVER_FIELDS = frozenset(
    {
        "run_root",
        "max_steps",
        "compile",
        "cpus_per_worker",
        "stall_seconds",
        "hang_seconds",
        "standby",
        "preflight",
        "straggler_factor",
        "leave_out_stragglers",
        "probes",
        "probe_data",
        "probe_labels",
        "probe_epochs",
        "probe_samples",
        "probe_wait_seconds",
        "metrics_port",
        "tracker",
        "notify_url",
        "notify_format",
    }
)
"""Those that belong to the run's driver, or to the process group that it starts."""
PLACEMENT_FIELDS = LIVE_FIELDS | DRIVER_FIELDS
"""All of these may change when a run is resumed."""
