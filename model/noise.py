"""Noise as a pure function of (seed, epoch, sample id, draw): no generator, no state, one value anywhere.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations, so that
a GPU and a CPU agree in every bit and an image's mask does not depend on the batch or the rank that it falls into.
Words of 32 bits are held in int64, and products are split so that nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


MASK_STREAM = 0
DROP_PATH_STREAM = 0x44726F70
ERASING_STREAM = 0x45726173


def mask_noise(seed: int, epoch: int, sample_ids: Tensor, draws: int, device: torch.device | str) -> Tensor:
    """Uniform noise for the masks of a batch: arguments and result are those of ``sample_noise``.

    Equal values occur; ``draw_mask`` orders them by position.
    """
    return sample_noise(seed, epoch, sample_ids, draws, device, stream=MASK_STREAM)


def sample_noise(
    seed: int, epoch: int, sample_ids: Tensor, draws: int, device: torch.device | str, *, stream: int
) -> Tensor:
    """Uniform noise for the samples of a batch.

    Args:
        seed: Seed of the run, in [0, 2**64).
        epoch: In [0, 2**32).
        sample_ids: (B,) integers that name the samples in the dataset.
        draws: Values per sample.
        device: Where to compute.
        stream: In [0, 2**32): keeps what is drawn for one purpose apart from what is drawn for another.

    Returns:
        (B, draws) float32 in [0, 1), multiples of 2**-24.
    """
    ids = sample_ids.to(device=device, dtype=torch.int64)[:, None]
    block = torch.arange(-(-draws // 4), device=device)[None, :]
    counter = (block, ids & _WORD, (ids >> 32) & _WORD, torch.full_like(ids, epoch))
    words = philox(counter, (seed & _WORD, (seed >> 32) ^ stream))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :draws] >> 8
    return bits.to(torch.float32) * 2.0**-24


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits for every counter.

    Args:
        counter: Four int64 tensors of words that broadcast together.
        key: Two words.
    """
    word0, word1, word2, word3 = counter
    for step in range(_ROUNDS):
        key0, key1 = ((k + step * grow) & _WORD for k, grow in zip(key, _KEY_STEPS, strict=True))
        high0, low0 = _product(word0, _MULTIPLIERS[0])
        high1, low1 = _product(word2, _MULTIPLIERS[1])
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
    return word0, word1, word2, word3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, by halves: no intermediate exceeds 49 bits."""
    low = (word & 0xFFFF) * multiplier
    middle = (word >> 16) * multiplier + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
