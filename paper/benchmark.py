"""What a training step costs on this machine: time, images/s, arithmetic and peak memory.

    python -m paper.benchmark uae.py --dataset cifar10 --k 8 --steps 5
    python -m paper.benchmark uae.py --dataset cifar10 --k 8 --steps 5 --stock 3      # against the plain path

Random images, nothing is trained that is kept, nothing is written. The plain path goes without this code's speed-ups:
decoder not folded, penalty by double backward, default memory format; beside it each of them is left out alone. All are
measured in alternation, since machines are noisy.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common
import harness
from paper.table import spread

SCRIPTS = ("vae", "ut_vae", "uae", "rae", "iwae", "wae_mmd")
WARM_UP = 3  # steps: memory, autotuning, compilation


SPEED_UPS = ("folding", "forward mode", "channels last")  # of decoder, penalty, nets


class StockDecoder(common.Decoder):
    """The decoder of Table 4 that runs its layers one after the other on every point."""

    def fold(self, z: Tensor, penalty: bool = False) -> None:
        return None


def forward_mode(decoder: nn.Module, mu: Tensor, fold: None = None) -> Tensor:
    """The penalty as of `common.Decoder`, of one that is not folded."""
    return decoder.jvp(mu, torch.randn_like(mu)).square().sum((1, 2, 3))


def double_backward(decoder: nn.Module, mu: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The penalty as of any decoder."""
    return common.gradient_penalty(nn.Sequential(decoder), mu)


def without(script: ModuleType, speed_ups: tuple[str, ...]) -> ModuleType:
    """A copy of a script without some of this code's speed-ups."""
    spec = importlib.util.spec_from_file_location(script.__name__, script.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    plain.memory_format = torch.channels_last
    if "folding" in speed_ups:
        plain.Decoder, plain.gradient_penalty = StockDecoder, forward_mode
    if "forward mode" in speed_ups:
        plain.gradient_penalty = double_backward
    if "channels last" in speed_ups:
        plain.memory_format = torch.contiguous_format
    return plain


def training_step(script: ModuleType, args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], None]:
    """One step of the script's training loop, as a function of a batch."""
    model = harness.prepare(script.nets(args), args, device).train()
    model.to(memory_format=script.memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type == "cuda")

    def step(x: Tensor) -> None:
        parts = script.loss(model["encoder"], model["decoder"], x, args)
        optimizer.zero_grad()
        parts["loss"].backward()
        harness.average_gradients(model)
        optimizer.step()

    return step


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, function: Callable, *inputs: Tensor) -> float:
    """Seconds that function(*inputs) takes."""
    start = clock(device)
    function(*inputs)
    return clock(device) - start


def matmul_peak(args: argparse.Namespace, device: torch.device) -> float:
    """FLOP/s of the best of a few matrix products in the precision of the nets, by either of torch's two libraries."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else None)
    image, kernel = a.view(1, 64, -1, side).permute(0, 3, 1, 2), a.view(side, side, 1, 1)
    times = [timed(device, torch.matmul, a, a) for _ in range(5)]
    times += [timed(device, F.conv2d, image, kernel) for _ in range(5)]  # the same product by the convolutions' library
    return 2 * side**3 / min(times)


def measure(script: ModuleType, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Time the script's training step on random images: milliseconds, rates, arithmetic and peak memory."""
    x = torch.rand(args.batch_size, args.channels, args.image_size, args.image_size, device=device) * 2 - 1
    peak, step = matmul_peak(args, device), training_step(script, args, device)
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        step(x)
    for _ in range(WARM_UP):
        step(x)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [timed(device, step, x) for _ in range(args.steps)]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:  # of the process
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds, points = statistics.median(times), args.batch_size * getattr(args, "k", 1)
    return {
        "ms": seconds * 1e3,
        "fastest_ms": min(times) * 1e3,
        "slowest_ms": max(times) * 1e3,
        "images_per_s": args.batch_size / seconds,
        "points": points,
        "points_per_s": points / seconds,
        "tflop": counter.get_total_flops() / 1e12,
        "tflop_per_s": counter.get_total_flops() / seconds / 1e12,
        "peak_tflop_per_s": max(peak, matmul_peak(args, device)) / 1e12,
        "memory_gib": memory / 2**30,
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = harness.Parser("paper.benchmark", __doc__)
    parser.add_argument("script", help="uae.py, or another of the six; its own flags may follow")
    parser.add_argument("--steps", type=int, default=5, help="how many are timed")
    parser.add_argument(
        "--stock",
        type=int,
        metavar="N",
        help="measure also without each speed-up and without all, N times in alternation",
    )
    own, rest = parser.parse_known_args(argv)
    name = Path(own.script).stem
    if name not in SCRIPTS:
        parser.error(f"{own.script!r} is none of {', '.join(f'{script}.py' for script in SCRIPTS)}")
    if own.steps < 1:
        parser.error(f"--steps {own.steps}: give a number above 0")
    if own.stock is not None and own.stock < 3:
        parser.error(f"--stock {own.stock}: give 3 or more, for a spread")
    script = importlib.import_module(name)
    args = script.arguments(rest)
    if args.batch_size < 2:
        parser.error(f"--batch-size {args.batch_size}: give 2 or more, for batch norm")
    args.steps = own.steps
    device, shape = harness.start(args), [args.channels, args.image_size, args.image_size]
    paths = {"this code": ()}
    if own.stock:
        paths |= {f"without {each}": (each,) for each in SPEED_UPS} | {"the plain path": SPEED_UPS}
    scripts = [without(script, speed_ups) for speed_ups in paths.values()]
    rounds = [[measure(each, args, device) for each in scripts] for _ in range(own.stock or 1)]
    print(
        f"{name}.py on {device}, {args.precision}, {torch.get_num_threads()} CPU threads, width {args.width:g}: "
        f"{args.batch_size} images {shape}, {rounds[0][0]['points']} decoded points a step, {args.steps} steps"
    )
    for path, results in zip(paths, zip(*rounds, strict=True), strict=True):
        r = sorted(results, key=lambda result: result["ms"])[len(results) // 2]
        rate = spread([result["images_per_s"] for result in results], 2)
        share = 100 * r["tflop_per_s"] / r["peak_tflop_per_s"]
        print(
            f"{path}: {rate} images/s, {r['points_per_s']:.1f} points/s, "
            f"{r['ms']:.1f} ms a step ({r['fastest_ms']:.1f} to {r['slowest_ms']:.1f})\n"
            f"{r['tflop']:.3f} TFLOP a step at {r['tflop_per_s']:.3f} TFLOP/s, "
            f"{share:.0f}% of the matrix product's {r['peak_tflop_per_s']:.3f}; "
            f"peak memory{' of the process so far' * (device.type == 'cpu')} {results[0]['memory_gib']:.2f} GiB"
        )
    for path, results in list(zip(paths, zip(*rounds, strict=True), strict=True))[1:]:
        ratio = spread([other["ms"] / ours["ms"] for (ours, *_), other in zip(rounds, results, strict=True)], 2)
        print(f"{path}: {ratio} times as long ({own.stock} times in alternation)")
    return rounds[0][0]


if __name__ == "__main__":
    harness.cli(main)
