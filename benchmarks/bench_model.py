"""Forward and backward of ConvMAE on visible patches, against its dense reference, MAE and itself, in one process.

The dense reference does what the official code does: stages 1 and 2 for all patches, times the mask; attention as
separate operations. MAE is measured with that attention, as its official code has it, and with the fused one. Rounds
are interleaved, and figures are medians: CPU seconds (of a GPU: seconds by its clock) and wall seconds. Peak memory is
that of a process, or of the GPU, beyond model and gradients.

Complementary masking is measured on a quarter of the images, each masked four times: in one pass ("4 views"), against
the same masks in four forward passes, whose losses have one backward pass, or each its own. `--only-views` measures
these alone; as below that takes a minute of one quiet core.

    python benchmarks/bench_model.py [--precision fp32 bf16] [--threads 1] [--rounds 5] [--compile] [--device cuda]
    python benchmarks/bench_model.py --preset small --only-views --precision fp32 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from model import ConvMAE, ConvMAEConfig
from model.config import PRESETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARSE, COMPILED, DENSE, MAE_PLAIN, MAE_FUSED = "sparse", "sparse, compiled", "dense", "MAE, plain attention", "MAE"
VIEWS = 4
IN_VIEWS, IN_PASSES, IN_TURNS = "4 views", "4 forward passes", "4 passes in turn"
OF_VIEWS = (IN_VIEWS, IN_PASSES, IN_TURNS)


@dataclass(frozen=True)
class Goal:
    """A ratio of two sides' medians that the project aims at."""

    precision: str
    over: str
    under: str
    bound: float
    at_least: bool
    over_precision: str = ""
    """Where it is not the same."""

    def line(self, seconds: dict[tuple[str, str], float]) -> str | None:
        """The goal and the figure reached; None where a side was not measured."""
        over, under = (self.over_precision or self.precision, self.over), (self.precision, self.under)
        if over not in seconds or under not in seconds:
            return None
        ratio = seconds[over] / seconds[under]
        reached = ratio >= self.bound if self.at_least else ratio <= self.bound
        sign, said = (">=" if self.at_least else "<="), ("reached" if reached else "NOT reached")
        return f"{' '.join(over)} / {' '.join(under)}: {ratio:.2f}  (goal {sign} {self.bound}: {said})"


GOALS = (
    Goal("fp32", DENSE, SPARSE, 1.9, at_least=True),
    Goal("fp32", SPARSE, MAE_PLAIN, 1.12, at_least=False),
    Goal("fp32", SPARSE, MAE_FUSED, 1.12, at_least=False),
    Goal("bf16", DENSE, SPARSE, 1.7, at_least=True),
    Goal("bf16", SPARSE, MAE_PLAIN, 1.3, at_least=False),
    Goal("bf16", SPARSE, MAE_FUSED, 1.3, at_least=False),
    Goal("bf16", DENSE, SPARSE, 5.0, at_least=True, over_precision="fp32"),
)
MEMORY_GOAL = 0.6
"""Of the dense reference's bytes."""


