"""A variational autoencoder of handwritten digits, trained by natural gradients in minibatches.

Encoder and decoder are plain modules of torch, which `pyro.module` registers; nothing in them knows
of natural gradients. `pyronat.analyze` finds that each network is one joint block of the Fisher
information. After training, `pyro.infer.Predictive` and the modules themselves draw digits.

Run it as `python -m examples.vae`, or with `--quick` for a small version. It prints the negative
ELBO of held-out digits, and writes to the output folder:

* log.jsonl: a line for each step;
* course.png: the course of the training;
* digits.png: held-out digits, what the decoder makes of their codes, and digits from the prior.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyronat
from models.vae import make_data
from pyronat import plot

PIXELS, HIDDEN, CODE = 64, 128, 8
TRAIN, SHOWN = 1400, 20


class Encoder(nn.Module):
    """Location and scale of the code of each digit."""

    def __init__(self) -> None:
        """Makes a network with random weights."""
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.heads = nn.Linear(HIDDEN, 2 * CODE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reads digits, shape [batch, pixels]."""
        loc, log_scale = self.heads(softplus(self.hidden(x))).chunk(2, -1)
        return loc, log_scale.exp()


class VAE(nn.Module):
    """Model and guide with their networks."""

    def __init__(self) -> None:
        """Makes both networks with random weights."""
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(
            nn.Linear(CODE, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, PIXELS)
        )

    def model(self, x: Tensor) -> None:
        """Codes, and the pixels made of them; digits have shape [batch, pixels]."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("digits", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(CODE), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Codes given the pixels; digits have shape [batch, pixels]."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("digits", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))


def draw(vae: VAE, x: Tensor, path: Path) -> None:
    """Draws digits, what the decoder makes of their codes, and digits from the prior.

    Args:
        vae: The trained networks.
        x: Digits, shape [SHOWN, pixels].
        path: The picture.
    """
    with torch.no_grad():
        again = vae.decoder(vae.encoder(x)[0]).sigmoid()
        # Without a guide and with its data set free, the model dreams.
        dreams = Predictive(poutine.uncondition(vae.model), num_samples=1)(x)
        prior = vae.decoder(dreams["z"].squeeze(0)).sigmoid()
    kinds = {"held out": x, "from their codes": again, "from the prior": prior}
    plot.samples({"digits": kinds}, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a VAE, and draws what it has learned.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description="A VAE of digits by natural gradients.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("vae-output"))
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    epochs = 3 if options.quick else options.epochs
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    data = make_data(seed=0)
    train, held_out = data[:TRAIN], data[TRAIN:]
    vae = VAE()
    print(pyronat.analyze(vae.model, train[:5], guide=vae.guide))

    infos: list[pyronat.StepInfo] = []
    steps = epochs * -(-TRAIN // options.batch_size)
    optim = pyronat.NaturalGradient(lr=pyronat.steps.LinearDecay(0.3, steps))
    (options.output / "log.jsonl").unlink(missing_ok=True)
    with pyronat.JSONLines(options.output / "log.jsonl") as log:
        callbacks = [log, lambda info, svi: infos.append(info)]
        svi = pyronat.NaturalSVI(vae.model, vae.guide, optim, Trace_ELBO(), callbacks)
        for epoch in range(epochs):
            for index in torch.randperm(TRAIN).split(options.batch_size):
                svi.step(train[index])
            if (epoch + 1) % -(-epochs // 6) == 0:
                loss = svi.evaluate_loss(held_out) / len(held_out)
                print(f"epoch {epoch + 1}: {loss:.2f} nats for each held-out digit")
    svi.settle(train)
    plot.training(infos, options.output / "course.png", options.batch_size, "a VAE of digits")
    draw(vae, held_out[:SHOWN], options.output / "digits.png")
    print(f"\nWrote to {options.output}")


if __name__ == "__main__":
    main()
