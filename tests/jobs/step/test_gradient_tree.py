from __future__ import annotations

import functools
import itertools

import pytest
import torch
from rank_threads import Ranks

from jobs.step import gradient_tree
from jobs.step.gradient_tree import Exchange, Node, PartialSums, add_tree, nodes_of, root


def shares(grains: int, world_size: int) -> list[range]:
    bounds = [rank * grains // world_size for rank in range(world_size + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def by_definition(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The sum of a padded power of two of leaves, halved until one is left; absent leaves add nothing."""
    width = 1 << (len(leaves) - 1).bit_length()
    level: list[torch.Tensor | None] = [*leaves, *[None] * (width - len(leaves))]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [left if right is None else left + right for left, right in pairs if left is not None]
        level += [None] * (len(level) % 2 if len(level) > 1 else 0)
    assert level[0] is not None
    return level[0]


def held(leaves: list[torch.Tensor], grains: range) -> PartialSums:
    sums = PartialSums(leaves[0].numel(), torch.device("cpu"))
    for grain in grains:
        sums.add(grain, functools.partial(write, leaves[grain]))
    return sums


def write(leaf: torch.Tensor, vector: torch.Tensor, add: bool) -> None:
    vector.copy_(vector + leaf if add else leaf)


@pytest.fixture
def leaves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1e4, 1e-4]).repeat(5)
    return [torch.randn(60, generator=generator) * scale for scale in scales]


@pytest.mark.parametrize("grains", [1, 2, 3, 5, 8, 11, 15])
def test_the_sum_is_that_of_the_tree_at_every_world_size(grains: int, leaves: list[torch.Tensor]) -> None:
    expected = by_definition(leaves[:grains])

    for world_size in range(1, grains + 1):
        sums = [held(leaves, share) for share in shares(grains, world_size)]
        nodes = {node: vector for each in sums for node, vector in each.vectors()}
        assert torch.equal(add_tree(grains, nodes), expected), world_size


def test_adding_in_turn_gives_other_bits(leaves: list[torch.Tensor]) -> None:
    in_turn = torch.zeros(60)
    for leaf in leaves:
        in_turn += leaf

    assert torch.allclose(in_turn, by_definition(leaves), rtol=1e-4)
    assert not torch.equal(in_turn, by_definition(leaves)), "the test could not tell them apart"


@pytest.mark.parametrize(
    ("grains", "nodes"),
    [
        (range(8), [Node(0, 3)]),
        (range(4, 8), [Node(4, 2)]),
        (range(3, 7), [Node(3, 0), Node(4, 1), Node(6, 0)]),
        (range(6), [Node(0, 2), Node(4, 1)]),
        (range(5, 5), []),
    ],
)
def test_a_rank_holds_the_fewest_nodes(grains: range, nodes: list[Node]) -> None:
    assert nodes_of(grains) == nodes


def test_a_power_of_two_of_ranks_has_one_node_each() -> None:
    for world_size in (1, 2, 4, 8, 16):
        assert {len(nodes_of(share)) for share in shares(64, world_size)} == {1}
    assert root(64) == Node(0, 6) and root(1) == Node(0, 0)


def test_open_nodes_are_few_and_their_room_is_used_again(leaves: list[torch.Tensor]) -> None:
    sums = PartialSums(60, torch.device("cpu"))
    most, rooms = 0, set()
    for _ in range(2):
        for grain in range(64):
            sums.add(grain, functools.partial(write, torch.ones(60)))
            most = max(most, len(sums.vectors()))
            rooms |= {vector.data_ptr() for _, vector in sums.vectors()}
        assert [node for node, _ in sums.vectors()] == [Node(0, 6)]
        sums.clear()
    assert most == 6 and len(rooms) <= 7


@pytest.mark.parametrize(("grains", "world_size"), [(8, 1), (8, 4), (8, 3), (12, 5), (7, 7)])
def test_each_owner_gets_its_partition_of_the_sum(
    grains: int, world_size: int, leaves: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of parameters, with 12 and 4 elements on each rank."""
    numels = [12, 4]
    whole = [torch.cat([leaf, leaf])[: sum(numels) * world_size] for leaf in leaves]
    expected = by_definition(whole[:grains])
    ranks, by_rank = Ranks(world_size), shares(grains, world_size)
    monkeypatch.setattr(gradient_tree, "dist", ranks)

    def partitions(rank: int) -> list[torch.Tensor]:
        exchange, sums = Exchange(by_rank, numels, rank), PartialSums(whole[0].numel(), torch.device("cpu"))
        for grain in by_rank[rank]:
            sums.add(grain, functools.partial(write, whole[grain]))
            exchange.send_complete(sums.vectors())
        return exchange.gather(sums.vectors())

    first = 0
    found = ranks.run(partitions)
    for index, numel in enumerate(numels):
        flat = torch.cat([partition[index] for partition in found])
        assert torch.equal(flat, expected[first : first + numel * world_size])
        first += numel * world_size
