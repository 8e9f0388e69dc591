from __future__ import annotations

import pytest
import torch

from model.masking import draw_mask


@pytest.mark.parametrize("kept", [1, 6, 12, 23])
def test_the_smallest_noise_stays_visible(kept: int) -> None:
    noise = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))

    mask = draw_mask(noise, kept)

    for row in range(4):
        assert noise[row, mask.kept[row]].max() < noise[row, mask.hidden[row]].min()
        assert mask.mask[row, mask.kept[row]].sum() == 0
        assert mask.mask[row, mask.hidden[row]].sum() == 24 - kept
        assert torch.cat([mask.kept[row], mask.hidden[row]]).sort().values.tolist() == list(range(24))
    assert torch.equal(mask.kept, mask.kept.sort(dim=1).values)


def test_equal_noise_is_decided_by_position() -> None:
    noise = torch.tensor([[0.5, 0.5, 0.25, 0.5, 0.5, 0.25]])

    assert draw_mask(noise, 4).kept.tolist() == [[0, 1, 2, 5]]
