"""The accuracies of a run in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.run.probe_rows import PROBE_NAMES
from jobs.run.validation_rows import VALIDATION_NAMES


def accuracy_text(status: Mapping[str, Any]) -> str:
    """The newest accuracies in a run's status, and those of the control; empty before the first probe."""
    newest, control = status.get("probe_accuracies") or {}, status.get("probe_control") or {}
    if not newest:
        return f"{accuracies_text(control)} before training" if control else ""
    before = f"; {accuracies_text(control)} before training" if control else ""
    return f"{accuracies_text(newest)} after epoch {status['probe_epoch']:,}{before}"


def accuracies_text(accuracies: Mapping[str, float]) -> str:
    """What was measured, each with its accuracy."""
    names = PROBE_NAMES | VALIDATION_NAMES
    return ", ".join(f"{names[name]}: {accuracies[name]:.1%}" for name in names if name in accuracies)
