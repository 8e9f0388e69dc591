"""What is concluded from digests that differ. Real ranks: test_exact_gradients.py and test_corrupt_run.py."""

from __future__ import annotations

import pytest

from jobs.errors import RecipeError
from jobs.recipe.named_recipes import named_recipe
from jobs.step.step_verification import VOTES, Verdict, verdicts, voters


def votes(world_size: int, *errors: tuple[int, int], repeats: bool = True) -> list[list[int]]:
    """Digests of a step in which (rank, owner) erred; a rank that repeats itself errs alike, or only the first time."""
    found = []
    for owner in range(world_size):
        digests, seen = [], set()
        for rank in voters(owner, world_size):
            errs = (rank, owner) in errors and (repeats or rank not in seen)
            digests.append(1000 + owner + (7 * (rank + 1) if errs else 0))
            seen.add(rank)
        found.append(digests)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_equal_digests_blame_nobody(world_size: int) -> None:
    assert len(votes(world_size)[0]) == VOTES
    assert verdicts(votes(world_size)) == []


@pytest.mark.parametrize("world_size", [3, 4, 9])
@pytest.mark.parametrize("hop", range(VOTES))
def test_whoever_differs_from_two_others_is_blamed_alone(world_size: int, hop: int) -> None:
    owner = 1
    rank = voters(owner, world_size)[hop]

    (verdict,) = verdicts(votes(world_size, (rank, owner)))

    assert verdict == Verdict((rank,), owner) and verdict.is_certain
    assert verdict.line() == f"rank {rank} computed another gradient than the others for a grain of rank 1"


def test_a_rank_that_always_errs_is_blamed_by_each_grain_that_it_computes() -> None:
    found = verdicts(votes(5, (2, 2), (2, 1), (2, 0)))

    assert [(verdict.ranks, verdict.owner) for verdict in found] == [((2,), 0), ((2,), 1), ((2,), 2)]


def test_of_two_ranks_the_one_that_contradicts_itself_is_blamed() -> None:
    (verdict,) = verdicts(votes(2, (0, 0), repeats=False))

    assert verdict == Verdict((0,), 0)


def test_of_two_ranks_that_each_insist_both_are() -> None:
    for rank in (0, 1):
        (verdict,) = verdicts(votes(2, (rank, 0)))
        assert verdict == Verdict((0, 1), 0) and not verdict.is_certain
        assert verdict.line() == "ranks 0 and 1 computed different gradients for a grain of rank 0"


def test_a_rank_alone_is_blamed_when_it_contradicts_itself() -> None:
    assert verdicts(votes(1, (0, 0), repeats=False)) == [Verdict((0,), 0)]


def test_three_that_all_differ_are_all_named() -> None:
    assert verdicts(votes(4, (1, 1), (2, 1))) == [Verdict((1, 2, 3), 1)]


@pytest.mark.parametrize(
    ("recipe", "changes", "rule"),
    [
        ("tiny", {"reproducible": "rounding"}, "must be 0 with reproducible=rounding"),
        ("tiny", {"zero_stage": 3}, "must be 0 with zero_stage=3"),
        ("tiny_finetune", {}, "must be 0 in a fine-tuning"),
    ],
)
def test_recipes_whose_gradients_do_not_compare_are_refused(recipe: str, changes: dict[str, object], rule: str) -> None:
    with pytest.raises(RecipeError) as caught:
        named_recipe(recipe).amended({"verify_steps_every": 10, **changes})

    assert caught.value.field == "verify_steps_every" and rule in str(caught.value)
