from __future__ import annotations

import pytest
import torch

from model.masking import draw_mask, flat_positions, gather_tokens, scatter_tokens, token_positions


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


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_tokens_of_a_patch_lie_inside_it_in_z_order(halvings: int) -> None:
    columns, side = 3, 2**halvings
    width = columns * side
    patches = torch.tensor([[0, 4, 5]])

    positions = token_positions(patches, columns, halvings).view(3, side * side)

    for patch, found in zip(patches[0].tolist(), positions, strict=True):
        row, column = found // width, found % width
        assert set(zip((row // side).tolist(), (column // side).tolist(), strict=True)) == {divmod(patch, columns)}
        assert found.unique().numel() == side * side
        offsets = zip((row % side).tolist(), (column % side).tolist(), strict=True)
        interleaved = [sum(((r >> bit & 1) * 2 + (c >> bit & 1)) << 2 * bit for bit in range(2)) for r, c in offsets]
        assert interleaved == list(range(side * side))


def test_gather_takes_back_what_scatter_laid_into_a_zero_map() -> None:
    tokens = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 7, 11], [3, 2, 1]])
    flat = flat_positions(positions, 12)

    laid = scatter_tokens(tokens, flat, (3, 4))

    assert laid.shape == (2, 3, 4, 5)
    assert torch.equal(laid[0, 1, 3], tokens[0, 1])
    assert (laid != 0).any(-1).sum() == 6
    assert torch.equal(gather_tokens(laid, flat), tokens)
