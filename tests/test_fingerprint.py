"""Fingerprints of runs: equal texts for equal structure, other texts for another one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import linear

from pyronat.autograd import edge_of
from pyronat.fingerprint import fingerprint, outline
from pyronat.programs import know
from pyronat.tracing import dream, params_of, records_of, run_constant

Program = Callable[..., Any]


MARKS: dict[Any, str] = {}
"""Fingerprints of all runs of these tests, by their outlines."""


def traced(program: Program, *args: Any) -> tuple[Any, dict[str, Tensor]]:
    """A plain run, sample values attached where they are reparametrized."""
    with pyro.validation_enabled(False):
        trace = poutine.trace(program).get_trace(*args)
    return records_of(trace), params_of(trace)


def mark(program: Program, *args: Any, positions: bool = True) -> str:
    """Fingerprint of a plain run; those of equal outlines are equal."""
    run = traced(program, *args)
    found = fingerprint(*run, positions)
    assert MARKS.setdefault(outline(*run, positions), found) == found
    return found


def net(x: Tensor) -> None:
    """A bit of everything: tables, slices, plates, several families."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=param("logits", 1, 4)))
        z = pyro.sample("z", dist.Normal(param("T", 2, 4, 2)[k], 1.0).to_event(1))
        hidden = linear(z, param("W", 3, 5, 2), param("b", 4, 5)).tanh()
        loc = linear(hidden[:, 1:4], param("V", 5, 3, 3))
        scale = pyro.param("s", lambda: torch.ones(3), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)
    pyro.sample("y", dist.Bernoulli(probs=param("yes", 6, 2)[0].sigmoid()))


# --- equal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [net, model, guide])
@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_sizes_of_batches_do_not_count(program: Program, size: int) -> None:
    assert mark(program, X[:size]) == mark(program, X)


@pytest.mark.parametrize("program", [net, model, guide])
def test_values_and_random_numbers_do_not_count(program: Program) -> None:
    expected = mark(program, X)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert mark(program, X) == expected
        with torch.no_grad():
            for _, leaf in pyro.get_param_store().named_parameters():
                leaf.normal_().mul_(0.3)
        assert mark(program, X + 1.0) == expected
    pyro.clear_param_store()
    assert mark(program, X) == expected


@pytest.mark.parametrize("program", [net, model])
def test_dreams_replays_and_analyses_agree(program: Program) -> None:
    expected = mark(program, X)
    run = dream(program, (X,), {})
    assert not any(record.observed for record in run.records)
    assert fingerprint(run.records, run.params) == expected
    run = run_constant(program, (X,), {}, {})
    assert fingerprint(run.records, run.params) == expected
    assert know(program, (X,), {}).runs == {expected}


def test_tables_that_are_read_by_scalars_do_not_count_positions() -> None:
    def single(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(logits=param("logits", 1, 4)))
        pyro.sample("y", dist.Normal(param("T", 2, 4)[k], 1.0), obs=x)

    for seed in range(4):
        pyro.set_rng_seed(seed)
        known = know(single, (X[0, 0],), {})
        assert not known.positions
        assert known.runs == {mark(single, X[0, 0], positions=False)}
    # Negative control: torch makes Python numbers of them.
    assert len({mark(single, X[0, 0]) for _ in range(20)}) > 1


