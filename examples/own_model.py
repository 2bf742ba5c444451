"""A program of one's own, from the first look to the last: whom to believe of many raters.

Patients have one of three conditions, which nobody sees. Each of some raters judges some of the
patients; a rater has a table of how often it says what of whom (Dawid & Skene 1979). Which
condition a patient has, how common conditions are and how good the raters are is all to be found
out from the judgments alone. The steps, in the order of `main`:

1. look at the structure: what are the sites, the blocks, the districts;
2. measure how much information hiding takes away: does EM crawl here, and along which parameters;
3. train, and read the report of the last step;
4. use the trained program as any other: `infer_discrete` says who has what, `Predictive` whether
   the model is a good one, `pyro.render_model` draws it.

Run it as `python -m examples.own_model`, or with `--quick` for a small version. It writes to the
output folder:

* network.png: the network as pyronat sees it;
* course.png: the course of the training;
* model.gv: the program as Pyro draws it, where its package graphviz is installed.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceEnum_ELBO, infer_discrete
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyronat
from pyronat import plot

CONDITIONS, RATERS, JUDGED = 3, 6, 0.6
"""Number of conditions and raters, and the share of patients that a rater sees."""


def model(ratings: Tensor) -> None:
    """Conditions and judgments.

    Args:
        ratings: Judgments from 0, or -1 where there is none, shape [patients, raters].
    """
    simplex = dist.constraints.simplex
    common = pyro.param("common", torch.ones(CONDITIONS) / CONDITIONS, constraint=simplex)
    # At the start every rater is right more often than not, which settles the names of conditions.
    start = 0.2 + 0.4 * torch.eye(CONDITIONS).expand(RATERS, -1, -1)
    tables = pyro.param("tables", start, constraint=simplex)
    with pyro.plate("patients", len(ratings), dim=-2):
        sick = pyro.sample("sick", dist.Categorical(common), infer={"enumerate": "parallel"})
        with pyro.plate("raters", RATERS, dim=-1), poutine.mask(mask=ratings >= 0):
            says = dist.Categorical(Vindex(tables)[torch.arange(RATERS), sick])
            pyro.sample("says", says, obs=ratings.clamp(min=0))


def guide(ratings: Tensor) -> None:
    """Nothing: conditions are summed out."""


def make_data(seed: int, size: int = 400) -> tuple[Tensor, Tensor]:
    """Draws patients and their judgments; of the raters one knows nothing, and one errs on purpose.

    Args:
        seed: Seed of the data.
        size: Number of patients.

    Returns:
        Judgments, shape [patients, raters], and true conditions, shape [patients].
    """
    pyro.set_rng_seed(seed)
    skill = torch.tensor([0.8, 0.7, 0.7, 0.6, 0.0, -0.3]).reshape(RATERS, 1, 1)
    tables = (1 - skill) / CONDITIONS + skill * torch.eye(CONDITIONS)
    sick = dist.Categorical(torch.tensor([0.6, 0.3, 0.1])).sample((size,))
    ratings = dist.Categorical(tables[torch.arange(RATERS), sick.unsqueeze(-1)]).sample()
    return torch.where(torch.rand(size, RATERS) < JUDGED, ratings, -1), sick


def agreement(ratings: Tensor) -> float:
    """How often two raters of the same patient say the same.

    Args:
        ratings: Judgments, shape [patients, raters].

    Returns:
        The share among all pairs.
    """
    a, b = ratings.unsqueeze(-1), ratings.unsqueeze(-2)
    pairs = (a >= 0) & (b >= 0) & ~torch.eye(RATERS, dtype=torch.bool)
    return float((a == b)[pairs].double().mean())


def majority(ratings: Tensor) -> Tensor:
    """What most raters say, shape [patients]."""
    return torch.stack([(ratings == c).sum(-1) for c in range(CONDITIONS)], -1).argmax(-1)


def main(argv: Sequence[str] | None = None) -> None:
    """Goes from the first look to the last.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description="A program of one's own: whom to believe.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("own-model-output"))
    parser.add_argument("--quick", action="store_true", help="10 steps")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    ratings, sick = make_data(seed=0)

    net = pyronat.analyze(model, ratings)
    print(net)
    net.plot(options.output / "network.png", blanket_of="sick")

    geometry = pyronat.Visible(mixing=0, posterior="enumerate", num_dreams=4000)
    fisher = pyronat.fisher(model, ratings, geometry=geometry, num_samples=10)
    slowest = fisher.missing_information()[0]
    squares = {name: float(value.square().sum()) for name, value in slowest.vector.items()}
    along = ", ".join(f"{name} {q / sum(squares.values()):.0%}" for name, q in squares.items())
    print(f"\nEM's error would shrink by {slowest.missing:.3f} an iteration, slowest along {along}")

    infos: list[pyronat.StepInfo] = []
    rule = pyronat.steps.LevenbergMarquardt()
    optim = pyronat.NaturalGradient(geometry=pyronat.Visible(rule, posterior="enumerate"))
    loss = TraceEnum_ELBO(max_plate_nesting=2)
    svi = pyronat.NaturalSVI(model, guide, optim, loss, [lambda info, svi: infos.append(info)])
    for _ in range(10 if options.quick else options.steps):
        svi.step(ratings)
    print(f"\nloss: {infos[0].loss:.2f} at the start, {infos[-1].loss:.2f} nats now\n{svi.info}")
    plot.training(infos, options.output / "course.png", len(ratings), "whom to believe")

    right = pyro.param("tables").detach().diagonal(dim1=-2, dim2=-1)
    print(
        "\nright of each condition, by rater:", [[round(x, 2) for x in r] for r in right.tolist()]
    )
    best = infer_discrete(model, first_available_dim=-3, temperature=0)
    found = poutine.trace(best).get_trace(ratings).nodes["sick"]["value"].flatten()
    for name, guess in (("most raters", majority(ratings)), ("the model", found)):
        print(f"conditions that {name} get right: {float((guess == sick).double().mean()):.1%}")
    says = Predictive(poutine.uncondition(model), num_samples=100)(ratings)["says"]
    drawn = sorted(agreement(torch.where(ratings >= 0, one, -1)) for one in says)
    print(f"raters agree: {agreement(ratings):.3f}, by the model {drawn[5]:.3f} to {drawn[94]:.3f}")
    if find_spec("graphviz") is not None:
        picture = pyro.render_model(model, model_args=(ratings,), render_params=True)
        picture.save(options.output / "model.gv")
    print(f"\nWrote to {options.output}")


if __name__ == "__main__":
    main()
