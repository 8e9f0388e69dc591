"""Status of a run, from its directory alone, without a connection to its cluster."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from jobs.checkpoint import checkpoint
from jobs.report.live.page_token import is_loopback, with_token
from jobs.run.accuracy_text import accuracies_text, accuracy_text
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.run.validation_rows import VALIDATION_NAMES
from jobs.terminal import duration_text, figure
from pipeline.errors import UserError

SILENT_SECONDS = 60.0
"""A live run without a heartbeat for this long is cut off: its driver died, or cannot reach the object store."""


RUNS_AT_ONCE = 16
"""Runs whose status is read side by side."""


def run_status(run: RunDirectory, now_seconds: float | None = None) -> dict[str, Any]:
    """State, progress and figures of a run.

    State is `submitted`, `starting`, `running`, `waiting`, `restarting`, `stopping`, `finished`, `stopped`, `failed`,
    or `interrupted` if a live run fell silent.
    """
    now = time.time() if now_seconds is None else now_seconds
    status = {
        "run": run.name,
        "url": run.url,
        "state": "submitted",
        "step": 0,
        "total_steps": 0,
        **run.read_heartbeat(),
    }
    status["state"] = current_state(status, now)
    status["committed_steps"] = checkpoint.committed_steps(run)
    if "checkpoint_at_seconds" in status:
        status["checkpoint_age_seconds"] = max(0.0, now - status["checkpoint_at_seconds"])
    if "worker_seconds_total" in status:
        status["worker_hours"] = status["worker_seconds_total"] / 3600
    return status


def current_state(heartbeat: Mapping[str, Any], now_seconds: float) -> str:
    """The state that a heartbeat stands for, by its age."""
    state = str(heartbeat.get("state", "submitted"))
    silent = now_seconds - heartbeat.get("updated_at_seconds", now_seconds)
    return "interrupted" if state not in FINAL_STATES and silent > SILENT_SECONDS else state


def page_address(run: RunDirectory, status: Mapping[str, Any]) -> str:
    """Where the live page of a run can be opened, with the token that it asks for; empty where there is none."""
    url = str(status.get("page_url", ""))
    if not url or status["state"] in (*FINAL_STATES, "interrupted"):
        return ""
    token = "" if is_loopback(urlsplit(url).hostname or "") else run.read_page_token()
    return with_token(url, token)


def status_or_error(run: RunDirectory) -> dict[str, Any]:
    """As `run_status`; for a run whose directory is damaged, the state `unreadable` and the `error`."""
    try:
        return run_status(run)
    except UserError as error:
        return {
            "run": run.name,
            "url": run.url,
            "state": "unreadable",
            "step": 0,
            "total_steps": 0,
            "error": str(error),
        }


def statuses(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Those of several runs, as `status_or_error`, read side by side."""
    with ThreadPoolExecutor(RUNS_AT_ONCE) as threads:
        return list(threads.map(status_or_error, runs))


def list_cells(status: Mapping[str, Any]) -> tuple[str, ...]:
    """A run in a table: name, state, step, loss, images per second, workers."""
    steps = f"{status['step']}/{status['total_steps']}"
    figures = (figure(status.get("loss"), ".4f"), figure(status.get("images_per_second"), ".0f"))
    return status["run"], status["state"], steps, *figures, figure(status.get("world_size"), "d")


def status_lines(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and value for people."""
    step, total = status["step"], status["total_steps"]
    yield "run", status["run"]
    yield "state", status["state"]
    yield "step", f"{step:,} of {total:,}" + (f" ({step / total:.1%})" if total else "")
    yield "epoch", _epochs(status)
    yield "loss", figure(status.get("loss"), ".6f")
    if accuracy := accuracy_text(status):
        yield "accuracy", accuracy
    if validation := accuracies_text({name: status[name] for name in VALIDATION_NAMES if status.get(name) is not None}):
        yield "validation", validation
    yield "learning rate", figure(status.get("learning_rate"), ".3e")
    yield "images/s", figure(status.get("images_per_second"), ".1f")
    if status.get("device_flops_per_second") is not None:
        yield "TFLOP/s", _utilization(status)
    yield "data wait", figure(status.get("data_wait_ratio"), ".1%")
    yield "workers", _workers(status)
    yield "attempt", f"{status.get('attempt', '-')} ({status.get('restarts', 0)} restarts)"
    if status.get("quarantined"):
        yield "unusable", f"{status['quarantined']:,} samples, see `convmae quarantine {status['run']}`"
    if "worker_hours" in status:
        hours = "GPU-hours" if status.get("device") == "cuda" else "worker-hours"
        yield hours, figure(status["worker_hours"], ".2f")
    yield "checkpoints", ", ".join(str(step) for step in status["committed_steps"]) or "none yet"
    if status.get("checkpoint_interval_seconds"):
        yield "save every", duration_text(status["checkpoint_interval_seconds"])
    if "checkpoint_age_seconds" in status:
        yield "newest one", f"{duration_text(status['checkpoint_age_seconds'])} ago"
    if status.get("memory_checkpoint_step") and status["state"] not in FINAL_STATES:
        yield "in memory", f"step {status['memory_checkpoint_step']:,}"
    if status["state"] not in FINAL_STATES:
        yield "ETA", duration_text(status.get("eta_seconds"))
        yield "metrics", status.get("metrics_url", "-")
        if status.get("page_url"):
            yield "page", status["page_url"]
    yield "directory", status["url"]


def _epochs(status: Mapping[str, Any]) -> str:
    """Whole epochs done, and all epochs."""
    length = status.get("steps_per_epoch")
    return f"{status['step'] // length:,} of {math.ceil(status['total_steps'] / length):,}" if length else "-"


def _utilization(status: Mapping[str, Any]) -> str:
    mfu = f"; MFU {status['mfu_ratio']:.1%}" if status.get("mfu_ratio") is not None else ""
    return f"{status['device_flops_per_second'] / 1e12:.3g} a device{mfu} of {status.get('devices') or '-'}"


def world_sizes_text(sizes: Iterable[int]) -> str:
    """Workers of attempts in order; only their range if it changed often."""
    turns = [size for size, _ in itertools.groupby(sizes)]
    return " → ".join(map(str, turns)) if len(turns) <= 6 else f"{min(turns)} to {max(turns)}"


def _workers(status: Mapping[str, Any]) -> str:
    now, most = status.get("world_size"), status.get("target_world_size")
    return "-" if not now else f"{now} of {most}" if most else str(now)


def event_line(event: Mapping[str, Any]) -> str:
    """One event in one line: when, which attempt, what, and its fields."""
    at = datetime.fromtimestamp(event["at_seconds"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    fields = {key: value for key, value in event.items() if key not in ("at_seconds", "attempt", "kind")}
    text = ", ".join(f"{key} {_field_text(key, value)}" for key, value in fields.items() if value not in (None, ""))
    return f"{at}  attempt {event['attempt']}  {event['kind']}: {text}"


def _field_text(key: str, value: Any) -> str:
    if key == "step_flops_from":
        return " and ".join(f"{flops:.4g} from step {first:,}" for first, flops in value)
    return f"{value:.4g}" if "flops" in key and isinstance(value, int | float) else str(value)
