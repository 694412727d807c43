"""Regularised Autoencoder (RAE; Ghosh et al., 2019) with its four decoder regularisations, the baseline of Table 2.

    L = ‖x - D(z)‖² + β ‖z‖² + γ R(D),   z = E(x)                                                           (Eq. 16)
    R = 0 (none), ‖∇_z D(z)‖² (gp), ‖θ‖² of the decoder's weights (l2), or 0 with a spectrally normalised D (sn)

    python rae.py                                            # embedded digits, a few minutes on a CPU
    python rae.py --dataset cifar10                          # Table 2, RAE-no-reg.
    python rae.py --dataset cifar10 --decoder-reg gp         # Table 2, RAE-GP; also l2, sn

What the paper leaves open: ‖·‖² of images is the mean over pixels; the Jacobian's norm is a one-draw unbiased
estimate. paper/README.md lists every such decision.
"""

from argparse import Namespace

import torch
from torch import Tensor, nn

import common
import fid
import harness
from common import Decoder, Encoder, UserError, gradient_penalty


def arguments(argv: list[str] | None = None) -> Namespace:
    """The flags of this script, checked, and what the data set gives for those not given."""
    parser = harness.argument_parser(__file__, __doc__, beta=1e-4)
    add = parser.add_argument
    add("--decoder-reg", choices=("none", "gp", "l2", "sn"), default="none", help="regularisation of the decoder")
    add("--gamma", type=float, default=1e-6, help="weight of gp and l2")
    args = harness.parse_args(parser, argv)
    if args.gamma != parser.get_default("gamma") and args.decoder_reg not in ("gp", "l2"):
        raise UserError(f"--gamma {args.gamma} weighs nothing: add --decoder-reg gp or l2")
    args.label = {"none": "RAE-no-reg", "gp": "RAE-GP", "l2": "RAE-L2", "sn": "RAE-SN"}[args.decoder_reg]
    return args


def nets(args: Namespace) -> tuple[nn.Module, Decoder]:
    """Encoder, x [B,C,H,W] -> z [B,n]; decoder, z [M,n] -> images [M,C,H,W] (Table 4)."""
    net = Encoder(args.channels, args.image_size, args.width)
    encoder = nn.Sequential(net, nn.Linear(net.features, args.latent_dim))
    decoder = Decoder(args.latent_dim, args.channels, args.image_size, args.width)
    if args.decoder_reg == "sn":
        for layer in [module for module in decoder.modules() if isinstance(module, nn.Linear | nn.ConvTranspose2d)]:
            nn.utils.parametrizations.spectral_norm(layer)
            layer.parametrizations.weight[0] = Float32(layer.parametrizations.weight[0])
    return encoder, decoder


class Float32(nn.Module):
    """A parametrisation in float32 under autocast too: on CUDA its power iteration would be in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self.inner(weight)


def weight_norm(decoder: nn.Module) -> Tensor:
    """‖θ‖²: the squared norm of all weight matrices and kernels of the decoder, without biases and batch norm."""
    return sum(parameter.square().sum() for parameter in decoder.parameters() if parameter.dim() > 1)


def loss(encoder: nn.Module, decoder: nn.Module, x: Tensor, args: Namespace) -> dict[str, Tensor]:
    """The loss and its parts, averaged over the batch; x [B,C,H,W] in [-1,1]. Minimise ["loss"]."""
    z = encoder(x)  # [B,n]
    gp = args.decoder_reg == "gp"
    fold = decoder.fold(z, penalty=gp)  # the first layers as one matrix, where faster
    rec = (x - decoder(z, fold)).square().mean((1, 2, 3))  # [B]
    reg = z.square().sum(1)  # ‖z‖² [B]
    parts = {"loss": rec + args.beta * reg, "rec": rec, "reg": reg}
    if args.decoder_reg in ("gp", "l2"):
        parts[args.decoder_reg] = gradient_penalty(decoder, z, fold=fold) if gp else weight_norm(decoder)
        parts["loss"] = parts["loss"] + args.gamma * parts[args.decoder_reg]  # Eq. 16
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
