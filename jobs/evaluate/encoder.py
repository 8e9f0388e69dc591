"""The encoder or classifier that is evaluated, as tasks get it: a value with its image size, known by a digest.

Letters: B images, H and W pixels, C channels; of a classifier C is the number of its classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jobs.errors import EvaluationError
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.weights.consolidated import ClassifierHead
from jobs.weights.weight_checks import check_finite
from model import ChannelStatistics, Classifier, ConvMAEConfig, PooledEncoder, normalise
from model.config import ENCODER_FIELDS
from pipeline.image.channels import RGB_CHANNELS
from pipeline.image.decode import Pixels

DEVICES = ("auto", "cpu", "cuda")
_ENCODER = "encoder."
_FC_NORM = "fc_norm."

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """An encoder's weights, or those of a classifier, and how images are given to it. Picklable."""

    config: ConvMAEConfig
    arrays: Mapping[str, Float32s]
    """Of the module, by name; `fc_norm` of an encoder alone may be missing: nothing has trained it."""
    image_shape: tuple[int, int]
    """H and W of the images, to which positions are interpolated."""
    digest: str
    """SHA-256 of all that decides what it gives, and of nothing else: not of a decoder, a mask or a loss."""
    statistics: ChannelStatistics
    """By which images are normalised."""
    head: ClassifierHead | None = None
    """Of a classifier, which gives logits in place of features."""

    @classmethod
    def of(
        cls,
        config: ConvMAEConfig,
        state: Mapping[str, Tensor],
        image_shape: tuple[int, int],
        value: str,
        *,
        statistics: ChannelStatistics,
        head: ClassifierHead | None = None,
    ) -> FrozenEncoder:
        """Take what is needed out of a whole model's weights.

        Args:
            config: Of the model.
            state: By our names; what belongs to the decoder may be missing.
            image_shape: H and W of the images.
            value: Where the weights come from, for the message.
            statistics: By which images are normalised.
            head: Of a classifier, if its logits are wanted.

        Raises:
            WeightsFileError: A weight is not finite.
        """
        with torch.device("meta"):
            wanted = _module(config, head).state_dict()
        tensors = {name: state[name] for name in wanted if name in state or not name.startswith(_FC_NORM)}
        check_finite(tensors.items(), value)
        arrays = {name: tensor.detach().cpu().float().contiguous().numpy() for name, tensor in tensors.items()}
        shape = [getattr(config, field) for field in ENCODER_FIELDS]
        digest = hashlib.sha256(f"{shape} {config.image_shape} {image_shape}".encode())
        # For RGB and ImageNet's statistics it is what it was before there were others.
        if config.in_channels != RGB_CHANNELS:
            digest.update(f"{config.in_channels} channels".encode())
        if statistics != (IMAGENET_MEAN, IMAGENET_STD):
            digest.update(f"{statistics.mean} {statistics.std}".encode())
        if head:
            digest.update(f"{head.kind} {head.classes}".encode())
        for name in sorted(arrays):
            digest.update(name.removeprefix(_ENCODER).encode() + arrays[name].tobytes())
        return cls(config, arrays, image_shape, digest.hexdigest(), statistics, head)

    @property
    def channels(self) -> int:
        """C."""
        return len(self.head.classes) if self.head else self.config.embed_dim[2]

    def built(self, device: str) -> nn.Module:
        """The module, in evaluation mode; the last one that this process built is kept."""
        return _built(_Keyed(self), device)


def _module(config: ConvMAEConfig, head: ClassifierHead | None) -> nn.Module:
    return Classifier(config, len(head.classes), kind=head.kind) if head else PooledEncoder(config)


@dataclass(frozen=True)
class _Keyed:
    """An encoder that is equal to another one of the same digest."""

    encoder: FrozenEncoder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.encoder.digest == other.encoder.digest

    def __hash__(self) -> int:
        return hash(self.encoder.digest)


@lru_cache(maxsize=1)
def _built(keyed: _Keyed, device: str) -> nn.Module:
    model = _module(keyed.encoder.config, keyed.encoder.head)
    # Copies: what Ray hands to a task is read-only memory.
    given = {name: torch.tensor(array, device="cpu") for name, array in keyed.encoder.arrays.items()}
    model.load_state_dict({**model.state_dict(), **given})
    return model.eval().requires_grad_(False).to(device)


def encode(encoder: FrozenEncoder, pixels: Pixels, device: str) -> Float32s:
    """Features or logits of one batch, (B, C), in fp32; the same bits for the same batch, device, threads and release.

    Args:
        encoder: Gives them.
        pixels: (B, in_channels, H, W) uint8 or uint16.
        device: `cpu` or `cuda`.

    Raises:
        EvaluationError: A feature is infinite or not a number.
    """
    model = encoder.built(device)
    with torch.inference_mode(), exactly(device):
        images = normalise(torch.from_numpy(pixels).to(device), encoder.statistics)
        found: Float32s = model(images).cpu().numpy()
    if not np.isfinite(found).all():
        rule = "must give finite values in fp32"
        raise EvaluationError("weights", rule, f"{(~np.isfinite(found)).any(1).sum()} that are not", "use others")
    return found


def chosen_device(name: str, *, has_gpu: bool) -> str:
    """`cpu` or `cuda`.

    Args:
        name: One of DEVICES.
        has_gpu: Whether this machine, or the cluster, has a GPU.

    Raises:
        EvaluationError: It is none of DEVICES, or there is no GPU.
    """
    if name not in DEVICES:
        raise EvaluationError("--device", f"must be one of {', '.join(DEVICES)}", name, "choose one of them")
    if name == "cuda" and not has_gpu:
        raise EvaluationError("--device", "must be there", name, "give --device cpu")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch for each operation: sums in another number of threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exactly(device: str) -> Iterator[None]:
    """On a GPU: fp32 as such, not TF32, by kernels that give the same bits each time."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    flags: Any = torch.backends.flags
    try:
        with flags(fp32_precision="ieee"):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
