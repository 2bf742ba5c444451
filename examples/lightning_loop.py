"""A loop as Lightning has it: `training_step` of a module that optimizes by hand.

A natural step measures curvature, tries steps and takes bad ones back, which no optimizer can do
that is only handed gradients. So the module sets `automatic_optimization = False`, Lightning's
manual optimization, and its `training_step` is one `svi.step`. Checkpoints of Lightning carry the
state of the training, so that `Trainer.fit(..., ckpt_path=...)` goes on to the last bit.

Lightning counts the steps of its own optimizers, of which there are none here: give it
`max_epochs`, not `max_steps`.

Run it as `python -m examples.lightning_loop`, or with `--quick` for a small version. Where
Lightning is installed, its `Trainer` runs the loop, else the few lines of `fit`, which do the same.
It writes the checkpoint last.ckpt to the output folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyronat
from models.helmholtz import Helmholtz
from models.vae import make_data

try:
    from lightning import LightningModule, Trainer
except ImportError:
    LightningModule, Trainer = nn.Module, None

Batches = DataLoader[Tensor]


class Digits(LightningModule):  # type: ignore[misc]
    """A Helmholtz machine of digits and its training."""

    def __init__(self, steps: int) -> None:
        """Makes machine, optimizer and training.

        Args:
            steps: Length of the training.
        """
        super().__init__()
        self.automatic_optimization = False
        self.machine = Helmholtz((64, 24, 8))
        optim = pyronat.NaturalGradient(lr=pyronat.steps.LinearDecay(0.3, steps))
        loss = pyronat.ReweightedWakeSleep(num_particles=5)
        self.svi = pyronat.NaturalSVI(self.machine.model, self.machine.guide, optim, loss)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> None:
        """One step; without a return value, as Lightning wants it of manual optimization."""
        self.losses.append(self.svi.step(batch) / len(batch))
        if Trainer is not None:
            info = self.svi.info
            self.log_dict({"loss": self.losses[-1], "kl": info.kl, "ess": info.ess}, prog_bar=True)

    def configure_optimizers(self) -> None:
        """None: `training_step` moves the parameters."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts all that the training depends on into a checkpoint."""
        checkpoint["svi"] = self.svi.get_state()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes it from there."""
        self.svi.set_state(checkpoint["svi"])


def fit(module: Digits, batches: Batches, epochs: int, folder: Path) -> None:
    """What `Trainer.fit` does of it: epochs of training steps, then a checkpoint.

    Args:
        module: The module.
        batches: Its data.
        epochs: How often to see them.
        folder: Where the checkpoint goes.
    """
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            module.training_step(batch, index)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a Helmholtz machine.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description="Natural gradients in a loop of Lightning.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("lightning-output"))
    parser.add_argument("--quick", action="store_true", help="2 epochs")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    epochs = 2 if options.quick else options.epochs
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    batches: Batches = DataLoader(make_data(seed=0), batch_size=100, shuffle=True)
    module = Digits(epochs * len(batches))
    if Trainer is None:
        fit(module, batches, epochs, options.output)
    else:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=options.output,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
        trainer.save_checkpoint(options.output / "last.ckpt")
    per_epoch = torch.tensor(module.losses).reshape(epochs, -1).mean(1)
    print("loss (nats per digit) by epoch:", [round(loss, 2) for loss in per_epoch.tolist()])
    print(f"Wrote to {options.output}")


if __name__ == "__main__":
    main()
