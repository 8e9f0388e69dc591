"""The recipes by name.

Paper: Gao et al. 2022, "ConvMAE: Masked Convolution Meets Masked Autoencoders", arXiv:2205.03892.
Widths and depths are in `model.config`; this is how they are trained. The hyperparameters of the ImageNet recipes are
the paper's (section 4.1 and appendix): AdamW (0.9, 0.95), weight decay 0.05, base learning rate 1.5e-4 per 256 images,
global batch 4096 over 40 epochs of warm-up and a half-cosine, mask ratio 75 %.

| recipe                | loss                    | epochs          | top-1 after fine-tuning (paper, ConvMAE-Base) |
|-----------------------|-------------------------|-----------------|-----------------------------------------------|
| convmae_base          | L1 on pixels            | 1600            | 85.0 %                                        |
| convmae_base_official | MSE, normalised pixels  | 1600            | as released                                   |
| convmae_base_<E>      | L1 on pixels            | 200 / 400 / 800 | lower with fewer epochs (the epoch ablation)  |
| convmae_<size>        | L1 on pixels            | 1600            |                                               |
| fastconvmae_base      | MSE, normalised pixels  | 50              | 84.4 % (FastConvMAE, four views of an image)  |
| mae_base              | MSE, normalised pixels  | 1600            | 83.6 % (MAE-Base, the baseline)               |
| tiny                  | L1, normalised pixels   | 40              | the demonstration: minutes on two CPU cores   |

Submit one with `convmae submit convmae_base data=s3://bucket/imagenet run_root=s3://bucket/runs max_workers=64`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from jobs.errors import RecipeError
from jobs.recipe.finetune import Finetune
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.recipe.recipe import PARTS, Recipe, unknown_key
from model import ConvMAEConfig

LARGEST_FILE_BYTES = 16384
"""Of a recipe's file; only larger ones take long or much memory to parse."""
SIZES = ("small", "base", "large", "huge")
SHORTER_EPOCHS = (200, 400, 800)


def _imagenet(name: str, size: str, **fields: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "model": ConvMAEConfig.preset(size, loss="l1", norm_pix=False),
        # As published; those of another data set are `image_mean=[] image_std=[]`.
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "epochs": 1600,
        "global_batch_size": 4096,
        "micro_batch_size": 64,
        "lanes": 256,
        "max_workers": 64,
        "checkpoint_every_steps": 500,
    }
    return Recipe(**(values | fields))


def _tiny() -> Recipe:
    """Small enough for two CPU cores, large enough that it learns features: see docs/results.md."""
    return Recipe(
        name="tiny",
        model=ConvMAEConfig.preset("tiny", loss="l1", norm_pix=True),
        epochs=40,
        warmup_epochs=0.5,
        base_learning_rate=2e-3,
        global_batch_size=64,
        micro_batch_size=32,
        lanes=8,
        block_samples=8,
        window_blocks=8,
        precision="fp32",
        device="cpu",
        min_workers=1,
        max_workers=2,
        cpus_per_worker=0.25,
        loader_threads=1,
        checkpoint_every_steps=25,
        resize_seconds=5.0,
    )


def _complementary() -> Recipe:
    """FastConvMAE's: PRETRAIN.md, main_pretrain.py and README.md of github.com/Alpha-VL/FastConvMAE.

    There 8 GPUs have 64 images each. Here a micro-batch and a grain are 16 images, which with four views are as many
    masks as those of `convmae_base`.
    """
    return _imagenet(
        "fastconvmae_base",
        "base",
        model=ConvMAEConfig.preset("base", loss="mse", norm_pix=True, mask_ratio=0.75, views=4),
        epochs=50,
        warmup_epochs=10.0,
        base_learning_rate=6e-4,
        global_batch_size=512,
        micro_batch_size=16,
        lanes=32,
        max_workers=32,
        milestone_epochs=(),
    )


def _finetuning(name: str, model: ConvMAEConfig) -> Recipe:
    """The paper's: FINETUNE.md and main_finetune.py of github.com/Alpha-VL/ConvMAE."""
    return _imagenet(
        name,
        "base",
        model=model,
        finetune=Finetune(),
        epochs=100,
        warmup_epochs=5.0,
        base_learning_rate=5e-4,
        global_batch_size=1024,
        micro_batch_size=32,
        lanes=64,
        max_workers=32,
        milestone_epochs=(),
    )


