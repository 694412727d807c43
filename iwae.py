"""Importance-Weighted Autoencoder (IWAE; Burda, Grosse, Salakhutdinov, 2016), the baseline of Table 6.

    L = -β log 1/K Σ_k exp(-ℓ_k / β),   ℓ_k = ‖x - D(z_k)‖² + β (log q(z_k|x) - log p(z_k))
    z_k = μ + σ ε_k, ε_k ~ N(0, I), {μ, σ} = E(x), p = N(0, I)                                               (Eq. 4)

    python iwae.py                                # embedded digits, a few minutes on a CPU
    python iwae.py --dataset cifar10 --k 8        # Table 6, IWAE_8x

The bound stands at the scale of the other models' losses: with K = 1 it is the VAE's one-sample objective, and more
samples lower it. Samples with a smaller ℓ_k weigh more. What the paper leaves open: ‖·‖² of images is the mean over
pixels. README.md lists every such decision.
"""

import math

import torch
from torch import Tensor, nn

import common
import fid
from common import Decoder, Encoder, GaussianHead, sample_gaussian


def log_ratio(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log N(z; mu, σ²) - log N(z; 0, I) of samples z [B,K,n] of posteriors mu, sigma [B,n]: -> [B,K], in nats."""
    noise = (z - mu.unsqueeze(1)) / sigma.unsqueeze(1)  # ε [B,K,n]
    return 0.5 * (z.square() - noise.square()).sum(2) - sigma.log().sum(1, keepdim=True)


def bound(losses: Tensor, beta: float) -> Tensor:
    """-β log 1/K Σ_k exp(-ℓ_k / β) of losses ℓ [B,K]: -> [B]. Its gradient gives the samples softmax(-ℓ / β)."""
    return -beta * ((-losses / beta).logsumexp(1) - math.log(losses.shape[1]))


def loss(encoder: nn.Module, decoder: Decoder, x: Tensor, args) -> dict[str, Tensor]:
    """The loss and its parts, averaged over the batch; x [B,C,H,W] in [-1,1]. Minimise ["loss"]."""
    mu, sigma = encoder(x)  # [B,n] each
    z = sample_gaussian(mu, sigma, args.k)  # [B,K,n], Eq. 4
    images = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # [B,K,C,H,W]
    rec = (x.unsqueeze(1) - images).square().mean((2, 3, 4))  # [B,K]
    reg = log_ratio(z, mu, sigma)  # [B,K]
    total = bound(rec + args.beta * reg, args.beta)  # [B]
    return {"loss": total.mean(), "rec": rec.mean(), "reg": reg.mean()}


def main(argv: list[str] | None = None) -> dict:
    parser = common.argument_parser(__file__, __doc__)
    add = parser.add_argument
    add("--k", type=common.number(int, 1), default=8, help="importance samples an image")
    args = common.parse_args(parser, argv)
    if args.beta == 0:
        raise common.UserError("--beta 0: the bound divides by beta, give a number above 0")
    label = f"IWAE {args.k}x"
    device = common.start(args)

    net = Encoder(args.channels, args.image_size, args.width)
    encoder = nn.Sequential(net, GaussianHead(net.features, args.latent_dim))
    decoder = Decoder(args.latent_dim, args.channels, args.image_size, args.width)
    model = common.prepare(nn.ModuleDict({"encoder": encoder, "decoder": decoder}), args, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type == "cuda")
    # halved after 5 epochs without a better validation loss
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, threshold=0)

    def train_step(x: Tensor) -> dict[str, Tensor]:
        parts = loss(encoder, decoder, x, args)
        optimizer.zero_grad()
        parts["loss"].backward()
        common.average_gradients(model)
        optimizer.step()
        return parts

    if args.benchmark:
        return common.benchmark(train_step, model, args, device)

    data = common.load_data(args, device)
    features = fid.load_features(args, data, encoder, decoder, device)
    run = common.Run(args, model, optimizer, scheduler, data, device)
    while run.epoch < args.epochs and not args.eval_only:
        model.train()
        for x in run.batches(data.train):
            run.log(train_step(x), len(x))
        train = run.means()
        with common.validating(model, device, args.seed):
            for x in common.validation_batches(data.val, args.batch_size):
                run.log(loss(encoder, decoder, x, args), len(x))
        validation = run.means()
        scheduler.step(validation["loss"])
        run.end_epoch(train, validation)
    return fid.evaluate(run, label, encoder, decoder, data, features)


if __name__ == "__main__":
    common.cli(main)
