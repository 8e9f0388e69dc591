"""Gradients whose bits depend on no world size: fixed grains of the global batch, added in one fixed tree.

Floating-point addition is not associative, so a sum over ranks depends on how many there are. Here the global batch is
cut into G grains, whatever the world size, and the gradient is the sum of the grains' gradients in the shape of one
binary tree over [0, G): the sum of a node is that of its left half plus that of its right half. A rank adds up the
nodes that lie within its own grains; the owner of a partition of the parameters gets every rank's nodes of it and adds
these in the tree's order. Where world size and G are powers of two each rank has one node, and what travels is what a
reduce-scatter would send. The idea is that of reproducible summation by a fixed tree; EasyScale (arXiv:2208.14228)
fixes virtual ranks for the same end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Node(NamedTuple):
    """The grains [start, start + 2**height) of the tree, or what there is of them."""

    start: int
    height: int

    def halves(self) -> tuple[Node, Node]:
        """Its two children."""
        height = self.height - 1
        return Node(self.start, height), Node(self.start + (1 << height), height)


def root(grains: int) -> Node:
    """The whole tree over `grains` grains."""
    return Node(0, (grains - 1).bit_length())


def nodes_of(grains: range) -> list[Node]:
    """The fewest nodes that make up some consecutive grains, in their order: what a rank with these ends up with."""
    nodes: list[Node] = []
    for grain in grains:
        nodes.append(Node(grain, 0))
        while len(nodes) > 1 and _are_siblings(*nodes[-2:]):
            nodes[-2:] = [Node(nodes[-2].start, nodes[-2].height + 1)]
    return nodes


def _are_siblings(left: Node, right: Node) -> bool:
    return left.height == right.height and left.start % (2 << left.height) == 0


class PartialSums:
    """What a rank has added up of the tree: a vector for each node, as few as can be.

    Owns: one vector for each node that is open, which are used again step by step; at most two for each level.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        """Make no room yet.

        Args:
            numel: Elements of a vector.
            device: Where they lie.
        """
        self._numel, self._device = numel, device
        self._open: list[tuple[Node, Tensor]] = []
        self._spare: list[Tensor] = []

    def add(self, grain: int, write: Callable[[Tensor, bool], None]) -> None:
        """Add the next grain's gradient.

        Args:
            grain: Its number; one more than that of the last.
            write: Writes it into a vector, or adds it where the second argument says so; leaves the rest alone.
        """
        node = Node(grain, 0)
        if self._open and _are_siblings(self._open[-1][0], node):
            write(self._open[-1][1], True)
            self._merge()
        else:
            vector = self._spare.pop() if self._spare else torch.zeros(self._numel, device=self._device)
            write(vector, False)
            self._open.append((node, vector))
        while len(self._open) > 1 and _are_siblings(self._open[-2][0], self._open[-1][0]):
            _, right = self._open.pop()
            self._open[-1][1].add_(right)
            self._spare.append(right)
            self._merge()

    def _merge(self) -> None:
        """The last sum holds that of its sibling, too."""
        node, vector = self._open[-1]
        self._open[-1] = (Node(node.start, node.height + 1), vector)

    def vectors(self) -> Sequence[tuple[Node, Tensor]]:
        """The sums of the nodes that are there, in their order."""
        return self._open

    def clear(self) -> None:
        """Forget the sums; their room is kept."""
        self._spare += [vector for _, vector in self._open]
        self._open = []


def add_tree(grains: int, sums: Mapping[Node, Tensor]) -> Tensor:
    """The sum over all grains, from sums of nodes that cover them; may be one of these, changed in place.

    Args:
        grains: How many there are.
        sums: By node; none within another.
    """
    total = _added(root(grains), grains, sums)
    assert total is not None
    return total


def _added(node: Node, grains: int, sums: Mapping[Node, Tensor]) -> Tensor | None:
    """Depth first, so that few sums are held; None for what lies beyond the last grain."""
    if node in sums:
        return sums[node]
    if node.start >= grains:
        return None
    left, right = (_added(half, grains, sums) for half in node.halves())
    assert left is not None
    return left if right is None else left.add_(right)


class Round(NamedTuple):
    """A node of each rank that has so many, on its way to the owners of its partitions."""

    senders: Sequence[int]
    received: Sequence[Tensor]
    """For each group of parameters, (senders, elements) of this rank's partition."""
    works: Sequence[dist.Work]


class Exchange:
    """Brings every rank's nodes of a partition to the rank that owns it.

    A node is on its way as soon as no later grain belongs to it, while the next grain is computed: with a world size
    that is no power of two these are all but a rank's last ones.
    """

    def __init__(self, grains_by_rank: Sequence[range], partition_numels: Sequence[int], rank: int) -> None:
        """Lay out who sends what; the same on all ranks.

        Args:
            grains_by_rank: The grains of each rank, in order, together [0, G).
            partition_numels: Of each group of parameters, the elements that every rank owns; a vector is the groups
                in turn, each with its ranks' partitions in turn.
            rank: This one.
        """
        self._grains = grains_by_rank[-1].stop
        self._nodes = [nodes_of(grains) for grains in grains_by_rank]
        self._numels, self._mine = partition_numels, self._nodes[rank]
        self._count = max(map(len, self._nodes)) if len(self._nodes) > 1 else 0
        self._rounds: list[Round] = []

    def send_complete(self, sums: Sequence[tuple[Node, Tensor]]) -> None:
        """Send what no later grain belongs to; those of a round wait for nobody. Every rank sends its rounds in order.

        Args:
            sums: Of this rank's nodes so far, as `PartialSums` has them; left alone until `gather`.
        """
        while len(self._rounds) < self._count:
            turn = len(self._rounds)
            if turn < len(self._mine) and (turn >= len(sums) or sums[turn][0] != self._mine[turn]):
                return
            self._rounds.append(self._sent(turn, sums))

    def gather(self, sums: Sequence[tuple[Node, Tensor]]) -> list[Tensor]:
        """This rank's partition of the sum over all grains, for each group. Collective.

        Args:
            sums: Of all nodes of this rank; those of a rank that is alone are changed in place.
        """
        self.send_complete(sums)
        rounds, self._rounds = self._rounds, []
        for work in (work for each in rounds for work in each.works):
            work.wait()
        partitions, first = [], 0
        for index, numel in enumerate(self._numels):
            if not rounds:
                found = {node: vector[first : first + numel] for node, vector in sums}
            else:
                pairs = ((turn, each) for turn, each in enumerate(rounds))
                found = {
                    self._nodes[sender][turn]: part
                    for turn, each in pairs
                    for sender, part in zip(each.senders, each.received[index], strict=True)
                }
            partitions.append(add_tree(self._grains, found))
            first += numel
        return partitions

    def _sent(self, turn: int, sums: Sequence[tuple[Node, Tensor]]) -> Round:
        world_size, first = len(self._nodes), 0
        senders = [rank for rank, nodes in enumerate(self._nodes) if turn < len(nodes)]
        received, works = [], []
        for numel in self._numels:
            vector = sums[turn][1] if turn < len(self._mine) else sums[0][1][:0]
            sent = vector[first : first + numel * world_size]
            got = sent.new_empty(len(senders), numel)
            from_each = [numel if rank in senders else 0 for rank in range(world_size)]
            to_each = [len(sent) // world_size] * world_size
            works.append(dist.all_to_all_single(got.view(-1), sent, from_each, to_each, async_op=True))
            received.append(got)
            first += numel * world_size
        return Round(senders, received, works)
