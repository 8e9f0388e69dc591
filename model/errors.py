"""What can be wrong with what a user asks of the model: one small tree, readable as documentation."""

from __future__ import annotations


class ModelConfigError(ValueError):
    """A model, a batch or a number that cannot be: names the field, the rule, the value and the remedy."""

    def __init__(self, field: str, rule: str, value: object, remedy: str) -> None:
        super().__init__(field, rule, value, remedy)
        self.field = field
        self.rule = rule
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}, got {self.value!r}; {self.remedy}"


class WeightsError(ModelConfigError):
    """Weights that do not belong to this model; ``value`` lists every name that is missing, unexpected or misshapen."""
