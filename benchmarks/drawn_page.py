"""A run's page as `convmae ui` draws it, once and again after a further step; notes seconds and requests in a file.

python benchmarks/drawn_page.py FILE RUN
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from counted_command import counted

from jobs.cli.shared import existing_run, open_session
from jobs.report.live.run_drawing import RunDrawing


def main() -> None:
    """Draw."""
    _, path, name = sys.argv
    requests = counted()
    run = existing_run(open_session(), name, "")
    drawing = RunDrawing(run, lambda: None)
    assert any("training" in drawn.parts for drawn in drawing.draw())
    drawn_requests = next(requests)
    step, attempt = run.read_heartbeat()["step"] + 1, run.last_attempt() + 1
    figures = {"epoch": 1, "loss": 0.4, "learning_rate": 1e-6, "world_size": 64, "step_seconds": 0.5}
    run.write_history(attempt, step, [{"step": step, "attempt": attempt, **figures}])
    began, cpu = time.perf_counter(), time.process_time()
    assert any("training" in drawn.parts for drawn in drawing.draw())
    again = {"again_seconds": time.perf_counter() - began, "again_cpu_seconds": time.process_time() - cpu}
    run.storage.delete(run.path("history", f"{attempt:04d}-{step:08d}.jsonl"))
    Path(path).write_text(json.dumps({"requests": drawn_requests, **again}))


if __name__ == "__main__":
    main()
