"""The only door to what DeepSpeed does not document: the inside of its files, engines and optimizers.

Imports neither torch nor DeepSpeed until it is given an engine. docs/private-api.md says what an upgrade may break.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.errors import DependencyError

if TYPE_CHECKING:
    import deepspeed
    from torch import Tensor

PINNED = "0.19.8"
"""The version in constraints.txt."""

MODEL_SUFFIX, OPTIMIZER_SUFFIX = "_model_states.pt", "_optim_states.pt"
"""Of the names of files."""
MASTERS_OF_STAGE_3, MASTERS = "fp32_flat_groups", "single_partition_of_fp32_groups"
"""In a file of optimizer states: where the fp32 masters are, in ZeRO 3 and else."""
STATE, INNER_STATE = "optimizer_state_dict", "base_optimizer_state"
"""The state of DeepSpeed's optimizer, and in it that of AdamW; in ZeRO 3 both have the first name."""
PADDINGS, RANKS = "param_alignment_paddings", "partition_count"
MODULE, SHAPES, ALIASES = "module", "param_shapes", "shared_params"
"""In a file of model states, like all that follow."""
FROZEN_SHAPES, FROZEN_FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"
CONFIG, TENSOR_PARALLEL_RANKS, EXPERTS = "ds_config", "mp_world_size", "num_experts"
OVERFLOW_LOOKED_FOR = "check_grad_overflow"
"""Of the configuration's part for bf16: whether every step does."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides its count of steps."""

_CONSTANTS: Mapping[str, str] = {
    "MODEL_FILE_SUFFIX": MODEL_SUFFIX,
    "OPTIM_FILE_SUFFIX": OPTIMIZER_SUFFIX,
    "FP32_FLAT_GROUPS": MASTERS_OF_STAGE_3,
    "SINGLE_PARTITION_OF_FP32_GROUPS": MASTERS,
    "OPTIMIZER_STATE_DICT": STATE,
    "BASE_OPTIMIZER_STATE": INNER_STATE,
    "PARAM_ALIGNMENT_PADDINGS": PADDINGS,
    "PARTITION_COUNT": RANKS,
    "PARAM_SHAPES": SHAPES,
    "FROZEN_PARAM_SHAPES": FROZEN_SHAPES,
    "FROZEN_PARAM_FRAGMENTS": FROZEN_FRAGMENTS,
}
"""DeepSpeed's own names of ours, where it has any; it writes the other keys as literals."""
_OF_EVERY_OPTIMIZER = ("optimizer.state", "param_groups", "averaged_gradients")
_OF_STAGES_1_AND_2 = (
    "check_grad_overflow",
    "single_partition_of_fp32_groups",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "partition_size",
    "compute_grad_norm",
)
_OF_STAGE_3 = ("dp_process_group", "fp32_partitioned_groups_flat", "fp16_groups")
_OF_PARAMETERS_OF_STAGE_3 = ("ds_numel", "ds_shape", "ds_tensor.ds_numel")


class Piece(NamedTuple):
    """`length` values of parameter `name` from `start` on, which lie at `offset` of a rank's flat vector."""

    name: str
    start: int
    length: int
    offset: int


def check_deepspeed() -> None:
    """Check that the installed DeepSpeed names what is in its files as is read here. Imports DeepSpeed.

    Raises:
        DependencyError: Names the first that it names otherwise, and both versions.
    """
    module = "deepspeed.checkpoint.constants"
    try:
        constants = importlib.import_module(module)
    except ImportError as error:
        raise DependencyError.missing("deepspeed", module, PINNED) from error
    for name, value in _CONSTANTS.items():
        if getattr(constants, name, None) != value:
            raise DependencyError.missing("deepspeed", f"{module}.{name} = {value!r}", PINNED)


