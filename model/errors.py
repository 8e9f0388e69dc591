"""Errors in what a user asks of the model: one small tree, readable as documentation."""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 30
"""Faults of one kind that a message lists; of more, it says how many."""
_LONGEST = 200
"""Characters of a fault in a message. A name in a file of others may be as long as the file."""


class ModelConfigError(ValueError):
    """A model, a batch or a number that is impossible: names the field, the rule, the value and the remedy."""

    def __init__(self, field: str, rule: str, value: object, remedy: str) -> None:
        super().__init__(field, rule, value, remedy)
        self.field = field
        self.rule = rule
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}, got {self.value!r}; {self.remedy}"


class WeightsError(ModelConfigError):
    """Weights that do not belong to this model.

    ``value`` lists every name that is missing, unexpected or misshapen; the message lists the first of very many.
    """

    def __str__(self) -> str:
        assert isinstance(self.value, list)
        return f"{self.field}: {self.rule}, got {listed(self.value)}; {self.remedy}"


def listed(faults: Sequence[str]) -> str:
    """Faults in one line of bounded length: all, or the first ``MOST_LISTED`` of each kind and how many more there are.

    So a thousand names that are missing do not hide the one that is unexpected.
    """
    kinds: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
    for fault in faults:
        kinds.get(fault.partition(" ")[0], kinds["misshapen"]).append(fault)
    listed = []
    for kind, those in kinds.items():
        listed += [_shortened(fault) for fault in those[:MOST_LISTED]]
        listed += [f"and {len(those) - MOST_LISTED} more {kind}"] if len(those) > MOST_LISTED else []
    return "; ".join(listed)


def _shortened(text: str) -> str:
    """The beginning of a text that may come from a file of others, without characters that move a terminal's cursor."""
    begin = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return begin if begin.isprintable() else begin.encode("unicode_escape").decode()
