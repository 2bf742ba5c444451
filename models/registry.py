"""The registry of the zoo: every program under a name, with its data and its referee.

`programs()` lists them all. A `Program` says what a program is, draws its data and makes it: a
`Trainable` is a fresh model and guide, whose parameters Pyro's store does not have yet, and what is
known exactly about them. Those who train the zoo (tests, benchmarks, command lines) go by this
registry alone, so that a model that is entered here is trained, checked and compared everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from models import (
    bars,
    bayes_net,
    bayesian_regression,
    dmm,
    eight_schools,
    experts,
    fvsbn,
    helmholtz,
    latent_class,
    lda,
    linear_gaussian,
    mixture,
    shifter,
    sparse_gamma_def,
    state_space,
    vae,
)
from models.factor_analysis import FactorAnalysis
from models.helmholtz import Helmholtz
from models.hidden_nodes import HiddenNodes
from models.hmm import DiscreteHMM
from models.noisy_or import NoisyOr
from models.values import stored

Objective = Literal["elbo", "enumeration", "wake-sleep"]
"""How a program is trained: by the ELBO with guide samples, by the ELBO with discrete hidden sites
summed out, or by reweighted wake–sleep."""

Data = tuple[Tensor, ...]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Trainable:
    """A model and a guide, and what is known exactly about them.

    Attributes:
        model: The model; its arguments are the data.
        guide: The guide, with the same arguments.
        log_likelihood: Exact log likelihood of data, in all, in nats, at the parameters that are in
            Pyro's store now, a scalar. None where none is known, or where all parameters are those
            of a guide.
        optimum: The largest value in nats that any parameters give `log_likelihood`, or without
            that the ELBO; None where mathematics does not give it.
        bound: What neither exceeds but nothing need reach: the log evidence, or minus the entropy
            of the data; None where mathematics does not give it.
        params: The model's parameters in Pyro's store now, constrained, by name, with initial
            values of those that the store does not have yet; None if there is no `em_step`.
        em_step: One step of expectation maximization, from these parameters and data to new ones;
            None where there is none.
        after_step: To be called after every step of an optimizer.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    log_likelihood: Callable[..., Tensor] | None = None
    optimum: Callable[..., Tensor] | None = None
    bound: Callable[..., Tensor] | None = None
    params: Callable[[], dict[str, Tensor]] | None = None
    em_step: Callable[..., dict[str, Tensor]] | None = None
    after_step: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Program:
    """An entry of the registry.

    Attributes:
        name: Name in tables and on command lines.
        module: Name of the file in this folder, without its ending.
        summary: What it is, in a few words.
        objective: How it is trained.
        make: Makes it afresh, from a seed of the initial values. Parameters that a program draws
            at random on first use follow Pyro's seed instead.
        draw: Draws data from a seed and a size.
        size: A usual number of data.
        hidden: Whether hidden variables stand between parameters of the model and the data.
        batch_size: A usual number of data per step, or None for all of them.
        plates: Nested plates, as Pyro's `max_plate_nesting` counts them.
    """

    name: str
    module: str
    summary: str
    objective: Objective
    make: Callable[[int], Trainable]
    draw: Callable[[int, int], Data]
    size: int
    hidden: bool = True
    batch_size: int | None = None
    plates: int = 1

    def make_data(self, seed: int, size: int | None = None) -> Data:
        """Draws data, leaving the global random state as it was.

        Args:
            seed: Seed of the data.
            size: Number of data, or None for the usual one.

        Returns:
            The arguments of model and guide.
        """
        return self.draw(seed, self.size if size is None else size)


def programs() -> dict[str, Program]:
    """All programs of the zoo, by name."""
    return {program.name: program for program in (*_PROGRAMS, *map(_network, _HIDDEN))}


# --- how they are made -------------------------------------------------------------------------


def _single(draw: Callable[[int, int], Tensor]) -> Callable[[int, int], Data]:
    """Data of one tensor."""
    return lambda seed, size: (draw(seed, size),)


def _exact(net: Any, optimum: bool = False) -> Trainable:
    """A program of a class that knows its likelihood, and perhaps EM.

    Args:
        net: An instance of the class.
        optimum: Whether the class knows the best parameters.

    Returns:
        The program.
    """
    em_step = getattr(net, "em_step", None)
    return Trainable(
        net.model,
        net.guide,
        log_likelihood=lambda *data: net.log_likelihood(stored(net.initial), *data),
        optimum=(lambda *data: net.optimum(*data).log_likelihood) if optimum else None,
        params=None if em_step is None else lambda: stored(net.initial),
        em_step=em_step,
    )


