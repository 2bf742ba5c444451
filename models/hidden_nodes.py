"""Learning the tables of a discrete Bayesian network, some of whose nodes are never observed.

The structure is known and the tables are not: they start at random. The data are cases sampled
from the network's own tables, without the hidden nodes. So that no probability is estimated as
zero, every row of every table has in addition seen each of its states a number of times: the
pseudo-cases, which act like a Dirichlet prior and are observed sites of the program.

The referees are the exact likelihood and the exact EM step, both by variable elimination: a table
times the gradient of the log likelihood in it is the expected number of times that each of its
entries was used. (S. L. Lauritzen, "The EM algorithm for graphical association models with missing
data", Comput. Statist. Data Anal. 19, 1995. J. Binder, D. Koller, S. Russell and K. Kanazawa,
"Adaptive probabilistic networks with hidden variables", Machine Learning 29, 1997.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import constraints

from models import bayes_net
from models.bayes_net import DiscreteNet, cpt_name
from models.values import as_default, normal


class HiddenNodes:
    """A discrete network with tables to learn, some of whose nodes are hidden.

    The parameters are the tables `cpt_name(net, node)`, shape [*states of the parents, states],
    whose rows are distributions. They live in Pyro's parameter store, so two instances of one
    network in one process share them.

    Attributes:
        net: The network; its tables are those behind the data.
        hidden: Nodes that are not observed, in topological order.
        pseudo_cases: How often each row of a table has seen each of its states beforehand.
        seed: Seed of the initial values in `initial`.
        nodes: Node of each parameter, by the parameter's name.
        constraints: The constraint of each parameter by name.
    """

    def __init__(
        self, net: DiscreteNet, hidden: Iterable[str], pseudo_cases: int = 1, seed: int = 0
    ) -> None:
        """Makes a program; its parameters are made on first use.

        Args:
            net: The network.
            hidden: Nodes that are not observed.
            pseudo_cases: How often each row of a table has seen each of its states beforehand.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If a hidden node is not in the network, or there are less than no cases.
        """
        if pseudo_cases < 0:
            raise ValueError(f"pseudo_cases must be at least 0, got {pseudo_cases}")
        hidden = tuple(hidden)
        observed = net.observed(hidden)
        self.net = net
        self.hidden = tuple(node for node in net.nodes if node not in observed)
        self.pseudo_cases = pseudo_cases
        self.seed = seed
        self.nodes = {cpt_name(net, node): node for node in net.nodes if net.size(node) > 1}
        self.constraints = dict.fromkeys(self.nodes, constraints.simplex)
        self._program = config_enumerate(
            bayes_net.make_model(self._network(self.initial), self.hidden), "parallel"
        )

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which the parameters are created: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        The logits of all tables are standard normal.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        return {
            name: as_default(normal(self.net.tables[node].shape, generator).softmax(-1))
            for name, node in self.nodes.items()
        }

    def make_data(self, seed: int, size: int) -> Tensor:
        """Samples cases from the network's own tables.

        Neither the global random state nor the parameter store is touched.

        Args:
            seed: Seed of the cases.
            size: Number of cases.

        Returns:
            States of the observed nodes, torch.long, shape [size, observed nodes].
        """
        return bayes_net.make_data(self.net, seed, size, self.hidden)

    def model(self, x: Tensor) -> None:
        """The program; its hidden nodes are summed out by enumeration.

        Args:
            x: States of the observed nodes, torch.long, shape [cases, observed nodes].
        """
        self._program(x)
        if not self.pseudo_cases:
            return
        for name, node in self.nodes.items():
            table = pyro.param(name)
            counts = torch.full_like(table, self.pseudo_cases).detach()
            total = self.pseudo_cases * self.net.size(node)
            rows = dist.Multinomial(total, table).to_event(table.dim() - 1)
            pyro.sample(f"{name}.pseudo", rows, obs=counts)

    def guide(self, x: Tensor) -> None:
        """The empty guide: every hidden node is summed out.

        Args:
            x: States of the observed nodes, torch.long, shape [cases, observed nodes].
        """

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood of cases and pseudo-cases, differentiable in the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: States of the observed nodes, torch.long, shape [cases, observed nodes].

        Returns:
            Total log likelihood in nats, a scalar in float64 on the CPU.
        """
        total = self.case_log_likelihood(params, x).sum()
        for name in self.nodes:
            if self.pseudo_cases:
                table = params[name].double().cpu()
                counts = torch.full_like(table, self.pseudo_cases).detach()
                total = (
                    total
                    + dist.Multinomial(probs=table, validate_args=False).log_prob(counts).sum()
                )
        return total

    def case_log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood of each case, without pseudo-cases.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: States of the observed nodes, torch.long, shape [cases, observed nodes].

        Returns:
            Log likelihoods in nats, float64 on the CPU, shape [cases].
        """
        return bayes_net.exact_log_likelihood(self._network(params), x, self.hidden)

    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: States of the observed nodes, torch.long, shape [cases, observed nodes].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones. Rows that
            no case and no pseudo-case reaches stay as they are.
        """
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        total = self.case_log_likelihood(leaves, x).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        new = {}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            old = leaf.detach()
            counts = old * gradient + self.pseudo_cases
            rows = counts.sum(-1, keepdim=True)
            new[name] = torch.where(rows > 0, counts / rows, old)
        return new

    def _network(self, params: Mapping[str, Tensor]) -> DiscreteNet:
        """The network with these tables."""
        tables = {node: params[name] for name, node in self.nodes.items()}
        return replace(self.net, tables={**self.net.tables, **tables})