def check_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Check that a fresh engine has all that is used of its inside.

    Raises:
        DependencyError: Names the first that is missing, and both versions.
    """
    stage = engine.zero_optimization_stage()
    for name in (*_OF_EVERY_OPTIMIZER, *(_OF_STAGE_3 if stage == 3 else _OF_STAGES_1_AND_2)):
        _check(engine.optimizer, name, f"optimizer.{name} in ZeRO {stage}")
    if stage == 3:
        parameter = next(iter(engine.module.parameters()))
        for name in _OF_PARAMETERS_OF_STAGE_3:
            _check(parameter, name, f"{name} of parameters in ZeRO 3")


def _check(owner: Any, names: str, what: str) -> None:
    for name in names.split("."):
        try:
            owner = getattr(owner, name)
        except AttributeError as error:
            raise DependencyError.missing("deepspeed", what, PINNED) from error


def use_no_kernels() -> None:
    """Have DeepSpeed believe that it can compile none of its own kernels; it would try for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def reduced_gradients(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """This rank's share of the step's gradients, between the last `backward` of a step and its `step`."""
    by_group = engine.optimizer.averaged_gradients.values()
    return [gradient for group in by_group if group is not None for gradient in group if gradient.numel()]


@contextlib.contextmanager
def overflow_looked_for(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """While active, a step looks for gradients that are not finite, at the price of a collective.

    ZeRO 1 and 2 do so in bf16 only if told to, ZeRO 3 always.
    """
    optimizer = engine.optimizer
    looked, optimizer.check_grad_overflow = getattr(optimizer, "check_grad_overflow", False), True
    try:
        yield
    finally:
        optimizer.check_grad_overflow = looked


def parameter_groups_in_order(engine: deepspeed.DeepSpeedEngine) -> list[tuple[int, list[Tensor]]]:
    """How ZeRO 1 and 2 cut up gradients: for each group, the elements that every rank owns, and its parameters.

    A group is its parameters in turn, filled up with zeros, and cut into as many parts as there are ranks.
    """
    optimizer = engine.optimizer
    sizes = map(int, optimizer.partition_size)
    return list(zip(sizes, map(list, optimizer.round_robin_bit16_groups), strict=True))


def give_gradients(engine: deepspeed.DeepSpeedEngine, partitions: Sequence[Tensor]) -> None:
    """Have the next step of ZeRO 1 or 2 update by these: for each group, what this rank owns, as a flat vector."""
    optimizer = engine.optimizer
    optimizer.compute_grad_norm = False  # who gives them has their norm, and has clipped them
    for index, partition in enumerate(partitions):
        optimizer.averaged_gradients[index] = [partition]


def owned_slices(engine: deepspeed.DeepSpeedEngine) -> list[tuple[Tensor, list[Piece]]]:
    """The flat fp32 vectors that this rank updates, and of which parameters' values each is made."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    cut = _slices_of_parameters if engine.zero_optimization_stage() == 3 else _slices_of_groups
    return list(cut(engine.optimizer, names))


def trained_parameters(engine: deepspeed.DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the optimizer updates, by name, in the order in which its groups have them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    is_stage_3 = engine.zero_optimization_stage() == 3
    groups = engine.optimizer.fp16_groups if is_stage_3 else engine.optimizer.round_robin_bit16_groups
    return {names[id(parameter)]: whole_shape(parameter) for group in groups for parameter in group}


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has dealt it out."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def frozen_values(parameter: Any, rank: int) -> tuple[int, Tensor]:
    """This rank's values of a parameter that is not trained, flat, and the number of the first.

    ZeRO 3 deals them out as those that are trained; otherwise all ranks have all, and they count as the first rank's.
    """
    if not hasattr(parameter, "ds_tensor"):
        flat: Tensor = parameter.detach().contiguous().reshape(-1)
        return 0, flat if rank == 0 else flat[:0]
    share = parameter.ds_tensor.ds_numel
    start = min(rank * share, parameter.ds_numel)
    return start, parameter.ds_tensor.detach()[: min(share, parameter.ds_numel - start)]


def adam_slots(engine: deepspeed.DeepSpeedEngine, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's own state of a flat vector, to be changed in place."""
    slots: dict[str, Tensor] = engine.optimizer.optimizer.state[flat]
    return slots


def _slices_of_groups(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[Tensor, list[Piece]]]:
    """ZeRO 1 and 2: this rank's range of each group, as pieces of parameters."""
    import torch.distributed as dist

    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[index])
        begin, pieces, position = rank * flat.numel(), [], 0
        for parameter in optimizer.round_robin_bit16_groups[index]:
            low, high = max(begin, position), min(begin + flat.numel(), position + parameter.numel())
            if low < high:
                pieces.append(Piece(names[id(parameter)], low - position, high - low, low - begin))
            position += parameter.numel()
        yield flat, pieces


def _slices_of_parameters(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[Tensor, list[Piece]]]:
    """ZeRO 3: this rank's range of each parameter."""
    import torch.distributed as dist

    rank = dist.get_rank(optimizer.dp_process_group)
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces, offset = [], 0
        for parameter in parameters:
            share = parameter.ds_tensor.ds_numel
            length = max(0, min(share, parameter.ds_numel - rank * share))
            if length:
                pieces.append(Piece(names[id(parameter)], rank * share, length, offset))
            offset += share
        yield flat, pieces
