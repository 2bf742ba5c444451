"""Linear Gaussian Bayesian networks over any graph, with any nodes hidden.

Each node is normal, and its mean is linear in its parents: v ~ N(bias + weight · parents, scale²).
As nothing shows the location and scale of a hidden node, it has bias 0 and scale 1. All nodes
together are normal, so that everything about them is known exactly.

The default network is a guess at what stands behind nine measurements of scikit-learn's 442
diabetes patients, standardized: two hidden causes, called adiposity and resistance (to insulin),
the first of which drives the second. Its best parameters are unique up to the signs of the two, and
EM takes hundreds of steps to them. (B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, "Least
angle regression", Annals of Statistics 32, 2004.)

`LinearGaussianNetwork` offers the program, the same program with hidden nodes integrated out, their
exact posterior as a guide, and referees in plain torch: the exact log likelihood, the exact EM
step, and the optimum of networks without hidden nodes, one regression per node. (S. L. Lauritzen,
"Propagation of probabilities, means, and variances in mixed graphical association models", JASA 87,
1992, for such networks. R. D. Shachter and C. R. Kenley, "Gaussian influence diagrams", Management
Science 35, 1989, for their joint distribution.)
"""

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.values import (
    Optimum,
    as_default,
    eye,
    normal,
    parameters,
    second_generator,
    stored,
    uniform,
)


class _Joint(NamedTuple):
    """All nodes in topological order, of which `whitener @ (nodes - mean)` is standard normal.

    Attributes:
        mean: Shape [nodes].
        whitener: Lower triangular, shape [nodes, nodes].
    """

    mean: Tensor
    whitener: Tensor


class _Posterior(NamedTuple):
    """The posterior of the hidden nodes, in topological order.

    Attributes:
        mean: Shape [batch, hidden].
        covariance: Shape [hidden, hidden].
    """

    mean: Tensor
    covariance: Tensor