class Side:
    """One model, one batch, one precision."""

    def __init__(self, name: str, precision: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        preset = "mae_base" if name.startswith("MAE") else options.preset
        config = ConvMAEConfig.preset(preset, loss="mse", norm_pix=True, views=VIEWS if name == IN_VIEWS else 1)
        self.name, self.device = name, torch.device(options.device)
        self.model = ConvMAE(config, dense=name in (DENSE, MAE_PLAIN)).to(self.device)
        if name == COMPILED:
            self.model.compile()
        batch = max(1, options.batch // VIEWS) if name in OF_VIEWS else options.batch
        self.images = torch.randn(batch, 3, *config.image_shape, device=self.device)
        noise = torch.rand(batch, config.mask_patches, device=self.device)
        passes = VIEWS if name in (IN_PASSES, IN_TURNS) else 1
        self.noises = [rotated(noise, each * config.kept) for each in range(passes)]
        half = precision == "bf16"
        self.precision = torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    def loss(self, noise: torch.Tensor) -> torch.Tensor:
        """Of one forward pass."""
        with self.precision:
            loss: torch.Tensor = self.model(self.images, noise=noise).loss
        return loss / len(self.noises)

    def step(self) -> None:
        """Forward and backward."""
        if self.name == IN_TURNS:
            for noise in self.noises:
                self.loss(noise).backward()
        else:
            sum(map(self.loss, self.noises[1:]), self.loss(self.noises[0])).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Free gradients."""
        self.model.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Peak of a step, beyond what model and gradients take."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter).fill_(0) if parameter.requires_grad else None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): forget the peak so far
        before = _status_bytes("VmRSS")
        self.step()
        return _status_bytes("VmHWM") - before


def rotated(noise: torch.Tensor, ranks: int) -> torch.Tensor:
    """(B, L) noise by which those patches are the first that have so many before them."""
    order = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return ((order - ranks) % noise.shape[1]).float()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def has_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; without, a CPU does at a tenth of fp32's rate."""
    return device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def timed(sides: Sequence[Side], rounds: int) -> list[tuple[float, float]]:
    """Median CPU and wall seconds of each side's step, over interleaved rounds; one more warms up."""
    cpu: list[list[float]] = [[] for _ in sides]
    wall: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for index, side in enumerate(sides):
            began = time.process_time(), time.perf_counter()
            side.step()
            took = time.process_time() - began[0], time.perf_counter() - began[1]
            side.clear()
            if number:
                cpu[index].append(took[0])
                wall[index].append(took[1])
    return [(statistics.median(c), statistics.median(w)) for c, w in zip(cpu, wall, strict=True)]


def peak_in_own_process(name: str, precision: str, arguments: Sequence[str]) -> int:
    """Bytes, of a side in a process that does nothing else."""
    command = [sys.executable, __file__, *arguments, "--peak-of", name, precision]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed tensors back at once
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=[name for name in PRESETS if name != "mae_base"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", choices=DTYPES, help="default: fp32, and bf16 if in hardware")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too; compiling takes minutes")
    parser.add_argument("--only-views", action="store_true", help="measure complementary masking alone")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def sides_of(options: argparse.Namespace) -> list[str]:
    """What is measured, in its order."""
    if options.only_views:
        return list(OF_VIEWS)
    names = [SPARSE, *([COMPILED] if options.compile else []), DENSE]
    return [*names, *([MAE_PLAIN, MAE_FUSED] if options.preset == "base" else []), *OF_VIEWS]


def main(arguments: Sequence[str]) -> None:
    """Print figures and goals."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(Side(*options.peak_of, options).peak_bytes())
        return
    names = sides_of(options)
    precisions = options.precision or [name for name in DTYPES if name == "fp32" or has_bf16(options.device)]
    print(f"ConvMAE-{options.preset}, {options.batch} images, {options.threads} thread(s), {options.device}")
    if "bf16" not in precisions and not has_bf16(options.device):
        print("bf16: this CPU has no instructions for it; --precision bf16 measures it all the same")
    seconds: dict[tuple[str, str], float] = {}
    for precision in precisions:
        print(f"\n{precision:24}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}")
        figures = timed([Side(name, precision, options) for name in names], options.rounds)
        peaks = [peak_in_own_process(name, precision, arguments) for name in names]
        for name, (cpu, wall), peak in zip(names, figures, peaks, strict=True):
            seconds[precision, name] = wall if options.device == "cuda" else cpu
            print(f"{name:24}{cpu:8.2f}{wall:8.2f}{peak / 1e6:9.0f}", flush=True)
        took, peak_of = {name: seconds[precision, name] for name in names}, dict(zip(names, peaks, strict=True))
        if not options.only_views:
            ratio = peak_of[SPARSE] / peak_of[DENSE]
            said = "reached" if ratio <= MEMORY_GOAL else "NOT reached"
            print(f"peak memory, {precision}: {ratio:.2f} of dense  (goal <= {MEMORY_GOAL}: {said})")
        for other in OF_VIEWS[1:]:
            times, peak = (figure[IN_VIEWS] / figure[other] for figure in (took, peak_of))
            print(f"{IN_VIEWS} / {other}, {precision}: {times:.2f} of the time, {peak:.2f} of the peak memory")
    print("\n" + "\n".join(filter(None, (goal.line(seconds) for goal in GOALS))))


if __name__ == "__main__":
    main(sys.argv[1:])
