"""What holds a script and teaches nothing about the method: arguments, ranks, devices, random streams, a run.

A script's `main` calls, in this order: `argument_parser` and `parse_args`; `start` (ranks, device, precision, seed);
`prepare` (the nets on the device); `load_data`; `check_nets`; `learning_rate`; `Run` (folder, checkpoints, metrics) and
in the loop `average_gradients` and `validating`. `load_trained` gives a finished run's nets.
"""

import argparse
import copy
import csv
import ctypes
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    DEFAULTS,
    LAUNCHED,
    OWN,
    RANK,
    WORLD_SIZE,
    Dataset,
    UserError,
    epoch_batches,
    eval_mode,
    explained,
    load_identified,
    note,
    own_images,
    progress,
    replacing,
    to_float,
)

# ---------------------------------------------------------------------------------------------------------------------
# Arguments and files

MAY_BE_ZERO = {"seed", "epochs", "beta", "gamma"}
UNNAMED = {"dataset", "out", "seed", "resume", "device", "data_dir", "fid", "fid_method", "compile", "save_images"}


class Parser(argparse.ArgumentParser):
    """Help that shows the defaults, numbers that are finite and above 0, errors of one line."""

    def __init__(self, prog: str, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, "", argparse.SUPPRESS):
            options["help"] = options.get("help", "") + f" (default: {options['default']})"
        return super().add_argument(*names, **options)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        args = super().parse_args(argv)
        for name, x in vars(args).items():
            if isinstance(x, str | Path) and re.search("[\ud800-\udfff]", str(x)):  # bytes that are no UTF-8
                self.error(f"--{name.replace('_', '-')} {str(x)!a}: the name is not UTF-8, rename it")
            least = "of at least" if name in MAY_BE_ZERO else "above"
            fits = type(x) not in (int, float) or 0 < x < math.inf or (x == 0 and name in MAY_BE_ZERO)
            if not fits and name != "kappa" and x != self.get_default(name):
                self.error(f"--{name.replace('_', '-')} {x}: give a finite number {least} 0")
        return args

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def by_data(name: str) -> str:
    """The defaults of a flag by data set, for its help."""
    values: dict[str, list[str]] = {}
    for data, defaults in (DEFAULTS | {"own images": OWN}).items():
        values.setdefault(str(defaults[name]).strip("[']"), []).append(data)
    return " (default: " + "; ".join(f"{value} for {', '.join(data)}" for value, data in values.items()) + ")"


