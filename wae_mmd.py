"""Wasserstein Autoencoder with the MMD penalty (WAE-MMD; Tolstikhin et al., 2018), the baseline of Table 10.

    L = ‖x - D(z)‖² + λ MMD²(z, N(0, I)),   z = E(x)
    MMD² = E k(z,z') + E k(p,p') - 2 E k(z,p),   p ~ N(0, I), k(a,b) = C / (C + ‖a-b‖²), C = 2n

    python wae_mmd.py                                        # embedded digits, a few minutes on a CPU
    python wae_mmd.py --dataset cifar10                      # Table 10, WAE-MMD with λ = 10

Here --beta is another name of --mmd-weight, λ. What the paper leaves open: ‖·‖² of images is the mean over pixels; the
kernel and its scale; --kernel rbf takes k = exp(-‖a-b‖² / C). paper/README.md lists every such decision.
"""

from argparse import Namespace

import torch
from torch import Tensor, nn

import common
import fid
import harness
from common import Decoder, Encoder


def arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script, checked, and what the data set gives for those not given."""
    parser = harness.argument_parser(__file__, __doc__, beta=10.0, beta_flags=("--mmd-weight", "--beta"))
    add = parser.add_argument
    add("--kernel", choices=("imq", "rbf"), default="imq", help="inverse multiquadric or Gaussian")
    args = harness.parse_args(parser, argv)
    args.label = "WAE-MMD" if args.kernel == "imq" else "WAE-MMD rbf"
    return args


def nets(args: Namespace) -> tuple[nn.Module, Decoder]:
    """Encoder, x [B,C,H,W] -> z [B,n]; decoder, z [M,n] -> images [M,C,H,W] (Table 4)."""
    net = Encoder(args.channels, args.image_size, args.width)
    encoder = nn.Sequential(net, nn.Linear(net.features, args.latent_dim))
    return encoder, Decoder(args.latent_dim, args.channels, args.image_size, args.width)


def mmd(z: Tensor, p: Tensor, kernel: str = "imq") -> Tensor:
    """Unbiased estimate (U-statistic) of MMD² between the distributions of z and p, both [B,n]; may be negative.

    kernel: `imq`, the inverse multiquadric C/(C + d²), or `rbf`, exp(-d²/C); C = 2n, the mean of d² under N(0, I).
    """
    scale = 2 * z.shape[1]

    def k(a: Tensor, b: Tensor) -> Tensor:
        squared = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(2)  # ‖a_i - b_j‖² [B,B]
        return scale / (scale + squared) if kernel == "imq" else (-squared / scale).exp()

    if len(z) == 1:
        return z.new_zeros(())  # one image, the last of a validation, has no pairs
    pairs = len(z) * (len(z) - 1)  # without the diagonal, where k = 1
    zz, pp = ((k(a, a).sum() - len(a)) / pairs for a in (z, p))
    return zz + pp - 2 * k(z, p).mean()


def gather(x: Tensor) -> Tensor:
    """In training the rows of x [B,...] of all ranks, [B·ranks,...], differentiable; elsewhere x itself."""
    if common.WORLD_SIZE == 1 or not torch.is_grad_enabled():
        return x
    from torch.distributed.nn.functional import all_gather  # not in every build of torch

    return torch.cat(all_gather(x))


def loss(encoder: nn.Module, decoder: nn.Module, x: Tensor, args: Namespace) -> dict[str, Tensor]:
    """The loss and its parts, averaged over the batch; x [B,C,H,W] in [-1,1]. Minimise ["loss"]."""
    z = encoder(x)  # [B,n]
    rec = (x - decoder(z)).square().mean()
    codes = gather(z)  # of the whole batch, under torchrun
    reg = mmd(codes, torch.randn_like(codes), args.kernel)
    return {"loss": rec + args.beta * reg, "rec": rec, "reg": reg}


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
