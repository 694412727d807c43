"""Unscented Autoencoder (UAE): sigma points, mean decoded image, Wasserstein metric, decoder regularisation.

    L = ‖x - 1/K Σ_k D(z_k)‖² + β W₂(N(μ, Σ), N(0, I)) + γ λ_max(Σ) ‖∇_μ D(μ)‖²                   (Eq. 8, 9, 12, 19)
    z_k drawn from the 2n+1 sigma points of N(μ, Σ), {μ, Σ} = E(x)                                       (Eq. 5, 9)

    python uae.py                                  # embedded digits, a few minutes on a CPU
    python uae.py --dataset cifar10 --k 8          # Table 2, UAE_8x
    python uae.py --dataset path/to/my/images --image-size 64
    torchrun --nproc-per-node 4 uae.py --dataset celeba

What the paper leaves open: ‖·‖² of images is the mean over pixels; W₂ is the root of what Eq. 19 calls so,
--regularizer w2-squared without it; κ = 1/2; the Jacobian's norm is a one-draw unbiased estimate. paper/README.md
lists every such decision.
"""

from argparse import Namespace

import torch
from torch import Tensor, nn

import common
import fid
import harness
from common import (
    Decoder,
    Encoder,
    GaussianHead,
    gradient_penalty,
    largest_variance,
    sample_sigma_points,
    wasserstein2,
    wasserstein2_norms,
)


def arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script, checked, and what the data set gives for those not given."""
    parser = harness.argument_parser(__file__, __doc__)
    add = parser.add_argument
    add("--k", type=int, default=8, help="sigma points an image, at most 2n+1")
    add("--sigma-points", choices=common.HEURISTICS, help="which of the 2n+1" + harness.by_data("sigma_points"))
    add("--kappa", type=float, default=0.5, help="radius sqrt(kappa + n) of the sigma points")
    add("--covariance", choices=("diagonal", "full"), default="diagonal", help="of the posterior")
    choices = ("w2", "w2-squared", "w2-norms")
    add("--regularizer", choices=choices, default="w2", help="Wasserstein metric, its square, or two norms")
    add("--gamma", type=float, default=1e-6, help="weight of the decoder regularisation")
    args = harness.parse_args(parser, argv)
    common.check_sigma_points(args.k, args.latent_dim, args.kappa)
    variant = {"w2": "", "w2-squared": "²", "w2-norms": "ⁿ"}[args.regularizer]
    if args.covariance == "full":
        variant += "-full"
    args.label = f"UAE{variant} {args.k}x {args.sigma_points}"
    if args.kappa != 0.5:
        args.label += f" κ={args.kappa:g}"
    return args


def nets(args: Namespace) -> tuple[nn.Module, Decoder]:
    """Encoder, x [B,C,H,W] -> mu [B,n] and scale [B,n] or L [B,n,n]; decoder, z [M,n] -> images [M,C,H,W] (Table 4)."""
    net = Encoder(args.channels, args.image_size, args.width)
    encoder = nn.Sequential(net, GaussianHead(net.features, args.latent_dim, args.covariance))
    return encoder, Decoder(args.latent_dim, args.channels, args.image_size, args.width)


def loss(encoder: nn.Module, decoder: nn.Module, x: Tensor, args: Namespace) -> dict[str, Tensor]:
    """The loss (Eq. 8) and its parts, averaged over the batch; x [B,C,H,W] in [-1,1]. Minimise ["loss"]."""
    mu, scale = encoder(x)  # [B,n], [B,n] or L [B,n,n]
    z = sample_sigma_points(mu, scale, args.k, args.sigma_points, args.kappa)  # [B,K,n], Eq. 5
    fold = decoder.fold(z, penalty=args.gamma > 0)  # the first layers as one matrix, where faster
    images = decoder(z.flatten(0, 1), fold).unflatten(0, z.shape[:2])  # [B,K,C,H,W]
    rec = (x - images.mean(1)).square().mean((1, 2, 3))  # Eq. 9
    if args.regularizer == "w2-norms":
        reg = wasserstein2_norms(mu, scale)  # what the authors' published code minimises
    else:
        reg = wasserstein2(mu, scale, squared=args.regularizer == "w2-squared")  # Eq. 19, 20
    parts = {"loss": rec + args.beta * reg, "rec": rec, "reg": reg}
    if args.gamma > 0:
        parts["gp"] = largest_variance(scale) * gradient_penalty(decoder, mu, fold=fold)  # Eq. 12
        parts["loss"] = parts["loss"] + args.gamma * parts["gp"]  # Eq. 8
    return {name: part.mean() for name, part in parts.items()}


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    device = harness.start(args)
    model = harness.prepare(nets(args), args, device)
    encoder, decoder = model.values()
    data = harness.load_data(args, device)  # by common.load_dataset
    harness.check_nets(model, loss, data, args)
    features = fid.load_features(args, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type == "cuda")
    scheduler = harness.learning_rate(optimizer, args)  # the rule of --schedule
    run = harness.Run(args, model, optimizer, scheduler, data)
    while run.epoch < args.epochs:
        model.train()
        for x in run.batches():
            parts = loss(encoder, decoder, x, args)
            optimizer.zero_grad()
            parts["loss"].backward()
            harness.average_gradients(model)
            optimizer.step()
            run.log(parts, len(x))
        train, lr = run.means(), scheduler.get_last_lr()[0]
        with harness.validating(model, args.seed):
            for x in common.validation_batches(data.val, args.batch_size):
                run.log(loss(encoder, decoder, x, args), len(x))
        validation = run.means()
        scheduler.step(validation["loss"])
        run.end_epoch(lr, train, validation)
    return fid.evaluate(run, data, features)


if __name__ == "__main__":
    harness.cli(main)
