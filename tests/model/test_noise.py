from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import mask_noise
from model.masking import draw_mask
from model.noise import philox

IDS = torch.arange(1000, 1512)


def noise(seed: int = 7, epoch: int = 3, ids: Tensor = IDS, draws: int = 196) -> Tensor:
    return mask_noise(seed, epoch, ids, draws, "cpu")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor(int(word, 16)) for word in counter.split()]
    key0, key1 = (int(word, 16) for word in key.split())

    result = philox((words[0], words[1], words[2], words[3]), (key0, key1))

    assert " ".join(f"{word.item():08x}" for word in result) == expected


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))

    assert torch.equal(noise(ids=IDS[order]), noise()[order])
    assert torch.equal(noise(ids=IDS[5:6]), noise()[5:6])


@pytest.mark.parametrize("draws", [1, 3, 24, 196, 3136])
def test_more_draws_extend_fewer(draws: int) -> None:
    assert noise(draws=draws).shape == (len(IDS), draws)
    assert torch.equal(noise(draws=draws), noise(draws=3140)[:, :draws])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + 2**40},
        {"epoch": 4},
        {"ids": IDS + len(IDS)},
        {"ids": IDS + 2**32},
        {"seed": 3, "epoch": 7},
    ],
    ids=str,
)
def test_noise_is_unrelated_when_seed_epoch_or_sample_differs(other: dict[str, int]) -> None:
    a, b = noise(), noise(**other)  # type: ignore[arg-type]

    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()

    assert (a == b).float().mean() < 1e-4
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_neighbouring_patches_and_samples_are_uncorrelated() -> None:
    values = noise(draws=200)
    bound = 5 / values.numel() ** 0.5

    for lag in (1, 2, 3, 4, 14):
        for a, b in ((values[:, lag:], values[:, :-lag]), (values[lag:], values[:-lag])):
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
            assert abs(correlation) < bound, lag


def test_noise_is_uniform_in_24_bits() -> None:
    values = noise(draws=1024)
    bins = 256

    counts = torch.histc(values, bins=bins, min=0, max=1)
    expected = values.numel() / bins
    chi_square = ((counts - expected) ** 2 / expected).sum().item()

    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round())
    assert abs(chi_square - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5


def test_every_patch_is_kept_equally_often_and_masks_overlap_by_chance() -> None:
    kept, draws, samples = 49, 196, 4096
    visible = 1 - draw_mask(noise(ids=torch.arange(samples)), kept).mask

    ratio = kept / draws
    often = visible.mean(0)
    overlap = (visible[1:] * visible[:-1]).sum(1).mean().item()

    assert (often - ratio).abs().max() < 5 * (ratio * (1 - ratio) / samples) ** 0.5
    assert overlap == pytest.approx(kept * ratio, rel=0.02)


def test_noise_is_computed_where_it_is_asked_for() -> None:
    assert mask_noise(0, 0, IDS.to("meta"), 196, "meta").is_meta


def test_sample_ids_may_be_of_any_integer_type() -> None:
    assert torch.equal(noise(ids=IDS.to(torch.int32)), noise())