CACHED: dict[str, Callable[[], Any]] = {
    "probs of Bernoulli": lambda: dist.Bernoulli(logits=param("p", 1, 3)),
    "logits of Bernoulli": lambda: dist.Bernoulli(probs=param("p", 1, 3).sigmoid()),
    "probs of Categorical": lambda: dist.Categorical(logits=param("p", 1, 3)),
    "logits of Categorical": lambda: dist.Categorical(probs=param("p", 1, 3).softmax(0)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(logits=param("p", 1, 3)),
    "Binomial": lambda: dist.Binomial(5, logits=param("p", 1, 3)),
    "Geometric": lambda: dist.Geometric(logits=param("p", 1, 3)),
    "covariance": lambda: dist.MultivariateNormal(
        param("p", 1, 3), scale_tril=param("s", 2, 3).exp().diag()
    ),
    "scale_tril": lambda: dist.MultivariateNormal(
        param("p", 1, 3), covariance_matrix=param("s", 2, 3).exp().diag()
    ),
    "precision": lambda: dist.MultivariateNormal(
        param("p", 1, 3), precision_matrix=param("s", 2, 3).exp().diag()
    ),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_distributions_compute_on_demand_does_not_count(name: str, wrapped: bool) -> None:
    def program(asked: tuple[str, ...]) -> None:
        base = fn = CACHED[name]()
        if wrapped:
            fn = fn.expand((4, *fn.batch_shape)).to_event(1).mask(torch.tensor(True))
        for attribute in asked:
            getattr(fn.base_dist.base_dist if wrapped else base, attribute, None)
        pyro.sample("x", fn)

    parts = ("probs", "logits", "scale_tril", "covariance_matrix", "precision_matrix")
    expected = mark(program, ())
    for asked in [*((part,) for part in parts), parts, parts[::-1]]:
        assert mark(program, asked) == expected, asked


def test_values_that_have_been_scored_do_not_count() -> None:
    trace = poutine.trace(net).get_trace(X)
    before = fingerprint(records_of(trace), params_of(trace))
    trace.compute_log_prob()
    for record in records_of(trace):
        record.distribution.log_prob(record.value)
        record.distribution.expand(record.distribution.batch_shape)
    assert fingerprint(records_of(trace), params_of(trace)) == before


def test_digests_are_the_same_in_every_process() -> None:
    """Whatever the seed of Python's hash; and a checkpoint of another day is still good."""
    code = (
        "import torch; torch.set_default_dtype(torch.float64); torch.set_num_threads(1)\n"
        "from test_fingerprint import X, mark, net\n"
        "print(mark(net, X))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert found == mark(net, X)


# --- different -----------------------------------------------------------------------------------


def base(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_parameter(x: Tensor) -> None:
    loc = linear(x, param("V", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_operation(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).sigmoid()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def no_bias(x: Tensor) -> None:
    param("b", 2, 3)
    loc = linear(x, param("W", 1, 3, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_order_of_operations(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3).tanh(), param("b", 2, 3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_order_of_sites(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))


def other_family(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.LogNormal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_coordinate(x: Tensor) -> None:
    """The same graph reaches the scale instead of the location."""
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(1.0, loc[:, 0]))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_plates(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def no_plate(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    pyro.sample("x", dist.Normal(loc[:, 0], 1.0).to_event(1))
    pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(2))


def other_column(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 1], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


def other_start(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 0:2], 1.0).to_event(1))


def other_step(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3:2], 1.0).to_event(1))


def one_site_more(x: Tensor) -> None:
    base(x)
    pyro.sample("more", dist.Normal(0.0, 1.0))


def other_name(x: Tensor) -> None:
    loc = linear(x, param("W", 1, 3, 3), param("b", 2, 3)).tanh()
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(loc[:, 0], 1.0))
        pyro.sample("y", dist.Normal(loc[:, 1:3], 1.0).to_event(1))


OTHERS = [
    other_parameter,
    other_operation,
    no_bias,
    other_order_of_operations,
    other_order_of_sites,
    other_family,
    other_coordinate,
    other_plates,
    no_plate,
    other_column,
    other_start,
    other_step,
    one_site_more,
    other_name,
]


@pytest.mark.parametrize("program", OTHERS)
def test_another_structure_is_another_text(program: Program) -> None:
    assert mark(program, X) != mark(base, X)
    assert mark(program, X) == mark(program, X[:5])


def test_all_of_them_differ_from_each_other() -> None:
    assert len({mark(program, X) for program in [base, *OTHERS]}) == 1 + len(OTHERS)


@pytest.mark.parametrize("program", [base, net, model, guide, *OTHERS])
def test_outlines_of_runs_of_one_program_are_equal(program: Program) -> None:
    expected = outline(*traced(program, X))
    for seed in range(2):
        pyro.set_rng_seed(seed)
        assert outline(*traced(program, X[: 5 + seed])) == expected


def test_outlines_differ_where_fingerprints_do() -> None:
    assert len({outline(*traced(p, X)) for p in [base, *OTHERS]}) == 1 + len(OTHERS)


@pytest.mark.parametrize("program", [other_column, other_start, other_step])
def test_positions_do_not_count_where_they_may_not(program: Program) -> None:
    assert mark(program, X, positions=False) == mark(base, X, positions=False)
    assert mark(other_order_of_sites, X, positions=False) != mark(base, X, positions=False)


def test_the_order_of_arguments_counts() -> None:
    def divided(first: str, second: str) -> None:
        a, b = param("a", 1), param("b", 2)
        pair = {"a": a, "b": b}
        pyro.sample("x", dist.Normal(pair[first] / pair[second], 1.0))

    assert mark(divided, "a", "b") != mark(divided, "b", "a")


def test_outputs_of_one_operation_are_told_apart() -> None:
    def unbound(index: int) -> None:
        pyro.sample("x", dist.Normal(param("a", 1, 3).unbind()[index], 1.0))

    assert len({mark(unbound, index) for index in range(3)}) == 3


# --- sample values -------------------------------------------------------------------------------


def chain(family: Any, detached: bool) -> None:
    z = pyro.sample("z", family(param("a", 1, 3)).to_event(1))
    z = z.detach() if detached else z
    pyro.sample("x", dist.Normal(param("b", 2, 3) * z, 1.0).to_event(1))


def normal(loc: Tensor) -> Any:
    return dist.Normal(loc, 1.0)


def test_reparametrized_values_are_constants() -> None:
    """They carry the graph of the distribution that they come from."""
    attached = poutine.trace(chain).get_trace(normal, False)
    assert attached.nodes["z"]["value"].grad_fn is not None
    expected = fingerprint(records_of(attached), params_of(attached))
    run = run_constant(chain, (normal, False), {}, {})
    assert not any(record.value.requires_grad for record in run.records)
    # torch saves no branch for an input without gradient: both are products with a constant.
    assert fingerprint(run.records, run.params) == expected
    assert know(chain, (normal, False), {}).runs == {expected}


def test_values_that_are_leaves_are_constants() -> None:
    """As those that are replayed with a gradient of their own."""
    value = torch.ones(3).requires_grad_()

    def conditioned() -> poutine.Trace:
        with poutine.condition(data={"z": value}):
            return poutine.trace(chain).get_trace(normal, False)

    trace = conditioned()
    records = records_of(trace)
    assert any(record.value is value for record in records)
    attached = poutine.trace(chain).get_trace(normal, False)
    expected = fingerprint(records_of(attached), params_of(attached))
    assert fingerprint(records, params_of(trace)) == expected
    # Negative control: a leaf that is no sample value counts.
    foreign = torch.ones(3).requires_grad_()

    def reading() -> None:
        pyro.sample("z", normal(param("a", 1, 3)).to_event(1))
        pyro.sample("x", dist.Normal(param("b", 2, 3) * foreign, 1.0).to_event(1))

    assert mark(reading) != expected


def test_what_a_value_depends_on_counts_at_its_own_site_alone() -> None:
    def deep(steps: int) -> None:
        loc = param("a", 1, 3)
        for _ in range(steps):
            loc = loc.tanh()
        z = pyro.sample("z", normal(loc).to_event(1))
        pyro.sample("x", dist.Normal(param("b", 2, 3) * z, 1.0).to_event(1))

    def without_z(trace: poutine.Trace) -> str:
        records = records_of(trace)
        values = {id(record.value) for record in records}
        assert len(values) == 2
        return fingerprint(records[1:], params_of(trace))

    one, two = (poutine.trace(deep).get_trace(steps) for steps in (1, 2))
    assert mark(deep, 1) != mark(deep, 2)
    # Negative control: cut off from the records, the value of z is an ordinary tensor.
    assert without_z(one) != without_z(two)


# --- long graphs ---------------------------------------------------------------------------------


def recurrent(steps: int) -> None:
    h, W, b = torch.zeros(2), param("W", 1, 2, 2), param("b", 2, 2)
    for _ in range(steps):
        h = (W @ h + b).tanh()
    pyro.sample("x", dist.Normal(h, 1.0).to_event(1))


def test_long_graphs() -> None:
    trace = poutine.trace(recurrent).get_trace(2000)
    records, params = records_of(trace), params_of(trace)
    start = time.process_time()
    found = fingerprint(records, params)
    assert time.process_time() - start < 1
    assert found == mark(recurrent, 2000)
    assert found != mark(recurrent, 1999)


def test_graphs_that_join_again_and_again() -> None:
    """2^60 paths, sixty nodes."""

    def doubling(steps: int) -> None:
        loc = param("a", 1)
        for _ in range(steps):
            loc = (loc + loc) / 2
        pyro.sample("x", dist.Normal(loc, 1.0))

    start = time.process_time()
    assert mark(doubling, 60) != mark(doubling, 61)
    assert time.process_time() - start < 1


# --- canary --------------------------------------------------------------------------------------


def test_torch_says_which_part_of_a_tensor_is_read() -> None:
    """Private names of torch, which the fingerprint reads."""
    table = torch.zeros(4, 5, requires_grad=True)
    selected, _ = edge_of(table.select(1, 3))
    assert selected.name() == "SelectBackward0"
    assert (selected._saved_dim, selected._saved_index) == (1, 3)
    sliced, _ = edge_of(table[:, 1:4:2])
    while sliced.name() == "AliasBackward0":
        sliced = sliced.next_functions[0][0]
    assert sliced.name() == "SliceBackward0"
    found = (sliced._saved_dim, sliced._saved_start, sliced._saved_end, sliced._saved_step)
    assert found == (1, 1, 4, 2)
    assert edge_of(table[3])[0].name() == "SelectBackward0"
    other = edge_of(table.select(1, 2))[0]
    assert other._saved_index != selected._saved_index