def _recognized(net: Any) -> Trainable:
    """The same with the exact posterior of the hidden variables as its guide."""
    return replace(_exact(net), guide=net.recognize)


def _collapsed(net: Any, optimum: bool) -> Trainable:
    """The same with the hidden variables integrated out."""
    return replace(_exact(net, optimum), model=net.collapsed)


def _machine(net: Helmholtz) -> Trainable:
    """A Helmholtz machine, whose likelihood is a sum over all hidden states."""
    return Trainable(
        net.model,
        net.guide,
        log_likelihood=lambda x: net.exact_log_likelihood(x).sum(),
        bound=_negative_entropy,
    )


def _negative_entropy(x: Tensor) -> Tensor:
    """Log likelihood of binary data under their own frequencies, which no model exceeds."""
    _, counts = x.unique(dim=0, return_counts=True)
    return (counts * (counts / len(x)).log()).sum()


def _noisy_or(seed: int) -> Trainable:
    net = NoisyOr(_DISEASES, _FINDINGS, _EDGES)
    net.initial = net.start(seed)
    return _exact(net)


def _noisy_or_data(seed: int, size: int) -> Data:
    net = NoisyOr(_DISEASES, _FINDINGS, _EDGES)
    return (net.sample(net.truth(seed), size, seed),)


_DISEASES, _FINDINGS, _EDGES = 4, 10, 18


def _linear_regression(seed: int) -> Trainable:
    net = bayesian_regression.LinearRegression()
    guide = AutoMultivariateNormal(net.model)
    return Trainable(net.model, guide, optimum=net.log_evidence)


def _logistic_regression(seed: int) -> Trainable:
    net = bayesian_regression.LogisticRegression()
    guide = AutoMultivariateNormal(net.model)
    return Trainable(net.model, guide, bound=lambda x, y: net.log_evidence(x, y)[0])


def _eight_schools(seed: int) -> Trainable:
    net = eight_schools.EightSchools()
    return Trainable(net.model, AutoMultivariateNormal(net.model), bound=net.log_evidence)


def _sparse_gamma_def(seed: int) -> Trainable:
    net = sparse_gamma_def.SparseGammaDEF()
    return Trainable(net.model, net.guide, after_step=net.clip)


def _vae(seed: int) -> Trainable:
    net = vae.VAE(num_hidden=32, code_size=4, seed=seed)
    return Trainable(net.model, net.guide)


def _dmm(seed: int) -> Trainable:
    net = dmm.DMM(seed=seed)
    return Trainable(net.model, net.guide)


# --- what there is -----------------------------------------------------------------------------

