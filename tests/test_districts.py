"""`plan_districts`: which blocks hidden variables tie together, and what is independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import randn
from torch import Tensor

from pyronat.districts import DistrictPlan, Part, plan_districts
from pyronat.plans import make_plan
from pyronat.programs import know

Model = Callable[[Tensor], Any]

DATA = randn(1, 5).sign().clamp_min(0)


def param(name: str, *shape: int) -> Tensor:
    return pyro.param(name, lambda: randn(sum(map(ord, name)), *shape))


def bernoulli(name: str, logits: Any, obs: Tensor | None = None) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits), obs=obs)


def data(x: Tensor) -> Any:
    return pyro.plate("data", len(x), dim=-1)


# --- models ------------------------------------------------------------------------------------


def all_seen(x: Tensor) -> None:
    with data(x):
        y = bernoulli("y", param("a"), x)
        bernoulli("x", param("b") * y, x)


def one_hidden(x: Tensor) -> None:
    with data(x):
        z = bernoulli("z", param("a"))
        bernoulli("x", param("b") * z + param("c"), x)


def two_hidden(x: Tensor) -> None:
    """Two independent hidden sites, and a family without any."""
    with data(x):
        z1, z2 = bernoulli("z1", param("a1")), bernoulli("z2", param("a2"))
        x1 = bernoulli("x1", param("b1") * z1, x)
        bernoulli("x2", param("b2") * z2, x)
        bernoulli("y", param("c") * x1, x)


def explaining(x: Tensor) -> None:
    """Two hidden sites with a common child."""
    with data(x):
        z1, z2 = bernoulli("z1", param("a1")), bernoulli("z2", param("a2"))
        bernoulli("x", param("b1") * z1 + param("b2") * z2, x)


def shared_weight(x: Tensor) -> None:
    with data(x):
        z1, z2 = bernoulli("z1", param("a1")), bernoulli("z2", param("a2"))
        bernoulli("x1", param("b") * z1, x)
        bernoulli("x2", param("b") * z2, x)


def shared_with_seen(x: Tensor) -> None:
    """A weight of a family without hidden members, used in a district as well."""
    with data(x):
        z = bernoulli("z", param("a"))
        y = bernoulli("y", param("c"), x)
        bernoulli("x1", param("b") * z, x)
        bernoulli("x2", param("b") * y, x)


def outside(x: Tensor) -> None:
    """A hidden site that all data share."""
    z = bernoulli("z", param("a"))
    with data(x):
        bernoulli("x", param("b") * z, x)


def half_outside(x: Tensor) -> None:
    """Replicates along one of two plates."""
    with pyro.plate("groups", 2, dim=-2):
        z = bernoulli("z", param("a"))
        with data(x):
            bernoulli("x", param("b") * z, x)


def batch_norm(x: Tensor) -> None:
    with data(x):
        z = bernoulli("z", param("a"))
        bernoulli("x", param("b") * (z - z.mean(-1, keepdim=True)), x)


def chain(x: Tensor) -> None:
    with data(x):
        z1 = bernoulli("z1", param("a"))
        z2 = bernoulli("z2", param("b") * z1)
        bernoulli("x", param("c") * z2, x)


def fixed_noise(x: Tensor) -> None:
    """A district without parameters of its own, one with."""
    with data(x):
        z = bernoulli("z", torch.tensor(0.3))
        bernoulli("x", z - 0.5, x)
        bernoulli("y", param("c"), x)


def layer(x: Tensor) -> None:
    """A block of several units."""
    with data(x):
        z = pyro.sample("z", dist.Bernoulli(logits=param("a", 3)).to_event(1))
        logits = z @ param("w", 3, 2) + param("b", 2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=torch.stack([x, x], -1))


# --- guides ------------------------------------------------------------------------------------


def apart(x: Tensor) -> None:
    with data(x):
        bernoulli("z1", param("q1") * x)
        bernoulli("z2", param("q2") * x)


def together(x: Tensor) -> None:
    with data(x):
        z1 = bernoulli("z1", param("q1") * x)
        bernoulli("z2", param("q2") * z1)


def coupled(x: Tensor) -> None:
    """The second site reads the mean of the data."""
    with data(x):
        z1 = bernoulli("z1", param("q1") * x)
        bernoulli("z2", param("q2") * (x - x.mean()))
        assert z1.shape == x.shape


def batch_mean(x: Tensor) -> None:
    with data(x):
        bernoulli("z", param("q1") * (x - x.mean()))


def by_datum(x: Tensor) -> None:
    with data(x):
        bernoulli("z", param("q1") * x)


def whole(x: Tensor) -> None:
    """Proposes one vector, without the plate of the data."""
    logits = (param("q1") * x).expand(len(x))
    pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


# --- table -------------------------------------------------------------------------------------


def part(sites: str, hidden: str = "", replicates: str = "data") -> Part:
    return Part(tuple(sites.split()), tuple(hidden.split()), tuple(replicates.split()))


def plan(blocks: str, size: int, *parts: Part) -> DistrictPlan:
    return DistrictPlan(tuple(blocks.split("; ")), size, parts)


@dataclass(frozen=True)
class Row:
    """A model, a guide if it matters, and the plans."""

    model: Model
    plans: tuple[DistrictPlan, ...]
    guide: Model | None = None

    def __str__(self) -> str:
        guide = () if self.guide is None else (self.guide.__name__,)
        return "-".join([self.model.__name__, *guide])


TWO = (part("x1 z1", "z1"), part("x2 z2", "z2"))

TABLE = (
    Row(all_seen, ()),
    Row(one_hidden, (plan("a; b, c", 3, part("x z", "z")),)),
    Row(one_hidden, (plan("a; b, c", 3, part("x z", "z")),), by_datum),
    Row(one_hidden, (plan("a; b, c", 3, part("x z", "z", "")),), batch_mean),
    Row(one_hidden, (plan("a; b, c", 3, part("x z", "z", "")),), whole),
    Row(two_hidden, (plan("a1; b1", 2, TWO[0]), plan("a2; b2", 2, TWO[1]))),
    Row(two_hidden, (plan("a1; b1", 2, TWO[0]), plan("a2; b2", 2, TWO[1])), apart),
    Row(two_hidden, (plan("a1; a2; b1; b2", 4, part("x1 x2 z1 z2", "z1 z2")),), together),
    Row(
        two_hidden,
        (plan("a1; b1", 2, TWO[0]), plan("a2; b2", 2, part("x2 z2", "z2", ""))),
        coupled,
    ),
    Row(explaining, (plan("a1; a2; b1, b2", 4, part("x z1 z2", "z1 z2")),)),
    Row(shared_weight, (plan("a1; a2; b", 3, *TWO),)),
    Row(shared_weight, (plan("a1; a2; b", 3, *TWO),), apart),
    Row(shared_weight, (plan("a1; a2; b", 3, part("x1 x2 z1 z2", "z1 z2")),), together),
    Row(shared_with_seen, (plan("a; b", 2, part("x1 z", "z"), part("x2")),)),
    Row(outside, (plan("a; b", 2, part("x z", "z", "")),)),
    Row(half_outside, (plan("a; b", 2, part("x z", "z", "groups")),)),
    Row(batch_norm, (plan("a; b", 2, part("x z", "z", "")),)),
    Row(chain, (plan("a; b; c", 3, part("x z1 z2", "z1 z2")),)),
    Row(fixed_noise, ()),
    Row(layer, (plan("a; b, w", 11, part("x z", "z")),)),
)
by_row = pytest.mark.parametrize("row", TABLE, ids=str)


def planned(row: Row, excluded: tuple[str, ...] = ()) -> tuple[DistrictPlan, ...]:
    known = know(row.model, (DATA,), {})
    guide = None if row.guide is None else know(row.guide, (DATA,), {}).net
    return plan_districts(known.net, make_plan(known, excluded).blocks, guide)


@by_row
def test_plans(row: Row) -> None:
    assert planned(row) == row.plans


@by_row
def test_plans_are_a_partition_of_blocks_with_hidden_members(row: Row) -> None:
    known = know(row.model, (DATA,), {})
    blocks = make_plan(known).blocks
    plans = planned(row)
    names = [name for one in plans for name in one.blocks]
    assert len(set(names)) == len(names) and set(names) <= set(blocks)
    hidden = {site.name for site in known.net.sites if site.kind == "latent"}
    for one in plans:
        assert one.name == "; ".join(one.blocks) and one.blocks == tuple(sorted(one.blocks))
        assert one.size == sum(blocks[name].num_entries for name in one.blocks)
        assert any(part.hidden for part in one.parts)
        for part in one.parts:
            assert set(part.hidden) == hidden & set(part.sites)
    # What is in no plan has children of visible sites alone.
    families = {name: set(blocks[name].sites) for name in blocks.keys() - set(names)}
    for sites in families.values():
        for site in sites:
            assert not hidden & ({site} | known.net.parents(site)), site


@by_row
def test_order_is_that_of_names(row: Row) -> None:
    """However the blocks come, and in every process."""
    known = know(row.model, (DATA,), {})
    blocks = make_plan(known).blocks
    guide = None if row.guide is None else know(row.guide, (DATA,), {}).net
    turned = dict(reversed(blocks.items()))
    assert plan_districts(known.net, turned, guide) == row.plans
    turned_net = replace(known.net, edges=known.net.edges[::-1])
    assert plan_districts(turned_net, blocks, guide) == row.plans


def test_excluded_blocks_are_in_no_plan() -> None:
    row = next(row for row in TABLE if row.model is two_hidden)
    assert planned(row, ("a1", "b1")) == row.plans[1:]
    assert planned(row, ("b1",)) == (plan("a1", 1, TWO[0]), row.plans[1])
    tied = Row(shared_weight, ())
    # Without the block that they share they are apart.
    assert planned(tied, ("b",)) == (plan("a1", 1, TWO[0]), plan("a2", 1, TWO[1]))


def test_a_guide_that_unites_nothing_changes_nothing() -> None:
    """Negative control: the rows with guides differ by their edges and plates alone."""
    row = next(row for row in TABLE if row.guide is together)
    guide = know(together, (DATA,), {}).net
    known = know(two_hidden, (DATA,), {})
    blocks = make_plan(known).blocks
    without = replace(guide, edges=())
    assert plan_districts(known.net, blocks, without) == planned(replace(row, guide=None))
    assert plan_districts(known.net, blocks, guide) == row.plans
