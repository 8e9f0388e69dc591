"""Operations and bytes of one forward and backward pass, by part of the model, without computing anything.

Bytes are what the kernels of an eager run read and write at least: their tensor arguments and results, each once, on
tensors that have shapes and no values. Operations are counted by `model.cost`, for the dense reference by PyTorch.
docs/model.md says what follows from them for a GPU.

    python benchmarks/model_traffic.py [--preset base] [--images 64]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from model import ConvMAE, ConvMAEConfig
from model.config import PRESETS
from model.cost import flops

PARTS = {
    "stage1": ("patch_embed1", "blocks1"),
    "stage2": ("patch_embed2", "blocks2"),
    "stage3": ("patch_embed3", "patch_embed4", "blocks3", "patch_embed", "blocks"),
    "fusion": ("stage1_output_decode", "stage2_output_decode"),
}
"""Children of the encoder that make up a part."""
_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.convolution", "scaled_dot_product")
_NO_KERNEL = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten._unsafe_view.default})


class ByteCounter(TorchDispatchMode):
    """A counter of what the kernels inside it read and write, by the part of the model that is running.

    Matrix products, convolutions and attention apart from all else: these are bound by arithmetic where they are
    large, the others by memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self._tracker = ModuleTracker()
        self._marker = _NodeMarker(self._tracker)

    def __enter__(self) -> ByteCounter:
        self._tracker.__enter__()
        self._marker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._marker.__exit__(*error)
        self._tracker.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the kernel and add its bytes."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func not in _NO_KERNEL:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            node = torch._C._current_autograd_node()
            part = node.metadata.get("part", "rest") if node else part_of(self._tracker.parents)
            counter = self.products if any(word in str(func) for word in _PRODUCTS) else self.others
            counter[part] += sum(map(_stored_bytes, tensors))
        return out


class _NodeMarker(TorchFunctionMode):
    """Writes on each node of the autograd graph which part made it: backward, parts overlap in time."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        nodes = [leaf.grad_fn for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and "part" not in node.metadata:
                node.metadata["part"] = part_of(self._tracker.parents)
                nodes += [before for before, _ in node.next_functions]
        return out


def part_of(modules: Iterable[str]) -> str:
    """The part to which the modules at work belong, by their names as ModuleTracker gives them."""
    for name in modules:
        _, child, *deeper = [*name.split("."), ""]
        if child == "decoder":
            return child
        for part, children in PARTS.items():
            if child == "encoder" and deeper[0] in children:
                return part
    return "rest"


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of an expanded one, those that are stored."""
    shape = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(shape).numel() * tensor.element_size()


def count_bytes(config: ConvMAEConfig, images: int, dense: bool, dtype: torch.dtype) -> ByteCounter:
    """Count what one forward and backward pass reads and writes.

    Args:
        config: The model's.
        images: In the micro-batch.
        dense: Take the reference, most of which cannot be attributed: it calls no modules.
        dtype: Of parameters and activations.
    """
    model = ConvMAE(config, dense=dense).to(dtype)
    fake = FakeTensorMode()
    # A model of fake tensors can't be converted, but a model can be called with fake parameters.
    parameters = {name: fake.from_tensor(parameter) for name, parameter in model.named_parameters()}
    with fake:
        batch, noise = torch.empty(images, 3, *config.image_shape), torch.empty(images, config.mask_patches)
        with ByteCounter() as counter:
            functional_call(model, parameters, (batch,), {"noise": noise}).loss.backward()
    return counter


def dense_flops(config: ConvMAEConfig, images: int) -> int:
    """Operations of a forward and backward pass of the reference, by PyTorch's counter."""
    with torch.device("meta"):
        model = ConvMAE(config, dense=True)
        batch, noise = torch.empty(images, 3, *config.image_shape), torch.empty(images, config.mask_patches)
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(batch, noise=noise).loss.backward()
    return counter.get_total_flops()


def convolution_backward_flops(
    grad_shape: list[int], _x_shape: list[int], weight_shape: list[int], *_: Any, out_shape: tuple[Any, ...]
) -> int:
    """As many as forward for each gradient; PyTorch's formula counts a grouped kernel's as if it had one group."""
    gradients = sum(shape is not None for shape in out_shape[:2])
    return gradients * 2 * torch.Size(grad_shape).numel() * torch.Size(weight_shape[1:]).numel()


def main() -> None:
    """Print the table, per image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--images", type=int, default=64, help="in a micro-batch")
    options = parser.parse_args()
    images, half = options.images, torch.bfloat16
    config, mae = ConvMAEConfig.preset(options.preset), ConvMAEConfig.preset("mae_base")
    cost, moved = flops(config, images), count_bytes(config, images, False, half)
    print(f"{options.preset}, forward and backward, bf16, per image of a micro-batch of {images}")
    print(f"{'':24}{'GFLOP':>8}{'MB, products':>14}{'MB, all else':>14}")
    for part in (*PARTS, "decoder"):
        print_row(part, getattr(cost.forward, part) + getattr(cost.backward, part), moved, images, part)
    print_row("masks, loss, the rest", 0, moved, images, "rest")
    print_row("all", cost.training, moved, images)
    print_row("dense reference", dense_flops(config, images), count_bytes(config, images, True, half), images)
    print_row("mae_base", flops(mae, images).training, count_bytes(mae, images, False, half), images)


def print_row(name: str, operations: int, counted: ByteCounter, images: int, part: str | None = None) -> None:
    """One line of the table; without a part, of all of them."""
    products, others = (
        (counter[part] if part else counter.total()) / images / 1e6 for counter in (counted.products, counted.others)
    )
    print(f"{name:24}{operations / images / 1e9:8.2f}{products:14.0f}{others:14.0f}")


if __name__ == "__main__":
    main()