_PROGRAMS = (
    Program(
        "mixture",
        "mixture",
        "Gaussian mixture, 3 overlapping components",
        "enumeration",
        lambda seed: _exact(mixture.GaussianMixture(seed=seed)),
        _single(mixture.make_data),
        size=500,
    ),
    Program(
        "latent class",
        "latent_class",
        "3 classes, 8 binary items",
        "enumeration",
        lambda seed: _exact(latent_class.LatentClass(seed=seed)),
        _single(latent_class.make_data),
        size=500,
    ),
    Program(
        "noisy-or",
        "noisy_or",
        "4 diseases, 10 findings",
        "enumeration",
        _noisy_or,
        _noisy_or_data,
        size=500,
    ),
    Program(
        "hmm",
        "hmm",
        "hidden Markov model, 3 states, 5 steps",
        "enumeration",
        lambda seed: _exact(DiscreteHMM(3, 4, 5, seed=seed)),
        _single(DiscreteHMM(3, 4, 5).make_data),
        size=500,
    ),
    Program(
        "experts",
        "experts",
        "mixture of 2 linear experts, diabetes",
        "enumeration",
        lambda seed: _exact(experts.LinearExperts(seed=seed)),
        experts.make_data,
        size=442,
    ),
    Program(
        "lda",
        "lda",
        "latent Dirichlet allocation, 3 topics",
        "enumeration",
        lambda seed: _exact(lda.TopicModel(seed=seed)),
        lda.make_data,
        size=60,
        plates=2,
    ),
    Program(
        "factor analysis",
        "factor_analysis",
        "2 factors, 10 dimensions, exact posterior as guide",
        "elbo",
        lambda seed: _recognized(FactorAnalysis(seed=seed)),
        _single(FactorAnalysis().make_data),
        size=500,
    ),
    Program(
        "ppca",
        "factor_analysis",
        "probabilistic PCA, factors integrated out",
        "elbo",
        lambda seed: _collapsed(FactorAnalysis(isotropic=True, seed=seed), optimum=True),
        _single(FactorAnalysis(isotropic=True).make_data),
        size=500,
        hidden=False,
    ),
    Program(
        "linear Gaussian",
        "linear_gaussian",
        "9 columns of diabetes, 2 hidden causes, exact posterior as guide",
        "elbo",
        lambda seed: _recognized(linear_gaussian.patients(seed)),
        _single(linear_gaussian.make_data),
        size=442,
    ),
    Program(
        "state space",
        "state_space",
        "2 hidden states, 12 steps, exact posterior as guide",
        "elbo",
        lambda seed: _recognized(state_space.StateSpace(seed=seed)),
        _single(state_space.make_data),
        size=200,
    ),
    Program(
        "fvsbn",
        "fvsbn",
        "fully visible sigmoid belief network, 4 × 4 digits",
        "elbo",
        lambda seed: _exact(fvsbn.FullyVisible(seed=seed), optimum=True),
        _single(fvsbn.make_data),
        size=1000,
        hidden=False,
    ),
    Program(
        "helmholtz",
        "helmholtz",
        "Helmholtz machine 16-8-4",
        "wake-sleep",
        lambda seed: _machine(Helmholtz((16, 8, 4))),
        _single(helmholtz.make_data),
        size=500,
        batch_size=100,
    ),
    Program(
        "bars",
        "bars",
        "Hinton's bars 4 × 4, machine 16-8-1",
        "wake-sleep",
        lambda seed: _machine(bars.machine("hinton")),
        _single(bars.make_data),
        size=500,
        batch_size=100,
    ),
    Program(
        "kirby bars",
        "bars",
        "Kirby's bars 3 × 3, machine 9-6-1",
        "wake-sleep",
        lambda seed: _machine(bars.machine("kirby")),
        _single(partial(bars.make_data, kind="kirby")),
        size=500,
        batch_size=100,
    ),
    Program(
        "shifter",
        "shifter",
        "rows of 4 bits and their shifts, machine 8-8-1",
        "wake-sleep",
        lambda seed: _machine(shifter.machine(4)),
        _single(partial(shifter.make_data, width=4)),
        size=500,
        batch_size=100,
    ),
    Program(
        "linear regression",
        "bayesian_regression",
        "Bayesian, diabetes, multivariate normal guide",
        "elbo",
        _linear_regression,
        bayesian_regression.make_data,
        size=442,
        hidden=False,
    ),
    Program(
        "logistic regression",
        "bayesian_regression",
        "Bayesian, breast cancer, multivariate normal guide",
        "elbo",
        _logistic_regression,
        bayesian_regression.make_classes,
        size=569,
        hidden=False,
    ),
    Program(
        "eight schools",
        "eight_schools",
        "hierarchical, multivariate normal guide",
        "elbo",
        _eight_schools,
        lambda seed, size: eight_schools.make_data(seed or None, size),  # seed 0: the real eight
        size=8,
        hidden=False,
    ),
    Program(
        "sparse gamma def",
        "sparse_gamma_def",
        "three gamma layers, digits, mean-field guide",
        "elbo",
        _sparse_gamma_def,
        _single(sparse_gamma_def.make_data),
        size=200,
        hidden=False,
    ),
    Program(
        "vae",
        "vae",
        "variational autoencoder, digits",
        "elbo",
        _vae,
        _single(vae.make_data),
        size=1000,
        batch_size=100,
    ),
    Program(
        "dmm",
        "dmm",
        "deep Markov model, chords of 12 steps",
        "elbo",
        _dmm,
        dmm.make_data,
        size=200,
        batch_size=50,
    ),
)

_HIDDEN = {
    "earthquake": ("Alarm",),
    "cancer": ("Cancer",),
    "survey": ("E",),
    "asia": ("either", "bronc"),
    "sachs": ("PKA", "Plcg"),
    "child": ("Grunting", "Sick", "BirthAsphyxia", "Disease", "HypoxiaInO2"),
    "alarm": ("KINKEDTUBE", "VENTMACH", "LVEDVOLUME", "ARTCO2", "HR"),
    "insurance": ("OtherCarCost", "RiskAversion", "Age", "DrivingSkill", "SocioEcon"),
}
"""Hidden nodes of the networks."""


def _network(name: str) -> Program:
    """A discrete network with hidden nodes."""
    net, hidden = bayes_net.load(name), _HIDDEN[name]
    return Program(
        name,
        "hidden_nodes",
        f"{len(net.nodes)} discrete nodes, {len(hidden)} hidden",
        "enumeration",
        lambda seed: _exact(HiddenNodes(net, hidden, seed=seed)),
        _single(HiddenNodes(net, hidden).make_data),
        size=2000,
    )