def argument_parser(script: str, description: str, beta: float = 2.5e-4, beta_flags=("--beta",)) -> Parser:
    """The flags that every script has; `script` is its __file__, beta the default weight of its latent term."""
    parser = Parser(Path(script).name, description)
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(DEFAULTS)}, or a folder, .npy or .npz of images")
    add("--data-dir", default="data", help="where data sets are looked for, downloaded to and cached")
    add("--image-size", type=int, help="32 or 64 pixels, height and width" + by_data("image_size"))
    add("--limit-train", type=int, help="use only the first so many training images")
    add("--limit-eval", type=int, help="use only the first so many validation and test images")
    add("--out", default="runs", help="folder that gets one folder for each run")
    add("--epochs", type=int, help="passes over the training images; 0: the untrained net" + by_data("epochs"))
    add("--batch-size", type=int, default=64, help="images a step (on each rank, under torchrun)")
    add("--lr", type=float, default=0.005, help="Adam's first learning rate")
    rules = "plateau: halved after 5 epochs without a better validation loss; linear: falls after 40%% of the epochs"
    add("--schedule", choices=("plateau", "linear"), help="of the learning rate; " + rules + by_data("schedule"))
    add(*beta_flags, dest="beta", type=float, default=beta, help="weight of the latent term")
    add("--latent-dim", type=int, help="n, dimensions of the latent space" + by_data("latent_dim"))
    add("--width", type=float, help="multiplies all hidden channels" + by_data("width"))
    add("--seed", type=int, default=0, help="of weights, shuffling, noise and evaluation")
    add("--device", default="auto", help="cuda, cuda:1 or cpu; auto: cuda if it is there")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="of the nets (default: bf16 on CUDA that has it)")
    add("--compile", action="store_true", help="torch.compile the nets")
    names = "imagenet, tf (the original FID's), lite0, lite0@PIXELS, classifier, a state dict on disk, or none"
    add("--fid", nargs="+", metavar="FEATURES", help=f"features of the distances: {names}" + by_data("fid"))
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root of the Fréchet distance")
    add("--save-images", action="store_true", help="write the evaluated and the test images too, as .npz")
    add("--resume", action="store_true", help="go on with this command's run if there is one, then evaluate (again)")
    return parser


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and fill in what the data set gives for flags that are not given, and the run's name; `start` adds the
    precision, `Run` how many images there are."""
    args = parser.parse_args(argv)
    args.data_dir, args.out = (str(Path(path).expanduser()) for path in (args.data_dir, args.out))
    script, data, defaults = Path(parser.prog).stem, args.dataset, DEFAULTS.get(args.dataset, OWN)
    if defaults is OWN:
        own = own_images(data).resolve()
        if own in Path(args.out, script).resolve().parents:
            raise UserError(f"--out {args.out} is below {own}/: its pictures would become images, give another folder")
        args.dataset, data = str(own), f"own-{own.name if own.is_dir() else own.stem}"  # found from anywhere
    name = [script, data]
    for flag, value in list(vars(args).items()):
        default = defaults.get(flag, parser.get_default(flag))
        if value is None:
            setattr(args, flag, default)
        elif value != default and flag not in UNNAMED | {"precision"}:  # whose default depends on the device
            name.append(flag.replace("_", "") + ("" if value is True else str(value)))
    args.script, args.data, args.ranks = script, data, WORLD_SIZE
    args.name = "-".join(name).encode()[:200].decode(errors="ignore") + f"-seed{args.seed}"
    args.channels, args.flip = defaults["channels"], defaults["flip"]
    python, file = (sys.orig_argv[0], sys.argv[0]) if argv is None else ("python", parser.prog)  # as it was started
    command = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if LAUNCHED else [python]
    again = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--resume"]
    args.command = shlex.join([*command, file, *again, "--resume"])
    return args


def write_csv(path: Path, rows: list[dict], heading: str = "") -> None:
    """Replace a CSV file by these rows, floats at full precision, under a heading; what a row lacks stays empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(heading)
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def locked(path: Path):
    """An open file, by which this process alone has its folder until it is closed. Raises UserError if another does."""
    file = open(path, "w")  # noqa: SIM115
    with suppress(ImportError):
        import fcntl  # not on Windows

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path.parent}/ is in use by another process, wait for it or end it") from error
        except OSError as error:  # a network's file system
            note(f"{path.parent}/ cannot be locked ({error.strerror}): start no second process in it")
    return file


