"""The largest micro-batch that fits: by a line through sizes that were tried, and by real passes of models."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from jobs.errors import RecipeError
from jobs.rank import micro_batch
from jobs.rank.micro_batch import fitted, largest_micro_batch
from jobs.recipe.named_recipes import named_recipe

MB = 10**6


class Device:
    """Takes `once` bytes, and `each` for an image; notes the sizes that were tried."""

    def __init__(self, once: int, each: int, bends_at: int = 10**9) -> None:
        self._once, self._each, self._bends_at = once, each, bends_at
        self.tried: list[int] = []

    def __call__(self, images: int) -> int:
        self.tried.append(images)
        return self._once + self._each * (images + 10 * max(0, images - self._bends_at))


@pytest.mark.parametrize(("limit", "images"), [(1000, 90), (199, 9), (110, 1), (4000, 256)])
def test_the_line_leads_to_the_most_that_fit(limit: int, images: int) -> None:
    device = Device(once=100, each=10)

    found = fitted(device, limit, least=1, most=256, tries_result=False)

    assert found.images == images
    assert max(trial.bytes for trial in found.trials) <= limit or len(found.trials) < 3, (
        "nothing beyond the limit is tried"
    )


def test_where_one_does_not_fit_there_are_none() -> None:
    assert fitted(Device(100, 10), 105, least=1, most=64, tries_result=False).images == 0


def test_a_result_that_does_not_fit_is_made_smaller_where_it_is_tried() -> None:
    device = Device(once=0, each=10, bends_at=80)

    found = fitted(device, 1000, least=1, most=256, tries_result=True)

    assert 70 < found.images <= 82
    assert found.trials[-1].bytes <= 1000


def test_slow_sizes_are_not_doubled_on() -> None:
    times = iter(range(0, 100_000, 15))
    device = Device(once=0, each=10)

    found = fitted(device, 10_000, least=1, most=512, tries_result=False, clock=lambda: next(times) * 2.0)

    assert [trial.images for trial in found.trials] == [1, 2]
    assert found.images == 512, "the line is enough"


@pytest.mark.parametrize("name", ["tiny", "gray", "gray of 16 bits", "tiny_finetune", "tiny_linear"])
def test_real_passes_take_more_for_more_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = named_recipe("tiny" if name.startswith("gray") else name)
    if name.startswith("gray"):
        bits = 16 if name.endswith("16 bits") else 8
        gray = {"model.in_channels": 1, "image_mean": [0.4], "image_std": [0.2], "image_bits": bits}
        recipe = recipe.amended(gray)
    recipe = recipe.amended({"micro_batch_size": "auto", "global_batch_size": 64, "min_workers": 1})
    if recipe.finetune:
        recipe = recipe.amended({"finetune.classes": ["ant", "bee"]})
    monkeypatch.setattr(micro_batch, "free_memory_bytes", lambda: 2000 * MB)

    found = largest_micro_batch(recipe, ranks_here=2)

    sizes = [trial.images for trial in found.trials]
    assert sizes == sorted(set(sizes))
    # Of a linear head nothing is kept for a backward pass, and what earlier tests gave back may be enough.
    assert name == "tiny_linear" or found.trials[-1].bytes > found.trials[0].bytes
    assert found.limit_bytes < 600 * MB
    assert 1 <= found.images <= 64


def found_with(free: int) -> int:
    """Runs in a process of its own, as the search does: memory that was given back is not measured again."""
    fields = {"micro_batch_size": "auto", "global_batch_size": 4096, "lanes": 64, "min_workers": 1}
    micro_batch.free_memory_bytes = lambda: free
    return largest_micro_batch(named_recipe("tiny").amended(fields), ranks_here=1).images


def test_half_the_memory_takes_half_the_images() -> None:
    found = []
    for free in (1600 * MB, 800 * MB):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(found_with, free).result())

    assert 1.5 < found[0] / found[1] < 3


def test_a_model_that_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_memory_bytes", lambda: 10 * MB)

    with pytest.raises(RecipeError, match="micro_batch_size: must leave room for 1 image at once"):
        largest_micro_batch(named_recipe("tiny").amended({"micro_batch_size": "auto"}), ranks_here=1)


def test_auto_is_zero_until_it_is_found() -> None:
    recipe = named_recipe("convmae_base").amended({"micro_batch_size": "auto", "grain_size": "auto"})

    assert (recipe.micro_batch_size, recipe.grain_size) == (0, 0)
    assert recipe.images_at_once == recipe.global_batch_size
    assert recipe.grain <= recipe.global_batch_size // 64
    assert recipe.amended({"micro_batch_size": 32}).grain == 32
