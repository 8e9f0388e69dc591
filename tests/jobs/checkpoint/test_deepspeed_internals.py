"""The door to DeepSpeed's insides: what is missing is named in one line, and nobody passes by the door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.checkpoint.constants
import pytest

import jobs
from jobs.checkpoint.deepspeed_internals import PINNED, check_deepspeed, check_engine
from jobs.errors import DependencyError

PROJECT = Path(jobs.__file__).parent.parent
DOOR = PROJECT / "jobs/checkpoint/deepspeed_internals.py"
PRIVATE_WORDS = frozenset(
    {
        *("averaged_gradients", "check_grad_overflow", "single_partition_of_fp32_groups", "real_dp_process_group"),
        *("round_robin_bit16_groups", "dp_process_group", "fp32_partitioned_groups_flat", "fp16_groups"),
        *("ds_numel", "ds_tensor", "__compatible_ops__", "fp32_flat_groups", "base_optimizer_state"),
        *("optimizer_state_dict", "partition_count", "param_shapes", "param_alignment_paddings", "mp_world_size"),
        *("frozen_param_shapes", "frozen_param_fragments", "shared_params", "num_experts", "ds_config"),
        *("_model_states.pt", "_optim_states.pt", "partition_size", "compute_grad_norm"),
    }
)
"""Attributes of engines, optimizers and parameters, and keys and names of files."""


def engine(stage: int, **other: Any) -> Any:
    """As far as it is looked at."""
    every = {"optimizer": SimpleNamespace(state={}), "param_groups": [], "averaged_gradients": {}}
    two = dict.fromkeys(
        (
            *("check_grad_overflow", "single_partition_of_fp32_groups"),
            *("real_dp_process_group", "round_robin_bit16_groups", "partition_size", "compute_grad_norm"),
        )
    )
    three = dict.fromkeys(("dp_process_group", "fp32_partitioned_groups_flat", "fp16_groups"))
    parameter = SimpleNamespace(ds_numel=1, ds_shape=(1,), ds_tensor=SimpleNamespace(ds_numel=1))
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        module=SimpleNamespace(parameters=lambda: iter([other.get("parameter", parameter)])),
        optimizer=SimpleNamespace(**every, **(three if stage == 3 else two)),
    )


def test_the_pinned_version_is_that_of_the_constraints() -> None:
    assert f"\ndeepspeed=={PINNED}\n" in (PROJECT / "constraints.txt").read_text()


def test_a_key_of_the_files_that_is_another_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check_deepspeed()
    monkeypatch.setattr(deepspeed.checkpoint.constants, "PARTITION_COUNT", "partitions")

    with pytest.raises(DependencyError) as caught:
        check_deepspeed()

    assert str(caught.value) == (
        f"deepspeed: must have deepspeed.checkpoint.constants.PARTITION_COUNT = 'partition_count', as version {PINNED} "
        f"has, got {version('deepspeed')!r}; install the pinned version: pip install -c constraints.txt deepspeed"
    )


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *((stage, name) for stage in (1, 2, 3) for name in ("averaged_gradients", "param_groups")),
        *((stage, name) for stage in (1, 2) for name in ("check_grad_overflow", "round_robin_bit16_groups")),
        *((stage, name) for stage in (1, 2) for name in ("single_partition_of_fp32_groups", "real_dp_process_group")),
        *((stage, name) for stage in (1, 2) for name in ("partition_size", "compute_grad_norm")),
        *((3, name) for name in ("dp_process_group", "fp32_partitioned_groups_flat", "fp16_groups")),
    ],
)
def test_what_an_engine_lacks_is_named(stage: int, name: str) -> None:
    whole = engine(stage)
    check_engine(whole)
    delattr(whole.optimizer, name)

    with pytest.raises(DependencyError, match=rf"^deepspeed: must have optimizer\.{name} in ZeRO {stage}, as version"):
        check_engine(whole)


def test_what_a_parameter_lacks_is_named() -> None:
    parameter = SimpleNamespace(ds_numel=1, ds_shape=(1,), ds_tensor=SimpleNamespace())

    with pytest.raises(DependencyError, match=r"must have ds_tensor\.ds_numel of parameters in ZeRO 3, as version"):
        check_engine(engine(3, parameter=parameter))


def test_only_the_door_knows_what_deepspeed_does_not_document() -> None:
    files = [path for path in (PROJECT / "jobs").rglob("*.py") if path != DOOR]
    assert len(files) > 90

    found = [f"{path.relative_to(PROJECT)}: {word}" for path in files for word in undocumented(path.read_text())]

    assert found == []


def test_a_way_past_the_door_is_found() -> None:
    for source in (
        "engine.optimizer.averaged_gradients",
        "state['param_shapes']",
        "import deepspeed.runtime.zero.stage3",
        "from deepspeed.checkpoint import constants",
        "from deepspeed.checkpoint.constants import PARAM_SHAPES",
    ):
        assert list(undocumented(source)), source
    assert not list(undocumented("import deepspeed\nengine, *_ = deepspeed.initialize()\nengine.step()"))


def undocumented(source: str) -> Iterator[str]:
    """What a file uses of DeepSpeed's insides."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE_WORDS:
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_WORDS:
            yield str(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("deepspeed."))
