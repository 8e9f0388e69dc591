"""Steps that are verified: the gradient of one grain of each rank is computed by two other ranks as well.

Where training is the same to the bit on any rank, a gradient that differs was computed on a device that errs, and says
nothing about it. Of three digests of the same gradient the one that differs from the other two names the rank. With two
ranks the third is the owner's own repetition, with one all three are; then a rank is named that contradicts itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from jobs.recipe.recipe import Recipe
from jobs.step.step_words import INTEGER_WORDS, integer_of, integer_words
from pipeline.load.batch import Batch

if TYPE_CHECKING:
    from jobs.step.exact_gradients import ExactGradients, Forward
    from jobs.step.training_step import RankPlace

VOTES = 3
"""Digests of each gradient: that of its step, and two others."""


class CorruptGradientError(RuntimeError):
    """A rank computed another gradient than the others; nothing was updated."""


class Verdict(NamedTuple):
    """What is concluded from digests that differ."""

    ranks: tuple[int, ...]
    """Those that may have erred: one, where the others agree against it."""
    owner: int
    """The rank whose grain it was."""

    @property
    def is_certain(self) -> bool:
        """Whether it names one rank."""
        return len(self.ranks) == 1

    def line(self) -> str:
        """For people."""
        if self.is_certain:
            return f"rank {self.ranks[0]} computed another gradient than the others for a grain of rank {self.owner}"
        named = " and ".join(map(str, self.ranks))
        return f"ranks {named} computed different gradients for a grain of rank {self.owner}"


def voters(owner: int, world_size: int) -> tuple[int, ...]:
    """The ranks that compute the gradient of a grain of `owner`, in the order of their digests."""
    return tuple((owner + hop) % world_size for hop in range(VOTES))


def verdicts(digests: Sequence[Sequence[int]]) -> list[Verdict]:
    """What is concluded from a step's digests; nothing where all agree.

    Args:
        digests: (ranks, VOTES), of a grain of each rank.
    """
    found = []
    for owner, votes in enumerate(digests):
        if len(set(votes)) == 1:
            continue
        ranks = voters(owner, len(digests))
        odd = [hop for hop, vote in enumerate(votes) if list(votes).count(vote) == 1]
        blamed = {ranks[hop] for hop in odd}
        agreeing = [rank for hop, rank in enumerate(ranks) if hop not in odd]
        if len(odd) == 1 and len(digests) == VOTES - 1 and odd[0] == 1:
            blamed |= set(agreeing)  # the owner agrees with nobody but itself
        found.append(Verdict(tuple(sorted(blamed)), owner))
    return found


class StepVerifier:
    """One rank's part in verified steps.

    Owns: the digests of the step under way. Concurrency: the training thread's alone. Blocking: `begin` is collective,
    and waits for the device in the steps that are verified.
    """

    def __init__(self, gradients: ExactGradients, recipe: Recipe, place: RankPlace) -> None:
        """Verify nothing yet.

        Args:
            gradients: Of this rank, which are watched.
            recipe: Says how often, which is not never, and how large grains are.
            place: Of this rank.
        """
        self._gradients, self._place = gradients, place
        self._every, self._grain = recipe.verify_steps_every, recipe.grain
        self.words = place.world_size * VOTES * INTEGER_WORDS
        self._chosen = -1
        self._votes: list[Tensor] = []
        gradients.on_gradients = self._see

    def is_due(self, step: int) -> bool:
        """Whether a step, from 0, is verified."""
        return (step + 1) % self._every == 0

    def begin(self, batch: Batch, forward: Forward) -> None:
        """Compute the gradients of two other ranks' grains, before this rank's own. Collective.

        Args:
            batch: This rank's part of the global batch.
            forward: The model's output.
        """
        self._chosen = (batch.step // self._every) % self._gradients.grains
        mine = slice(self._chosen * self._grain, (self._chosen + 1) * self._grain)
        self._votes = []
        for hop in range(1, VOTES):
            images, ids = self._received(batch.images[mine], batch.sample_ids[mine], hop)
            others = dataclasses.replace(batch, images=images, sample_ids=ids)
            self._votes.append(self._gradients.digest(self._gradients.of_grain(others, forward, 0)[1]))

    def write(self, words: Tensor) -> None:
        """Write (words,) float64, which are 0, to be added up over ranks, once this rank's own grains are computed."""
        for hop, vote in enumerate(self._votes):
            place = ((self._place.rank - hop) % self._place.world_size) * VOTES + hop
            words[place * INTEGER_WORDS : (place + 1) * INTEGER_WORDS] = integer_words(vote)
        self._chosen, self._votes = -1, []

    def read(self, summed: NDArray[np.float64]) -> list[Verdict]:
        """What is concluded from the sums of all ranks' words; the same on every rank."""
        table = summed.reshape(self._place.world_size, VOTES, INTEGER_WORDS)
        return verdicts([[integer_of(vote) for vote in votes] for votes in table.tolist()])

    def _see(self, number: int, gradients: Sequence[Tensor]) -> None:
        """The gradients of one of this rank's grains, as they are used."""
        if number == self._chosen:
            self._votes.insert(0, self._gradients.digest(gradients))

    def _received(self, images: Tensor, ids: Tensor, hop: int) -> tuple[Tensor, Tensor]:
        """The grain of the rank that is `hop` before this one, which gets that of this rank."""
        ranks, rank = self._place.world_size, self._place.rank
        if hop % ranks == 0:
            return images, ids
        sent_ids = ids.to(images.device)
        received, received_ids = torch.empty_like(images), torch.empty_like(sent_ids)
        for got, sent in ((received, images.contiguous()), (received_ids, sent_ids)):
            from_each, to_each = [0] * ranks, [0] * ranks
            from_each[(rank - hop) % ranks] = to_each[(rank + hop) % ranks] = sent.nbytes
            # As bytes: not every backend sends uint16.
            dist.all_to_all_single(_octets(got), _octets(sent), from_each, to_each)
        return received, received_ids.cpu()


def _octets(values: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return values.view(-1).view(torch.uint8)