class LinearGaussianNetwork:
    """A Bayesian network of normal nodes whose means are linear in their parents.

    An observed node v has the parameters "bias.v" and "scale.v" (a standard deviation), both
    scalars, and each node with parents "weight.v" of shape [parents], in the order in which
    `parents` names them. They live in Pyro's parameter store, so two networks in one process share
    those of nodes of the same name. The likelihood stays the same if a hidden node changes its
    sign together with its weights; whether there is more freedom depends on the graph.

    Data have one column per observed node, in the order of `observed`.

    Attributes:
        parents: Names of each node's parents, by its name.
        hidden: Names of the hidden nodes, in topological order.
        observed: Names of the observed nodes, in the order of `parents`.
        order: Names of all nodes, parents before their children.
        constraints: The constraint of each parameter by name.
        seed: Seed of the initial values in `initial`.
    """

    def __init__(
        self, parents: Mapping[str, tuple[str, ...]], hidden: Iterable[str] = (), seed: int = 0
    ) -> None:
        """Makes a network; its parameters are made on first use.

        Args:
            parents: Names of each node's parents, by its name.
            hidden: Names of the hidden nodes.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If a name is unknown or taken, the graph has a cycle, or nothing is
                observed.
        """
        self.parents = {node: tuple(names) for node, names in parents.items()}
        hidden = set(hidden)
        _check_names(self.parents, hidden)
        try:
            self.order = tuple(TopologicalSorter(self.parents).static_order())
        except CycleError as error:
            raise ValueError(f"the graph has a cycle: {error.args[1]}") from error
        self.hidden = tuple(node for node in self.order if node in hidden)
        self.observed = tuple(node for node in self.parents if node not in hidden)
        self.constraints: Mapping[str, Any] = self._constraints()
        self.seed = seed
        if taken := ({"data"} | set(self.constraints)) & set(self.parents):
            raise ValueError(f"nodes may not have the names {sorted(taken)}")

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the network's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        Weights are normal with standard deviation 0.5, biases with 0.1; scales are uniform within
        50% of 1.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        values = {}
        for name in self.constraints:
            shape = self._shape(name)
            if name.startswith("weight."):
                value = 0.5 * normal(shape, generator)
            elif name.startswith("bias."):
                value = 0.1 * normal(shape, generator)
            else:
                value = 0.5 + uniform(shape, generator)
            values[name] = as_default(value)
        return values

    def truth(self, seed: int) -> dict[str, Tensor]:
        """Draws the parameters behind the data of the same seed.

        Weights lie between 0.5 and 1 and have either sign; biases are standard normal; scales are
        uniform within 50% of 1.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        return {
            name: as_default(value) for name, value in self._truth(second_generator(seed)).items()
        }

    def make_data(self, seed: int, size: int) -> Tensor:
        """Samples data from the network of `truth`.

        Neither the global random state nor the parameter store is touched.

        Args:
            seed: Seed of the true parameters and of the data.
            size: Number of data.

        Returns:
            Data, shape [size, observed], in the default dtype and on the default device.
        """
        generator = second_generator(seed)
        truth = self._truth(generator)
        values: dict[str, Tensor] = {}
        for node in self.order:
            loc, scale = self._conditional(truth, node, values)
            values[node] = loc + scale * normal((size,), generator)
        return as_default(torch.stack([values[node] for node in self.observed], -1))

    def model(self, x: Tensor) -> None:
        """The program, with one site per node.

        Args:
            x: Data, shape [batch, observed].
        """
        columns = self._columns(x)
        params = parameters(self)
        values: dict[str, Tensor] = {}
        with pyro.plate("data", x.shape[0], dim=-1):
            for node in self.order:
                loc, scale = self._conditional(params, node, values)
                site = dist.Normal(loc, scale)
                values[node] = pyro.sample(node, site, obs=columns.get(node))

    def collapsed(self, x: Tensor) -> None:
        """The program with its hidden nodes integrated out, which has the same parameters.

        Its one site "x" has all observed nodes.

        Args:
            x: Data, shape [batch, observed].
        """
        self._columns(x)
        visible = self._visible(parameters(self))
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("x", visible, obs=x)

    def guide(self, x: Tensor) -> None:
        """A guide without sites, for the collapsed program.

        Args:
            x: Data, shape [batch, observed].
        """

    def recognize(self, x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
        """A guide that samples from the exact posterior of the hidden nodes, one after the other.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            x: Data, shape [batch, observed].
            observations: Values of observed nodes by name that take the place of the data, as
                wake-sleep and dreams give them.
        """
        columns = self._columns(x) | dict(observations or {})
        x = torch.stack([columns[node] for node in self.observed], -1)
        with torch.no_grad():
            mean, covariance = self._posterior(stored(self.initial), x)
            factor = torch.linalg.cholesky(covariance)
        errors: list[Tensor] = []  # in coordinates in which they are independent
        with pyro.plate("data", x.shape[0], dim=-1):
            for index, node in enumerate(self.hidden):
                loc, scale = mean[:, index], factor[index, index]
                for weight, error in zip(factor[index], errors, strict=False):
                    loc = loc + weight * error
                value = pyro.sample(node, dist.Normal(loc, scale))
                errors.append((value - loc) / scale)

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood of the observed nodes, differentiable in the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Data, shape [batch, observed].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        self._columns(x)
        total: Tensor = self._visible(params).log_prob(x).sum()
        return total

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization: one regression per node.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Data, shape [batch, observed].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones.
        """
        self._columns(x)
        mean, covariance = self._posterior(params, x)
        units = eye(len(self.order), x)
        hidden = units[self._positions(self.hidden)]
        observed = units[self._positions(self.observed)]
        return self._regressions(mean @ hidden + x @ observed, hidden.T @ covariance @ hidden)

    @torch.no_grad()
    def optimum(self, x: Tensor) -> Optimum:
        """The global optimum of a network without hidden nodes: least squares for each node.

        Args:
            x: Data, shape [batch, observed], more of them than any node has parents.

        Returns:
            The best parameters and their log likelihood.

        Raises:
            ValueError: If there are hidden nodes.
        """
        if self.hidden:
            raise ValueError("the optimum is known in closed form without hidden nodes only")
        params = self.em_step(self.initial, x)  # nothing is hidden, so that one step is all
        return Optimum(params, self.log_likelihood(params, x))

    def _constraints(self) -> dict[str, Any]:
        constraints: dict[str, Any] = {}
        for node in self.order:
            if self.parents[node]:
                constraints[f"weight.{node}"] = dist.constraints.real
            if node in self.observed:
                constraints[f"bias.{node}"] = dist.constraints.real
                constraints[f"scale.{node}"] = dist.constraints.positive
        return constraints

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        kind, _, node = name.partition(".")
        return (len(self.parents[node]),) if kind == "weight" else ()

    def _truth(self, generator: torch.Generator) -> dict[str, Tensor]:
        """True parameters in double precision on the CPU."""
        truth = {}
        for name in self.constraints:
            shape = self._shape(name)
            if name.startswith("weight."):
                sign = normal(shape, generator).sign()
                truth[name] = sign * (0.5 + 0.5 * uniform(shape, generator))
            elif name.startswith("bias."):
                truth[name] = normal(shape, generator)
            else:
                truth[name] = 0.5 + uniform(shape, generator)
        return truth

    def _columns(self, x: Tensor) -> dict[str, Tensor]:
        """The data of each observed node, each of shape [batch].

        Args:
            x: Data, shape [batch, observed].

        Returns:
            Data by node.

        Raises:
            ValueError: If the data have another shape.
        """
        if x.dim() != 2 or x.shape[1] != len(self.observed):
            raise ValueError(
                f"data must have shape [batch, {len(self.observed)}], got {list(x.shape)}"
            )
        return dict(zip(self.observed, x.unbind(-1), strict=True))

    def _conditional(
        self, params: Mapping[str, Tensor], node: str, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a node given the values of its parents."""
        unit = next(iter(params.values())).new_ones(())
        loc = params.get(f"bias.{node}", 0 * unit)
        for index, parent in enumerate(self.parents[node]):
            loc = loc + params[f"weight.{node}"][index] * values[parent]
        return loc, params.get(f"scale.{node}", unit)

    def _positions(self, nodes: Iterable[str]) -> list[int]:
        """Places of nodes in topological order."""
        return [self.order.index(node) for node in nodes]

    def _joint(self, params: Mapping[str, Tensor]) -> _Joint:
        """The distribution of all nodes."""
        like = next(iter(params.values()))
        zero, size = like.new_zeros(()), len(self.order)
        rows = []
        for node in self.order:
            row = like.new_zeros(size)
            if self.parents[node]:
                place = torch.tensor(self._positions(self.parents[node]), device=like.device)
                row = row.scatter(0, place, params[f"weight.{node}"])
            rows.append(row)
        errors = eye(size, like) - torch.stack(rows)  # maps nodes to their errors and biases
        bias = torch.stack([params.get(f"bias.{node}", zero) for node in self.order])
        scale = torch.stack([params.get(f"scale.{node}", zero + 1) for node in self.order])
        mean = torch.linalg.solve_triangular(
            errors, bias[:, None], upper=False, unitriangular=True
        )[:, 0]
        return _Joint(mean, errors / scale[:, None])

    def _visible(self, params: Mapping[str, Tensor]) -> dist.MultivariateNormal:
        """The distribution of the observed nodes."""
        mean, whitener = self._joint(params)
        observed = self._positions(self.observed)
        units = eye(len(mean), mean)
        root = torch.linalg.solve_triangular(whitener, units, upper=False)[observed]
        return dist.MultivariateNormal(mean[observed], root @ root.T)

    def _posterior(self, params: Mapping[str, Tensor], x: Tensor) -> _Posterior:
        """The posterior of the hidden nodes, in the form that is accurate with little noise."""
        mean, whitener = self._joint(params)
        hidden, observed = self._positions(self.hidden), self._positions(self.observed)
        inner = whitener[:, hidden]
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(inner.T @ inner))
        gain = -covariance @ inner.T @ whitener[:, observed]
        return _Posterior(mean[hidden] + (x - mean[observed]) @ gain.T, covariance)

    def _regressions(self, values: Tensor, spread: Tensor) -> dict[str, Tensor]:
        """Regresses each node on its parents.

        Args:
            values: Expected values of all nodes in topological order, shape [batch, nodes].
            spread: Their covariance given the data, shape [nodes, nodes].

        Returns:
            The best parameters by name.
        """
        average = values.mean(0)
        params = {}
        for place, node in enumerate(self.order):
            # A hidden node has no bias, so that its regression goes through the origin.
            center = average if node in self.observed else torch.zeros_like(average)
            centered = values - center
            moment = centered.T @ centered / len(values) + spread
            parents = self._positions(self.parents[node])
            weight = torch.linalg.solve(moment[parents][:, parents], moment[parents, place])
            if parents:
                params[f"weight.{node}"] = weight
            if node in self.observed:
                params[f"bias.{node}"] = average[place] - weight @ average[parents]
                # The mean square of the error as a sum of squares, which cannot become negative.
                contrast = torch.zeros_like(average)
                contrast[place], contrast[parents] = 1.0, -weight
                square = (centered @ contrast).square().mean() + contrast @ spread @ contrast
                params[f"scale.{node}"] = square.sqrt()
        return params


def _check_names(parents: Mapping[str, tuple[str, ...]], hidden: set[str]) -> None:
    """Checks that a graph is complete.

    Args:
        parents: Names of each node's parents, by its name.
        hidden: Names of the hidden nodes.

    Raises:
        ValueError: If a name is unknown, a parent comes twice, or nothing is observed.
    """
    for node, names in parents.items():
        if unknown := set(names) - set(parents):
            raise ValueError(f"parents of {node} are not in the graph: {sorted(unknown)}")
        if len(set(names)) < len(names):
            raise ValueError(f"{node} has a parent twice: {names}")
    if unknown := hidden - set(parents):
        raise ValueError(f"hidden nodes are not in the graph: {sorted(unknown)}")
    if not set(parents) - hidden:
        raise ValueError("at least one node must be observed")


def patients(seed: int = 0) -> LinearGaussianNetwork:
    """Makes a network of diabetes patients with two hidden causes, which suits `make_data`.

    Args:
        seed: Seed of the initial values.

    Returns:
        A network of 9 observed and 2 hidden nodes.
    """
    return LinearGaussianNetwork(
        {
            "age": (),
            "sex": (),
            "adiposity": ("age", "sex"),
            "resistance": ("age", "adiposity"),
            "bmi": ("adiposity",),
            "pressure": ("age", "adiposity"),
            "hdl": ("sex", "resistance"),
            "ldl": ("age", "resistance"),
            "triglycerides": ("resistance",),
            "glucose": ("age", "resistance"),
            "progression": ("adiposity", "resistance"),
        },
        hidden=("adiposity", "resistance"),
        seed=seed,
    )


_network = patients()

# Without total cholesterol (s1) and its ratio to HDL (s4), which nearly follow from the others.
_COLUMNS = ("age", "sex", "bmi", "bp", "s3", "s2", "s5", "s6", "target")


def model(x: Tensor) -> None:
    """The program of the network of diabetes patients.

    Args:
        x: Data, shape [batch, 9].
    """
    _network.model(x)


def guide(x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
    """The exact posterior of the two hidden causes of the default network.

    Args:
        x: Data, shape [batch, 9].
        observations: Values of observed nodes by name that take the place of the data.
    """
    _network.recognize(x, observations)


def make_data(seed: int, size: int = 442) -> Tensor:
    """Draws patients without replacement from scikit-learn's.

    Args:
        seed: Seed of their order.
        size: Number of patients, at most 442.

    Returns:
        Measurements in the order of the network's observed nodes, each with mean 0 and variance 1
        over all patients, shape [size, 9].

    Raises:
        ValueError: If there are not so many patients.
    """
    from sklearn.datasets import load_diabetes

    frame = load_diabetes(as_frame=True, scaled=False).frame
    if not 1 <= size <= len(frame):
        raise ValueError(f"there are {len(frame)} patients, got {size}")
    x = torch.tensor(frame[list(_COLUMNS)].to_numpy(), dtype=torch.float64, device="cpu")
    x = (x - x.mean(0)) / x.std(0, correction=0)
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return as_default(x[order[:size]])