def cli(main) -> None:
    """Run a script's main: a user's mistake, or a path that cannot be reached, is one line and exit code 2."""
    if not torch.cuda.is_available() or "cpu" in sys.argv or "--device=cpu" in sys.argv:
        keep_memory()
    try:
        with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
            main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory, lower --batch-size or --k"
        rank = f" (rank {RANK})" if RANK > 0 else ""
        print(f"{Path(sys.argv[0]).name}{rank}: error: {error}", file=Output(sys.stderr))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Output:
    """Standard output or error: letters that a terminal lacks are replaced, and where nobody reads any more (`| head`,
    a closed stream) the program goes on, silent."""

    def __init__(self, stream) -> None:
        if stream is None or getattr(stream, "closed", False):
            stream = open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="replace")
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with self._silent():
            self.stream.write(text)

    def flush(self) -> None:
        with self._silent():
            self.stream.flush()

    @contextmanager
    def _silent(self):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def keep_memory() -> None:
    """On Linux, make the process keep the memory that it frees, in huge pages: by default glibc gives large blocks back
    to the system, and each step pays again for clearing its gigabytes of activations (paper/README.md, Speed)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it makes its first tensor
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


# ---------------------------------------------------------------------------------------------------------------------
# Ranks (torchrun), device, precision, random streams

STREAMS = ("weights", "noise", "shuffle", "validation", "mixture", "pairs")


def stream_seed(seed: int, purpose: str, rank: int = 0, epoch: int = 0) -> int:
    """The seed of a run's random stream for one of STREAMS: other arguments give an independent stream."""
    return int(np.random.SeedSequence([seed, STREAMS.index(purpose), rank, epoch]).generate_state(1)[0])


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` is CUDA if it is there, else the CPU; under torchrun each rank has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and WORLD_SIZE > 1:
        raise UserError(f"--device {name}: all ranks would be on one GPU, give cuda")
    if name == "cuda" and LAUNCHED:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explained(f"--device {name} cannot be used (choose auto, cuda, cuda:1 or cpu)"):
        device = torch.empty(0, device=name).device
        if device.type not in ("cuda", "cpu"):
            raise ValueError("not supported")
        return device


def start(args: argparse.Namespace) -> torch.device:
    """Join the other ranks under torchrun, set precision and the weights' seed, return this rank's device. Raises
    UserError for a device or a precision that is not there."""
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # of which the next lines ask
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.device, args.precision = str(device), args.precision or ("bf16" if native else "fp32")
    if args.precision == "tf32" and not (cuda and torch.cuda.is_tf32_supported()):
        raise UserError(f"--precision tf32 does not exist on {device}: use fp32")
    if LAUNCHED and not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        wait = timedelta(hours=6)  # as long as a slow download may take
        dist.init_process_group(backend, timeout=wait, device_id=device if cuda else None)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(stream_seed(args.seed, "weights"))
    return device


def prepare(nets: tuple[nn.Module, nn.Module], args: argparse.Namespace, device: torch.device) -> nn.ModuleDict:
    """Encoder and decoder as one model on the device, alike on all ranks, in the precision asked for."""
    model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets, strict=True)))
    if any(nn.parameter.is_lazy(tensor) for tensor in model.state_dict().values()):
        raise UserError("nets(args) has a lazy layer that knows no sizes yet: run it once there")
    model.to(device)
    for tensor in (tensor for tensor in model.parameters() if tensor.dim() == 4):
        tensor.data = tensor.data.to(memory_format=torch.channels_last)
    if LAUNCHED:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    flagged = [net for net in model.modules() if hasattr(net, "bf16")]  # heads, terms and losses stay in float32
    if args.precision == "bf16" and not flagged:
        note("these nets have no flag bf16: they run in fp32")
        args.precision = "fp32"
    for net in flagged:
        net.bf16 = args.precision == "bf16"
    if args.compile:
        model["encoder"].compile()
        model["decoder"].compile()
    return model


def load_data(args: argparse.Namespace, device: torch.device) -> Dataset:
    """The data set of a run's arguments on the device. Raises UserError if it cannot be had or does not fit."""
    with rank_zero_first():
        data, digest = load_identified(args.dataset, args.data_dir, args.image_size)
    limits = args.limit_train, args.limit_eval, args.limit_eval
    data = Dataset(*(split[:limit] for split, limit in zip(data, limits, strict=True)))
    if digest:  # own images may change under their name
        args.images_sha256 = digest
    try:
        return Dataset(*(split.to(device) for split in data))
    except torch.OutOfMemoryError as error:
        size = sum(split.nbytes for split in data) / 2**30
        raise UserError(f"no room for the {size:.3g} GiB of images on {device}: lower --limit-train") from error


@contextmanager
def rank_zero_first():
    """Rank 0 goes through the block (downloading, caching) before the others do."""
    if LAUNCHED and RANK > 0:
        dist.barrier()
    yield
    if LAUNCHED and RANK == 0:
        dist.barrier()


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their mean over the ranks, in one all-reduce."""
    if tensors and LAUNCHED:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.div_(WORLD_SIZE).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(model: nn.Module) -> None:
    """After backward(): the mean of the ranks' gradients, so that the global batch is --batch-size × ranks."""
    average_over_ranks([p.grad for p in model.parameters() if p.grad is not None])


@contextmanager
def validating(model: nn.Module, seed: int):
    """Evaluation mode, no gradients, and the same noise every time."""
    average_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])  # batch norm's statistics
    torch.manual_seed(stream_seed(seed, "validation", RANK))
    with eval_mode(model), torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its checkpoints, its metrics


def posterior(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean [B,n] and scale of an encoder's posterior; of a deterministic encoder z and None. Raises UserError."""
    found = encoder(x)
    if not isinstance(found, Tensor | tuple):
        raise UserError(f"the encoder returns a {type(found).__name__}, not z or the tuple (mean, scale)")
    return found if isinstance(found, tuple) else (found, None)


def check_nets(model: nn.ModuleDict, loss, data: Dataset, args: argparse.Namespace) -> None:
    """Raise UserError unless there are enough images, and a few of them go through a copy of the nets and the loss as
    training and `fid.evaluate` need it. What raises inside one's own net or loss stays its traceback."""
    least = 2 * args.ranks, args.ranks, args.ranks
    if any(len(found) < needed for found, needed in zip(data, least, strict=True)):
        text = "{} training, {} validation and {} test images: give {}, {} and {} or more; of 10 a tenth is held out"
        raise UserError(text.format(*map(len, data), *least))
    most = len(data.train) // args.ranks
    if not 2 <= args.batch_size <= most:
        raise UserError(f"--batch-size {args.batch_size}: give 2 to {most}, the training images of each rank")
    encoder, decoder = copy.deepcopy(model).values()
    x = to_float(data.train[:4])
    with torch.no_grad(), eval_mode(encoder), eval_mode(decoder):
        mean, scale = posterior(encoder, x)
        if mean.dim() != 2 or len(mean) != len(x):
            raise UserError(f"the encoder's mean is {list(mean.shape)}: [{len(x)},n] is needed")
        images = decoder(100 * torch.randn_like(mean))  # far out, where an untrained net shows its range
    B, n = mean.shape
    if scale is not None:
        smallest = (scale.diagonal(dim1=-2, dim2=-1) if scale.dim() == 3 else scale).min()
        upper = scale.dim() == 3 and bool(scale.triu(1).any())  # Σ itself, or Lᵀ
        if scale.shape not in ((B, n), (B, n, n)) or not smallest > 0 or upper:
            raise UserError(
                f"the encoder's scale is {list(scale.shape)}, its smallest entry {smallest:.3g}: return (mean, scale) "
                f"with standard deviations [{B},{n}], exp(logvar / 2), or a lower Cholesky factor [{B},{n},{n}]"
            )
    if images.shape != x.shape:
        raise UserError(f"the decoder's images are {list(images.shape)}: {list(x.shape)} is needed")
    low, high = images.min(), images.max()
    if low < -1 or high > 1 or 0 <= low < high:
        note(
            f"the decoder's images are from {low:.3g} to {high:.3g} (far out, |z| of 100), they are clamped to -1 to 1"
        )
    for training in (True, False):  # False: as in validation
        with torch.set_grad_enabled(training):
            parts = loss(encoder.train(training), decoder.train(training), x, args)
        if shapes := {name: list(part.shape) for name, part in parts.items() if part.dim()}:
            raise UserError(f"the loss's parts have the shapes {shapes}: return their means")
        if training:
            parts["loss"].backward()


def learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """The scheduler that --schedule names; its step takes the validation loss, after each epoch. `linear`, for runs too
    short for the paper's rule: the first rate for S = 0.4 E epochs, then (E - e) / (E - S) of it in epoch e."""
    if args.schedule == "plateau":  # halved after 5 epochs without a better validation loss (Appendix A)
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, threshold=0)
    E = max(args.epochs, 1)
    return Linear(optimizer, lambda epoch: min(1, (E - epoch) / (E - 0.4 * E)))


class Linear(torch.optim.lr_scheduler.LambdaLR):
    """LambdaLR with the step of ReduceLROnPlateau."""

    def step(self, _validation_loss: float | None = None) -> None:
        super().step()


def load_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU, without executing code from it. Raises UserError naming the file."""
    with explained(f"cannot read {path} as a checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Replace a checkpoint. Raises UserError if the disk fails."""
    content = io.BytesIO()  # torch.save to a full disk is a RuntimeError, as a bug would be
    torch.save(state, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_trained(
    folder: str | Path, nets, device: str | torch.device = "cpu"
) -> tuple[nn.Module, nn.Module, argparse.Namespace]:
    """Encoder, decoder and arguments of the run in `folder`: its best checkpoint in float32, in evaluation mode, its
    parameters frozen. nets: the script's function that builds them, for example uae.nets. Raises UserError."""
    state = load_checkpoint(Path(folder).expanduser() / "best.pt")
    with explained(f"{folder} is no run of the script whose nets were given"):
        args = argparse.Namespace(**state["args"])
        model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets(args), strict=True)))
        model.load_state_dict(state["model"])
    model.to(device).eval().requires_grad_(False)
    return model["encoder"], model["decoder"], args


class Run:
    """A run's folder: args.json, metrics.csv and the checkpoints.
    `best.pt` (best validation loss; first the untrained net) is a dict of `model` with the keys `encoder.…` and
    `decoder.…`, `epoch`, `args` and `loss` (the best one); `last.pt` has `optimizer`, `scheduler` and `history` (rows
    of metrics.csv) beside them.
    """

    lock = None  # of the folder; a process has one run at a time

    def __init__(self, args: argparse.Namespace, model: nn.Module, optimizer, scheduler, data: Dataset) -> None:
        self.args, self.model, self.optimizer, self.scheduler, self.data = args, model, optimizer, scheduler, data
        self.dir, self.device = Path(args.out) / args.name, data.train.device
        args.images = [len(split) for split in data]  # compared when a run goes on
        self.epoch, self.best, self.history = 0, math.inf, []  # epochs done, best validation loss, rows of metrics.csv
        self.logged = []  # [(parts of the loss, images)] since the last call of `means`
        self.started, self.speed = time.perf_counter(), 0.0  # of the epoch; training images/s
        state = [self._open() if RANK == 0 else None]
        if LAUNCHED:
            dist.broadcast_object_list(state)
        if state[0]:
            self._load(state[0])
        elif RANK == 0:
            self._save(improved=True)  # from here on there is always a checkpoint to resume from
        if RANK == 0:
            print(f"if it is stopped, it goes on by: {args.command}")
            print("{}: {} training, {} validation and {} test images".format(args.data, *args.images))
            ranks = f" ({args.ranks} ranks)" if args.ranks > 1 else ""
            begin = f"goes on after epoch {self.epoch}" if state[0] else "a new run"
            if state[0] and "history" not in state[0]:
                begin = "last.pt is gone, best.pt is evaluated"
            print(f"{args.script}.py on {self.device}{ranks}, {args.precision}, in {self.dir}/: {begin}", flush=True)

    def _open(self) -> dict | None:
        """Make the folder this process's own; the last checkpoint in it, or None. Raises UserError for another's."""
        self.dir.mkdir(parents=True, exist_ok=True)
        if Run.lock:
            Run.lock.close()
        Run.lock = locked(self.dir / ".lock")
        for leftover in self.dir.glob(".tmp-*"):  # of a killed run
            leftover.unlink()
        file = last = self.dir / "last.pt"
        if not last.exists():
            file = self.dir / "best.pt"
            begun = (self.dir / "results.json").exists() or (file.exists() and load_checkpoint(file)["epoch"] > 0)
            if not begun:  # what a kill leaves before the first last.pt
                return None
        if not self.args.resume:
            does = "goes on with it" if file == last else "evaluates its best.pt, last.pt is gone"
            raise UserError(f"{self.dir} is there: --resume {does}; --seed or --out give another")
        state = load_checkpoint(file)
        with explained(f"cannot go on with {file}"):
            now, then = vars(self.args), state["args"]
            if "images_crc32" in then:
                raise UserError("it is from before own images were known by their files' bytes, give another --out")
            may_differ = UNNAMED - {"seed"} | {"command"}
            if file != last or state["epoch"] >= now["epochs"]:  # nothing is trained any more
                may_differ |= {"precision", "ranks"}
            names = [n for n in sorted((now.keys() | then.keys()) - may_differ) if now.get(n) != then.get(n)]
            if names:
                said = {"images": "images (training, validation, test)"}
                differ = [f"{said.get(n, n)} is {now.get(n)}, was {then.get(n)}" for n in names if n != "images_sha256"]
                if "images_sha256" in names:
                    differ.append("files of the images changed")
                raise UserError(f"other arguments ({'; '.join(differ)}), give another --out")
        return state

    def _load(self, state: dict) -> None:
        """Take over a checkpoint; best.pt alone has neither optimizer nor history and is not trained on."""
        with explained(f"the checkpoint in {self.dir}/ does not fit these nets, give another --out"):
            self.model.load_state_dict(state["model"])
            if "history" in state:
                for group, ours in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                    group["fused"] = ours.get("fused")  # of this device, not of the one before
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
        self.epoch = state["epoch"] if "history" in state else self.args.epochs
        self.best, self.history = state["loss"], state.get("history", [])

    def batches(self) -> Iterator[Tensor]:
        """An epoch of this rank's training batches, with its own noise, under a progress bar of all ranks' images."""
        args, images = self.args, self.data.train
        torch.manual_seed(stream_seed(args.seed, "noise", RANK, self.epoch))
        shuffle = stream_seed(args.seed, "shuffle", epoch=self.epoch)  # the same on all ranks
        self.started, done = time.perf_counter(), 0
        with progress(f"epoch {self.epoch + 1}/{args.epochs}", len(images)) as bar:
            for x in epoch_batches(images, args.batch_size, shuffle, args.flip):
                yield x
                done += len(x) * args.ranks
                bar.update(len(x) * args.ranks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.speed = done / (time.perf_counter() - self.started)

    def log(self, parts: dict[str, Tensor], images: int) -> None:
        """Keep a step's losses, on the device."""
        self.logged.append(({name: part.detach() for name, part in parts.items()}, images))

    def means(self) -> dict[str, float]:
        """The image-weighted means over all ranks of what was logged since the last call. Raises UserError for NaN."""
        names = list(self.logged[0][0])
        values = torch.stack([torch.stack(list(parts.values())) for parts, _ in self.logged]).cpu().double()
        weights = torch.tensor([images for _, images in self.logged], dtype=torch.float64)
        self.logged = []
        if not values.isfinite().all():  # [steps, parts]
            step = int(values.isfinite().all(1).long().argmin())
            parts = ", ".join(f"{name} {value:g}" for name, value in zip(names, values[step].tolist(), strict=True))
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {step + 1} ({parts}): "
                f"lower --lr; {self.dir / 'last.pt'} is the last good checkpoint"
            )
        sums = torch.cat([(values * weights[:, None]).sum(0), weights.sum()[None]])
        if LAUNCHED:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def end_epoch(self, lr: float, train: dict[str, float], validation: dict[str, float]) -> None:
        """Count the epoch, keep its row of metrics.csv, print it, and write the checkpoints."""
        self.epoch += 1
        row = {"epoch": self.epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"val_{name}": value for name, value in validation.items()}
        self.history.append(row | {"seconds": time.perf_counter() - self.started, "images_per_s": self.speed})
        improved = validation["loss"] < self.best
        self.best = min(self.best, validation["loss"])
        if RANK == 0:
            self._save(improved)
            left = (self.args.epochs - self.epoch) * statistics.median(row["seconds"] for row in self.history)
            print(
                f"epoch {self.epoch}/{self.args.epochs}  train {train['loss']:.5f}  validation {validation['loss']:.5f}"
                f"  lr {lr:.2g}  {self.speed:.0f} images/s  {tqdm.format_interval(left)} left",
                flush=True,
            )

    def _save(self, improved: bool) -> None:
        """Write args.json, metrics.csv, best.pt if the epoch was the best, and last.pt: a run killed before does the
        epoch again."""
        best = {"model": self.model.state_dict(), "epoch": self.epoch, "args": vars(self.args), "loss": self.best}
        last = best | {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler")}
        last["history"] = self.history
        with replacing(self.dir / "args.json") as temporary:
            temporary.write_text(json.dumps(vars(self.args), indent=1))
        if self.history:
            write_csv(self.dir / "metrics.csv", self.history)
        if improved:
            save_checkpoint(self.dir / "best.pt", best)
        save_checkpoint(self.dir / "last.pt", last)
