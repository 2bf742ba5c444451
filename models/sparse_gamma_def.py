"""A sparse gamma deep exponential family of images: three layers of gamma variables.

The intensities of an image are Poisson counts whose means are sparse sums of nonnegative features,
whose weights are gamma variables with means from the layer above, and so on for three layers. The
features are gamma variables too. The guide is a product of gamma distributions, with parameters of
its own for each image. (R. Ranganath, L. Tang, L. Charlin and D. M. Blei, "Deep exponential
families", AISTATS 2015.)

The data are scikit-learn's 8 × 8 digits with their 17 intensities. There is no exact referee; the
ELBO of many samples compares guides.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

LAYERS = ("top", "mid", "bottom")
SMALLEST_SHAPE = -2.25
"""Lower bound on the free parameter of a gamma shape: softplus(−2.25) = 0.1."""
SMALLEST_MEAN = -4.5
"""Lower bound on the free parameter of a gamma mean: softplus(−4.5) = 0.011."""


class SparseGammaDEF:
    """A sparse gamma DEF with a mean-field guide, after Pyro's example.

    Attributes:
        widths: Units of the top, middle and bottom layer, and pixels.
        latent_shape: Shape of the layers' gamma priors; small ones make them sparse.
        weight_shape: Shape of the features' gamma priors.
        weight_rate: Their rate.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (5, 10, 20, 64),
        latent_shape: float = 0.1,
        weight_shape: float = 0.1,
        weight_rate: float = 0.3,
    ) -> None:
        """Makes a model; the guide's parameters are made on first use.

        Args:
            widths: Units of the top, middle and bottom layer, and pixels.
            latent_shape: Shape of the layers' gamma priors; small ones make them sparse.
            weight_shape: Shape of the features' gamma priors.
            weight_rate: Their rate.
        """
        self.widths = widths
        self.latent_shape = latent_shape
        self.weight_shape = weight_shape
        self.weight_rate = weight_rate

    def model(self, x: Tensor) -> None:
        """Features, layers and intensities.

        Args:
            x: Intensities, counts as floats, shape [images, pixels].
        """
        weights = {}
        for name, above, below in zip(LAYERS, self.widths, self.widths[1:], strict=False):
            shape = x.new_full((above, below), self.weight_shape)
            prior = dist.Gamma(shape, self.weight_rate).to_event(2)
            weights[name] = pyro.sample(f"w_{name}", prior)
        with pyro.plate("data", len(x)):
            mean = x.new_ones(self.widths[0])
            for name in LAYERS:
                rate = self.latent_shape / mean
                z = pyro.sample(f"z_{name}", dist.Gamma(self.latent_shape, rate).to_event(1))
                mean = (z.unsqueeze(-2) @ weights[name]).squeeze(-2)  # also with particles
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Independent gamma variables.

        Args:
            x: Intensities, counts as floats, shape [images, pixels].
        """
        for name, above, below in zip(LAYERS, self.widths, self.widths[1:], strict=False):
            pyro.sample(f"w_{name}", self._gamma(f"w_{name}", (above, below)).to_event(2))
        with pyro.plate("data", len(x)):
            for name, width in zip(LAYERS, self.widths, strict=False):
                pyro.sample(f"z_{name}", self._gamma(f"z_{name}", (len(x), width)).to_event(1))

    def clip(self) -> None:
        """Keeps the guide's gamma distributions away from zero; call it after each step."""
        store = pyro.get_param_store()
        bounds = {"shape_": SMALLEST_SHAPE, "mean_": SMALLEST_MEAN}
        with torch.no_grad():
            for name in store:
                for prefix, smallest in bounds.items():
                    if name.startswith(prefix):
                        store.get_param(name).clamp_(min=smallest)

    @staticmethod
    def _gamma(name: str, shape: tuple[int, ...]) -> dist.Gamma:
        """A gamma distribution of its own for each entry, with free shape and mean."""
        # Shapes start around softplus(0.5) = 1 and means around softplus(0) = 0.7.
        concentration = softplus(
            pyro.param(f"shape_{name}", lambda: 0.5 + 0.1 * torch.randn(shape))
        )
        mean = softplus(pyro.param(f"mean_{name}", lambda: 0.1 * torch.randn(shape)))
        return dist.Gamma(concentration, concentration / mean)


def make_data(seed: int, size: int = 200) -> Tensor:
    """Draws digits without replacement from scikit-learn's.

    Args:
        seed: Seed of their order.
        size: Number of digits, at most 1797.

    Returns:
        Intensities from 0 to 16 as floats, shape [size, 64].
    """
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data, device="cpu")
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return x[order[:size]].to(torch.get_default_device(), torch.get_default_dtype())