def _probing(name: str, model: ConvMAEConfig, batch_size: int) -> Recipe:
    """Linear probing as main_linprobe.py of both has it; FINETUNE.md says the batch of ConvMAE's."""
    part = Finetune(
        kind="linear",
        optimizer="lars",
        randaugment_operations=0,
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        drop_path=0.0,
        layer_decay=1.0,
        min_learning_rate=0.0,
    )
    return _imagenet(
        name,
        "base",
        model=model,
        finetune=part,
        epochs=90,
        warmup_epochs=10.0,
        base_learning_rate=0.1,
        weight_decay=0.0,
        global_batch_size=batch_size,
        micro_batch_size=512,
        grain_size=batch_size // 32,
        lanes=32,
        max_workers=32,
        milestone_epochs=(),
    )


def _tiny_finetuning() -> Recipe:
    """For the encoders of `tiny`, on two CPU cores: the paper's, weaker in all that slows small models down."""
    part = Finetune(
        validation_ratio=0.2, validate_epochs=5, randaugment_magnitude=5.0, mixup=0.0, cutmix=0.0, drop_path=0.0
    )
    return _tiny().model_copy(
        update={"name": "tiny_finetune", "finetune": part, "warmup_epochs": 2.0, "base_learning_rate": 4e-3}
    )


def _tiny_probing() -> Recipe:
    """Linear probing of the encoders of `tiny`, on two CPU cores."""
    part = _probing("", ConvMAEConfig(), 4096).finetune
    assert part
    part = part.model_copy(update={"validation_ratio": 0.2, "validate_epochs": 5})
    return _tiny().model_copy(
        update={"name": "tiny_linear", "finetune": part, "warmup_epochs": 2.0, "base_learning_rate": 4.0}
        | {"weight_decay": 0.0}
    )


def _build() -> dict[str, Recipe]:
    recipes = [_tiny(), _tiny_finetuning(), _tiny_probing()]
    for size in SIZES:
        recipes.append(_imagenet(f"convmae_{size}", size))
    official = ConvMAEConfig.preset("base", loss="mse", norm_pix=True)
    recipes.append(_imagenet("convmae_base_official", "base", model=official))
    recipes.append(_complementary())
    baseline = ConvMAEConfig.preset("mae_base", loss="mse", norm_pix=True)
    recipes.append(_imagenet("mae_base", "base", model=baseline))
    plain = ConvMAEConfig.preset("base", loss="l1", norm_pix=False)
    recipes += [_finetuning("convmae_base_finetune", plain), _finetuning("mae_base_finetune", baseline)]
    recipes += [_probing("convmae_base_linear", plain, 4096), _probing("mae_base_linear", baseline, 16384)]
    for epochs in SHORTER_EPOCHS:
        recipes.append(_imagenet(f"convmae_base_{epochs}", "base", epochs=epochs))
    return {recipe.name: recipe for recipe in recipes}


def recipe_names() -> list[str]:
    """Every name that `named_recipe` takes."""
    return list(_build())


def named_recipe(name: str) -> Recipe:
    """The recipe of that name, or of a TOML file whose `base` names one and whose other keys change it.

    Raises:
        RecipeError: If there is no such recipe; names the nearest one.
    """
    if name.endswith(".toml"):
        return _file_recipe(Path(name))
    recipes = _build()
    if name not in recipes:
        fault = unknown_key(name, list(recipes))
        raise RecipeError("recipe", "must be the name of a recipe or a .toml file", name, fault.remedy)
    return recipes[name]


def file_fields(path: Path) -> dict[str, Any]:
    """The fields of a recipe's file, as they are written there.

    Raises:
        RecipeError: It is not a TOML file, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a path with a null byte is no path
        raise RecipeError("recipe", "must be a readable TOML file", str(path), str(error)) from error
    if len(data) > LARGEST_FILE_BYTES:
        remedy = "a recipe has a few dozen short lines"
        raise RecipeError("recipe", f"must be at most {LARGEST_FILE_BYTES} bytes", str(path), remedy)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))  # Windows editors may write a BOM first
    except (ValueError, RecursionError) as error:  # refused by TOML or Python: bytes, depth, digits
        raise RecipeError("recipe", "must be a readable TOML file", str(path), str(error)) from error


def _file_recipe(path: Path) -> Recipe:
    fields = file_fields(path)
    base = fields.pop("base", None)
    if not isinstance(base, str) or base.endswith(".toml"):
        raise RecipeError("base", "must name the recipe that the file changes", base, f"one of {', '.join(_build())}")
    for part in PARTS:
        if isinstance(fields.get(part), dict):
            fields |= {f"{part}.{key}": value for key, value in fields.pop(part).items()}
    return named_recipe(base).amended({"name": path.stem, **fields})
