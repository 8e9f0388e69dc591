"""DeepSpeed's engine, and the one place for its configuration: recipe in, engine out.

The same lines build the engine on CPU (gloo) and on GPU (NCCL); only the device differs.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.checkpoint.deepspeed_internals import (
    OVERFLOW_LOOKED_FOR,
    check_deepspeed,
    check_engine,
    overflow_looked_for,
    reduced_gradients,
    use_no_kernels,
)
from jobs.recipe.recipe import Recipe
from jobs.step.elementwise_adamw import ElementwiseAdamW
from jobs.step.flat_momentum import FlatMomentum
from model import Classifier, ConvMAE
from model.layer_decay import layer_scales

if TYPE_CHECKING:
    import deepspeed

ADAM_BETAS = (0.9, 0.95)
"""Of AdamW in pretraining (arXiv:2205.03892, appendix; as MAE)."""
FINETUNE_BETAS = (0.9, 0.999)
"""Of AdamW in fine-tuning: PyTorch's, which main_finetune.py leaves as they are."""
LEARNING_RATE_SCALE = "lr_scale"
"""Key of a parameter group: the factor of its learning rate."""


def initialize_deepspeed(device: str) -> None:
    """Attach DeepSpeed to the process group that Ray Train has opened. Once per worker process, before `build_engine`.

    Args:
        device: `cpu` or `cuda`; DeepSpeed would guess, and warn that it did.

    DeepSpeed compiles its own kernels when it finds a compiler, for minutes, and fails without ninja; torch's AdamW
    and collectives serve as well here, so it is made to believe that there are none.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed

    check_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    use_no_kernels()
    deepspeed.init_distributed()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line says what we do not know: ElementwiseAdamW is untested by DeepSpeed, not by us."""
    return "untested optimizer" not in record.getMessage()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices and kernels; none on biases, norms, tokens and positions."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in trained if parameter.ndim <= 1 or name.endswith(("token", "pos_embed"))]
    plain_ids = {id(parameter) for parameter in plain}
    decayed = [parameter for _, parameter in trained if id(parameter) not in plain_ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def optimizer_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of the recipe's optimizer: of a fine-tuning also by the factor of their learning rate."""
    part = recipe.finetune
    if part is None:
        return parameter_groups(model, recipe.weight_decay)
    assert isinstance(model, Classifier)
    if part.kind == "linear":
        trusts = part.optimizer == "lars"
        return [
            {"params": [value], "weight_decay": decay, "trusted_elements": value.numel() if trusts and decays else 0}
            for value in model.parameters()
            if value.requires_grad
            for decays in [value.ndim > 1]
            for decay in [recipe.weight_decay if decays else 0.0]
        ]
    scales, named = layer_scales(model, part.layer_decay), dict(model.named_parameters())
    decaying, _ = ({id(value) for value in group["params"]} for group in parameter_groups(model, recipe.weight_decay))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, scale in scales.items():
        decay = recipe.weight_decay if id(named[name]) in decaying else 0.0
        empty = {"params": [], "weight_decay": decay, LEARNING_RATE_SCALE: scale}
        groups.setdefault((scale, decay), empty)["params"].append(named[name])
    return list(groups.values())


def build_model(recipe: Recipe) -> ConvMAE | Classifier:
    """The recipe's model, freshly initialised from its seed; recomputed and compiled as it says."""
    torch.manual_seed(recipe.seed)
    model: ConvMAE | Classifier
    if recipe.finetune:
        part, stages = recipe.finetune, tuple(stage for stage in recipe.recompute if stage != "decoder")
        model = Classifier(recipe.model, len(part.classes), kind=part.kind, drop_path=part.drop_path, recompute=stages)
    else:
        sizes = [each.model.image_shape for each in recipe.resolutions]
        model = ConvMAE(recipe.model, recompute=recipe.recompute, other_sizes=sizes)
    if recipe.compile:
        model.compile()
    return model


def forget_compiled() -> None:
    """Have what is compiled be compiled anew, as in a process that has just started.

    For images of another size. Else PyTorch would compile for any size, by other kernels, which may compute other bits,
    than in a rank that begins with this size.
    """
    torch.compiler.reset()


def build_engine(
    model: nn.Module, recipe: Recipe, *, micro_batches_per_step: int = 1, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` for ZeRO training. Every rank must call it, after `initialize_deepspeed`.

    The engine divides each micro-batch's loss by `micro_batches_per_step` and averages gradients over ranks; the
    caller weights losses so that the result is the mean over the global batch. Where gradients are exact it is given
    their sum instead, once a step, clipped already.
    """
    import deepspeed

    optimizer = _optimizer(model, recipe)
    config = {
        # Only the ratio of these three matters to DeepSpeed: micro-batches of unequal size are ours to weight.
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_step,
        "train_batch_size": recipe.micro_batch_size * micro_batches_per_step * world_size,
        "gradient_clipping": 0.0 if recipe.is_exact else recipe.clip_grad_norm,
        "zero_optimization": {"stage": recipe.zero_stage},
        "zero_allow_untested_optimizer": True,
        # Whether gradients are finite is looked at before a step, so that ranks agree on what to do if they are not.
        "bf16": {"enabled": recipe.precision == "bf16_pure", OVERFLOW_LOOKED_FOR: False},
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    check_engine(engine)
    return engine


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups, part = optimizer_groups(model, recipe), recipe.finetune
    if part and part.optimizer != "adamw":
        return FlatMomentum(groups, recipe.learning_rate)
    for group in groups:
        group.pop("trusted_elements", None)
    adamw = ElementwiseAdamW if recipe.is_exact else torch.optim.AdamW
    return adamw(groups, lr=recipe.learning_rate, betas=FINETUNE_BETAS if part else ADAM_BETAS, fused=True)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    """Learning rate of the next update, in every parameter group by its factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get(LEARNING_RATE_SCALE, 1.0)


def has_finite_gradients(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """() bool, on the device: whether this rank's share of the step's reduced gradients has no NaN and no infinity.

    Call after the last `backward` of a step. A gradient that was not finite on any rank is so in somebody's share.
    """
    gradients = reduced_gradients(engine)
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=engine.device)
    return nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite()


def discard_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """End a step, in place of `engine.step()`, without an update. Every rank must call it for the same step.

    Weights, moments and AdamW's step count stay as they are, bit by bit; gradients are forgotten. It is DeepSpeed's own
    path for gradients that overflow, which each ZeRO stage has: a gradient of NaN leads there.
    """
    for gradient in reduced_gradients(engine):
        gradient.view(-1)[:1].fill_(math.nan)
    with overflow_looked_for(engine):
        engine.step()
    assert not engine.was_step_applied()
