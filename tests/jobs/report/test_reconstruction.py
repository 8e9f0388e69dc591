import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jobs.recipe.recipe import Recipe
from jobs.report.reconstruction import (
    HIDDEN_GRAY,
    LEAST_WIDTH_PIXELS,
    MOST_WIDTH_PIXELS,
    Stage,
    draw_grid,
    reconstruct_panels,
    reconstruction_grid,
    spread_samples,
    write_reconstructions,
)
from jobs.run.directory import RunDirectory
from jobs.weights.file_statistics import IMAGENET
from model import ConvMAE, ConvMAEConfig
from model.masking import draw_mask
from model.noise import mask_noise
from model.pixels import patch_moments, patchify
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.load.dataset import Dataset
from pipeline.shard.manifest import Manifest
from pipeline.store.storage import Storage

STORAGE = Storage()
SHAPE = (32, 64)


def small(**changes: object) -> ConvMAEConfig:
    return ConvMAEConfig(**{"image_size": SHAPE, **changes})


def noisy_images(count: int) -> Tensor:
    """(count, 3, *SHAPE) uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *SHAPE), generator=generator, dtype=torch.uint8)


def noise_for(config: ConvMAEConfig, count: int) -> Tensor:
    rows, columns = config.noise_shape
    return mask_noise(3, 0, torch.arange(count), rows * columns, "cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(10):
        pixels = random.integers(0, 256, (40 + number, 70 - 2 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    url = str(tmp_path_factory.mktemp("data"))
    tasks = plan_shards(find_sources(STORAGE, str(folder)), Sharding(4))
    reports = [write_shard(STORAGE, url, task) for task in tasks]
    Manifest.of(tasks, reports, ()).save(STORAGE, url, [])
    return Dataset.open(STORAGE, url)


@pytest.mark.parametrize("masking", ["block", "random"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_exact_prediction_reproduces_the_original_within_rounding(
    monkeypatch: pytest.MonkeyPatch, masking: str, norm_pix: bool
) -> None:
    def exact(model: ConvMAE, images: Tensor, noise: Tensor) -> Tensor:
        patches = patchify(images)
        mean, deviation = patch_moments(patches)
        return (patches - mean) / deviation if model.config.norm_pix else patches

    monkeypatch.setattr(ConvMAE, "reconstruct", exact)
    config = small(masking=masking, norm_pix=norm_pix)

    panels = reconstruct_panels(ConvMAE(config).eval(), IMAGENET, noisy_images(3), noise_for(config, 3))

    assert (panels.reconstruction.int() - panels.original.int()).abs().max() <= 1


@pytest.mark.parametrize("masking", ["block", "random"])
def test_hidden_patches_are_gray_and_predicted_and_the_rest_is_original(
    monkeypatch: pytest.MonkeyPatch, masking: str
) -> None:
    bright = 1e3  # far beyond white in normalised units

    def glaring(model: ConvMAE, images: Tensor, noise: Tensor) -> Tensor:
        return torch.full_like(patchify(images), bright)

    monkeypatch.setattr(ConvMAE, "reconstruct", glaring)
    config = small(masking=masking, norm_pix=False)
    model, images, noise = ConvMAE(config).eval(), noisy_images(2), noise_for(config, 2)
    mask = draw_mask(noise, config.kept).mask.view(2, *config.noise_shape)
    side = SHAPE[0] // config.noise_shape[0]

    panels = reconstruct_panels(model, IMAGENET, images, noise)

    assert torch.equal(panels.original, images)
    for image in range(2):
        for row, column in np.ndindex(config.noise_shape):
            place = (image, slice(None), slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
            if mask[image, row, column]:
                assert (panels.masked[place] == HIDDEN_GRAY).all()
                assert (panels.reconstruction[place] == 255).all()
            else:
                assert torch.equal(panels.masked[place], images[place])
                assert torch.equal(panels.reconstruction[place], images[place])


def test_reconstruction_is_the_models_own_prediction() -> None:
    config = small(norm_pix=False)
    torch.manual_seed(0)
    first, second = ConvMAE(config).eval(), ConvMAE(config).eval()

    panels = [reconstruct_panels(model, IMAGENET, noisy_images(2), noise_for(config, 2)) for model in (first, second)]

    assert torch.equal(panels[0].masked, panels[1].masked)
    assert not torch.equal(panels[0].reconstruction, panels[1].reconstruction)


@pytest.mark.parametrize(("samples", "count"), [(1, 8), (8, 8), (9, 8), (10**9, 8)])
def test_samples_are_distinct_spread_and_decided_by_the_seed(samples: int, count: int) -> None:
    chosen = spread_samples(samples, count, seed=5)

    assert len(set(chosen)) == len(chosen) == min(samples, count)
    parts = [sample * len(chosen) // samples for sample in chosen]
    assert all(0 <= sample < samples for sample in chosen)
    assert all(abs(part - place) <= 1 for place, part in enumerate(parts))
    assert chosen == spread_samples(samples, count, seed=5)
    assert samples < 10**9 or chosen != spread_samples(samples, count, seed=6)


@pytest.mark.parametrize(("height", "width", "count"), [(32, 64, 1), (32, 32, 8), (224, 224, 8), (512, 256, 8)])
def test_picture_is_readable_whatever_the_image_size(height: int, width: int, count: int) -> None:
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)

    picture = draw_grid([("a row", images)] * 3)

    gaps = 8 * (count + 1)
    assert LEAST_WIDTH_PIXELS <= picture.width <= MOST_WIDTH_PIXELS + gaps
    assert picture.height >= 3 * height * (picture.width - gaps) // (count * width)


def test_grid_shows_each_row_pixel_by_pixel() -> None:
    images = noisy_images(8)
    rows = [images, 255 - images, images // 2, images // 3]

    picture = np.asarray(draw_grid([(f"row {number}", row) for number, row in enumerate(rows)]))

    factor = 2  # 8 images of 64 pixels: the smallest whole factor that reaches LEAST_WIDTH_PIXELS
    cell_height, cell_width = SHAPE[0] * factor, SHAPE[1] * factor
    row_height = picture.shape[0] // len(rows)
    for row, shown in enumerate(rows):
        for column in range(8):
            bottom = (row + 1) * row_height - 8
            left = 8 + column * (cell_width + 8)
            cell = picture[bottom - cell_height : bottom, left : left + cell_width][::factor, ::factor]
            np.testing.assert_array_equal(cell, shown[column].permute(1, 2, 0))


@pytest.mark.parametrize("masking", ["block", "random"])
def test_same_run_gives_the_same_picture_bytes(tmp_path: Path, dataset: Dataset, masking: str) -> None:
    recipe = Recipe(
        name="small",
        model=small(masking=masking),
        epochs=2,
        warmup_epochs=1.0,
        global_batch_size=2,
        micro_batch_size=2,
        lanes=1,
        checkpoint_every_steps=1,
        seed=4,
    )
    run = RunDirectory.of(STORAGE, str(tmp_path), "run")
    run.claim(recipe)
    torch.manual_seed(0)
    stages = [Stage("untrained", ConvMAE(recipe.model).state_dict())]

    url = write_reconstructions(run, stages, dataset)
    first = STORAGE.read(url)
    write_reconstructions(run, stages, dataset)

    assert url == run.path("reconstructions.png")
    assert STORAGE.read(url) == first
    assert (
        Image.open(io.BytesIO(first)).size
        == reconstruction_grid(recipe.model, recipe.statistics, stages, dataset, seed=4).size
    )


def test_seed_changes_the_picture_and_few_samples_make_fewer_columns(dataset: Dataset) -> None:
    config = small()
    stages = [Stage("untrained", ConvMAE(config).state_dict())]

    pictures = [reconstruction_grid(config, IMAGENET, stages, dataset, seed=seed, count=4).tobytes() for seed in (0, 1)]
    wide = reconstruction_grid(config, IMAGENET, stages, dataset, seed=0, count=99)

    assert pictures[0] != pictures[1]
    assert (wide.width - 8) % dataset.samples == 0


def test_each_stage_has_a_row_below_the_same_images_and_masks(dataset: Dataset) -> None:
    config = small(norm_pix=False)
    torch.manual_seed(0)
    stages = [Stage(f"after {epoch} epochs", ConvMAE(config).state_dict()) for epoch in (1, 2)]

    both = np.asarray(reconstruction_grid(config, IMAGENET, iter(stages), dataset, seed=0))

    row_height = both.shape[0] // 4
    for number, stage in enumerate(stages):
        alone = np.asarray(reconstruction_grid(config, IMAGENET, [stage], dataset, seed=0))
        np.testing.assert_array_equal(both[: 2 * row_height], alone[: 2 * row_height])
        np.testing.assert_array_equal(both[(2 + number) * row_height :][:row_height], alone[2 * row_height :])
    assert (both[2 * row_height : 3 * row_height] != both[3 * row_height :]).any()
