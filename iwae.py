"""Importance-Weighted Autoencoder (IWAE; Burda, Grosse, Salakhutdinov, 2016), the baseline of Table 6.

    L = -β log 1/K Σ_k exp(-ℓ_k / β),   ℓ_k = ‖x - D(z_k)‖² + β (log q(z_k|x) - log p(z_k))
    z_k = μ + σ ε_k, ε_k ~ N(0, I), {μ, σ} = E(x), p = N(0, I)                                               (Eq. 4)

    python iwae.py                                # embedded digits, a few minutes on a CPU
    python iwae.py --dataset cifar10 --k 8        # Table 6, IWAE_8x

The bound stands at the scale of the other models' losses: with K = 1 it is the VAE's one-sample objective, and more
samples lower it. Samples with a smaller ℓ_k weigh more. What the paper leaves open: ‖·‖² of images is the mean over
pixels. paper/README.md lists every such decision.
"""

import math
from argparse import Namespace

import torch
from torch import Tensor, nn

import common
import fid
import harness
from common import Decoder, Encoder, GaussianHead, UserError, sample_gaussian


def arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script, checked, and what the data set gives for those not given."""
    parser = harness.argument_parser(__file__, __doc__)
    add = parser.add_argument
    add("--k", type=int, default=8, help="importance samples an image")
    args = harness.parse_args(parser, argv)
    if args.beta == 0:
        raise UserError("--beta 0: the bound divides by beta, give a number above 0")
    args.label = f"IWAE {args.k}x"
    return args


def nets(args: Namespace) -> tuple[nn.Module, Decoder]:
    """Encoder, x [B,C,H,W] -> mu [B,n] and scale [B,n]; decoder, z [M,n] -> images [M,C,H,W] (Table 4)."""
    net = Encoder(args.channels, args.image_size, args.width)
    encoder = nn.Sequential(net, GaussianHead(net.features, args.latent_dim))
    return encoder, Decoder(args.latent_dim, args.channels, args.image_size, args.width)


def log_ratio(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log N(z; mu, σ²) - log N(z; 0, I) of samples z [B,K,n] of posteriors mu, sigma [B,n]: -> [B,K], in nats."""
    noise = (z - mu.unsqueeze(1)) / sigma.unsqueeze(1)  # ε [B,K,n]
    return 0.5 * (z.square() - noise.square()).sum(2) - sigma.log().sum(1, keepdim=True)


def bound(losses: Tensor, beta: float) -> Tensor:
    """-β log 1/K Σ_k exp(-ℓ_k / β) of losses ℓ [B,K]: -> [B]. Its gradient weighs them by softmax(-ℓ / β)."""
    return -beta * ((-losses / beta).logsumexp(1) - math.log(losses.shape[1]))


def loss(encoder: nn.Module, decoder: nn.Module, x: Tensor, args: Namespace) -> dict[str, Tensor]:
    """The loss and its parts, averaged over the batch; x [B,C,H,W] in [-1,1]. Minimise ["loss"]."""
    mu, sigma = encoder(x)  # [B,n] each
    z = sample_gaussian(mu, sigma, args.k)  # [B,K,n], Eq. 4
    images = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # [B,K,C,H,W]
    rec = (x.unsqueeze(1) - images).square().mean((2, 3, 4))  # [B,K]
    reg = log_ratio(z, mu, sigma)  # [B,K]
    total = bound(rec + args.beta * reg, args.beta)  # [B]
    return {"loss": total.mean(), "rec": rec.mean(), "reg": reg.mean()}


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
