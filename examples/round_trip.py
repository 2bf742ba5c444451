"""From pgmpy to Pyro and back: the same network in all of them.

A network that pgmpy has read becomes a Pyro program (`models.bayes_net`). pyronat reads the
structure of that program, of which it knows nothing else, and gives it as a graph of networkx: its
edges are those that pgmpy has. Then a node is hidden, the tables are learned from cases that the
network has made, and go back to pgmpy, which writes them to a file and reads it.

Run it as `python -m examples.round_trip [FILE.bif]`; `--quick` learns from fewer cases in fewer
steps. Without a file it takes the network "cancer", which pgmpy brings along. It writes to the
output folder:

* given.bif: the network, if no file was given;
* learned.bif: the network with the tables that were learned.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import pyro
import torch
from pgmpy.models import DiscreteBayesianNetwork
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyronat
from models import bayes_net


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the round trip.

    Args:
        argv: Arguments, or None for those of the process.

    Raises:
        ValueError: If pyronat's graph is not that of pgmpy.
    """
    parser = argparse.ArgumentParser(description="From pgmpy to Pyro and back.")
    parser.add_argument("file", nargs="?", type=Path, help="a network, in the format .bif")
    parser.add_argument("--hide", metavar="NODE", help="by default one with most neighbors")
    parser.add_argument("--output", type=Path, default=Path("round-trip-output"))
    parser.add_argument("--quick", action="store_true", help="500 cases, 10 steps")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    cases, steps = (500, 10) if options.quick else (5000, 50)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    # pgmpy → Pyro → pyronat → networkx
    if options.file is None:
        options.file = options.output / "given.bif"
        bayes_net.to_pgmpy(bayes_net.load("cancer")).save(str(options.file), filetype="bif")
    given = DiscreteBayesianNetwork.load(str(options.file), "bif")
    net = bayes_net.from_pgmpy(given)
    everything = bayes_net.make_data(net, seed=0, num_cases=cases)
    graph = pyronat.analyze(bayes_net.make_model(net), everything).graph
    if set(graph.edges) != set(given.edges):
        raise ValueError(f"the edges differ: {set(graph.edges) ^ set(given.edges)}")
    print(f"{len(graph.edges)} edges, the same in pgmpy and in the Pyro program:")
    print(
        "\n".join(
            f"  {parent} → {child}"
            for parent, child in nx.lexicographical_topological_sort(nx.line_graph(graph))
        )
    )

    # With a node hidden, learn the tables.
    hidden = options.hide or max(sorted(graph), key=graph.degree)
    data = bayes_net.make_data(net, seed=0, num_cases=cases, hidden=[hidden])
    model = config_enumerate(bayes_net.make_model(net, [hidden]), "parallel")
    optim = pyronat.NaturalGradient(lr=pyronat.steps.LinearDecay(0.3, steps))
    svi = pyronat.NaturalSVI(model, lambda x: None, optim, TraceEnum_ELBO(max_plate_nesting=1))
    for name, value in start(model, data).items():
        pyro.get_param_store()[name] = value
    losses = [svi.step(data) / cases for _ in range(steps)]
    truth = -float(bayes_net.exact_log_likelihood(net, data, [hidden]).mean())
    print(
        f"\n{hidden} is hidden: {losses[0]:.4f} nats a case at random tables, {losses[-1]:.4f} now"
    )
    print(f"(the tables that made the cases: {truth:.4f})")

    # Pyro → pgmpy → file → pgmpy
    path = options.output / "learned.bif"
    bayes_net.to_pgmpy(bayes_net.learned(net)).save(str(path), filetype="bif")
    again = DiscreteBayesianNetwork.load(str(path), "bif")
    print(f"\nthe table of {hidden} in {path}, as pgmpy reads it:\n{again.get_cpds(hidden)}")


def start(model: bayes_net.Program, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random tables, by the names of a program's parameters.

    Args:
        model: The program.
        data: Its data.

    Returns:
        Rows of random probabilities.
    """
    model(data)
    tables = {name: value.detach() for name, value in pyro.get_param_store().items()}
    random = {name: torch.rand_like(table).add(0.5) for name, table in tables.items()}
    return {name: table / table.sum(-1, keepdim=True) for name, table in random.items()}


if __name__ == "__main__":
    main()
