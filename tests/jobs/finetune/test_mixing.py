"""Mixup, CutMix, smoothing and erasing: what they make of images, and what their draws depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.finetune.erasing import erased, erased_boxes
from jobs.finetune.mixing import Mix, Mixing, mixed, smoothed

SHAPE = (24, 32)


def images(count: int) -> torch.Tensor:
    """Each of one value: its place."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, *SHAPE)


def test_mixup_adds_the_group_in_reverse() -> None:
    targets = smoothed(torch.tensor([0, 1, 2]), 4, 0.1)
    assert targets[1].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])

    found, mixed_targets = mixed(images(3), targets, Mix(0.75, None))

    assert [image.unique().tolist() for image in found] == [[0.5], [1.0], [1.5]]
    assert mixed_targets[0].tolist() == pytest.approx(
        [0.75 * 0.925 + 0.25 * 0.025, 0.025, 0.25 * 0.925 + 0.75 * 0.025, 0.025]
    )
    assert mixed_targets.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_cutmix_counts_what_the_box_covers() -> None:
    given = images(2)
    for first in range(200):
        mix = Mixing(0.0, 1.0).drawn(7, 0, first, SHAPE)
        found, targets = mixed(given, torch.eye(2), mix)
        own = (found[0] == 0).float().mean().item()
        assert mix.share == pytest.approx(own)
        assert targets[0].tolist() == pytest.approx([own, 1 - own], abs=1e-6)
    assert given[0].unique().tolist() == [0.0], "the group itself is left as it was"


def test_shares_are_drawn_from_the_beta_distribution_and_kinds_by_a_fair_coin() -> None:
    drawn = [Mixing(0.8, 1.0).drawn(1, 0, first, SHAPE) for first in range(4000)]
    shares = np.array([mix.share for mix in drawn if mix.box is None])

    assert len(shares) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)  # of Beta(a, a)
    assert all(mix.box is None for mix in (Mixing(0.8, 0.0).drawn(1, 0, first, SHAPE) for first in range(50)))
    assert Mixing(0.0, 0.0).drawn(1, 0, 5, SHAPE) == Mix(1.0, None)


def test_a_mix_follows_from_seed_epoch_and_the_first_sample() -> None:
    mixing = Mixing(0.8, 1.0)
    assert mixing.drawn(1, 2, 3, SHAPE) == mixing.drawn(1, 2, 3, SHAPE)
    assert len({mixing.drawn(*draw, SHAPE).share for draw in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


def test_a_quarter_of_the_images_loses_a_rectangle_within_the_published_ranges() -> None:
    boxes = erased_boxes(3, 0, np.arange(4000), 0.25, (224, 224))
    found = np.array([box for box in boxes if box], float)
    height, width = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]

    assert len(found) / 4000 == pytest.approx(0.25, abs=0.02)
    share, aspect = height * width / 224**2, height / width
    assert share.min() > 0.019 and share.max() < 0.34
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, rel=0.08)
    assert aspect.min() > 0.28 and aspect.max() < 3.5
    assert np.log(aspect).mean() == pytest.approx(0.0, abs=0.07)


def test_what_is_erased_does_not_depend_on_the_batch_and_is_normal_noise() -> None:
    ids = torch.arange(40)
    plain = torch.full((40, 3, 64, 64), 9.0)

    together = erased(plain, 3, 1, ids, 0.5)
    alone = torch.cat([erased(plain[place : place + 1], 3, 1, ids[place : place + 1], 0.5) for place in range(40)])

    assert torch.equal(together, alone)
    noise = together[together != 9.0]
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert plain.unique().tolist() == [9.0]
    assert erased(plain, 3, 1, ids, 0.0) is plain
