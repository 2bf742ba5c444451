"""Tiny discrete nets, each unmodified Pyro, with what is known about them exactly.

Every net has at most 2**10 joint states, so that `pyronat.testing` can enumerate it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True)
class Block:
    """What is known about one block of the full Fisher.

    `structure` None stands for "not claimed": two descriptions of the block would be right.
    """

    params: frozenset[str]
    structure: str | None = None
    count: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Case:
    """A net, its arguments, and its exact structure.

    `districts` holds the sites of each district; districts that share a parameter are not merged.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    parents: Mapping[str, frozenset[str]]
    observed: frozenset[str]
    blocks: frozenset[Block]
    districts: frozenset[frozenset[str]]
    guide: Callable[..., Any] | None = None
    guide_parents: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def value(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Fixed seeded values in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return scale * values.to(torch.get_default_device())


def logits(name: str, seed: int, *shape: int) -> Tensor:
    return pyro.param(name, lambda: value(seed, *shape))


def bernoulli(name: str, logits: Tensor, obs: Tensor | None = None) -> Tensor:
    fn = dist.Bernoulli(logits=logits)
    return pyro.sample(name, fn.to_event(1) if logits.dim() == 1 else fn, obs=obs)


def unit(*params: str, count: int = 1, size: int = 1) -> Block:
    return Block(frozenset(params), "unit", count, size)


def dense(*params: str, size: int) -> Block:
    return Block(frozenset(params), "dense", 1, size)


def sets(*groups: str) -> frozenset[frozenset[str]]:
    """`sets("a b", "c")` is {{a, b}, {c}}."""
    return frozenset(frozenset(group.split()) for group in groups)


def dag(**parents: str) -> dict[str, frozenset[str]]:
    """`dag(a="", b="a")` has the edge a → b."""
    return {site: frozenset(names.split()) for site, names in parents.items()}


def bits(*entries: int) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


# --- chain: z1 → z2 → x ------------------------------------------------------------------------


def chain(x: Tensor) -> None:
    z1 = bernoulli("z1", logits("a", 1))
    z2 = bernoulli("z2", logits("b", 2) * z1 + logits("c", 3))
    bernoulli("x", logits("d", 4) * z2 + logits("e", 5), obs=x)


def chain_guide(x: Tensor) -> None:
    z2 = bernoulli("z2", logits("q.b", 11) * x + logits("q.c", 12))
    bernoulli("z1", logits("q.d", 13) * z2 + logits("q.e", 14))


# --- collider: a → c ← b -----------------------------------------------------------------------


def collider(c: Tensor) -> None:
    a = bernoulli("a", logits("pa", 1))
    b = bernoulli("b", logits("pb", 2))
    bernoulli("c", logits("pc", 3, 3) @ torch.stack([a, b, torch.ones_like(a)]), obs=c)


def collider_guide(c: Tensor) -> None:
    bernoulli("a", logits("q.a", 11))
    bernoulli("b", logits("q.b", 12))


# --- hidden middle: a → h → c, a → d; the family of d has no hidden member ---------------------


def hidden_middle(a: Tensor, c: Tensor, d: Tensor) -> None:
    a = bernoulli("a", logits("pa", 1), obs=a)
    h = bernoulli("h", logits("ph", 2, 2)[a.long()])
    bernoulli("c", logits("pc", 3, 2)[h.long()], obs=c)
    bernoulli("d", logits("pd", 4, 2)[a.long()], obs=d)


def hidden_middle_guide(a: Tensor, c: Tensor, d: Tensor) -> None:
    bernoulli("h", logits("q.h", 11, 2, 2)[a.long(), c.long()])


# --- shared: one parameter at two sites --------------------------------------------------------


def shared(b: Tensor) -> None:
    a = bernoulli("a", logits("t", 1))
    bernoulli("b", logits("t", 1) + logits("u", 2) * a, obs=b)


def shared_guide(b: Tensor) -> None:
    bernoulli("a", logits("q.t", 11))


# --- hmm: one transition and one emission matrix for all times ---------------------------------


def hmm(x: Tensor) -> None:
    transition, emission = logits("transition", 1, 2, 2), logits("emission", 2, 2)
    z = torch.zeros((), dtype=torch.long)
    for time in range(len(x)):
        z = pyro.sample(f"z{time}", dist.Categorical(logits=transition[z]))
        pyro.sample(f"x{time}", dist.Bernoulli(logits=emission[z]), obs=x[time])


def hmm_guide(x: Tensor) -> None:
    for time in range(len(x)):
        pyro.sample(f"z{time}", dist.Categorical(logits=logits("q.z", 11, len(x), 2)[time]))


# --- subsample: a plate of 6 of which 3 are seen, below a global hidden site -------------------


def subsample(x: Tensor, indices: Tensor) -> None:
    g = bernoulli("g", logits("p", 1))
    with pyro.plate("data", 6, subsample=indices):
        z = bernoulli_element("z", logits("w", 2))
        bernoulli_element("x", logits("v", 3) * z + logits("b", 4) * g, obs=x)


def bernoulli_element(name: str, logits: Tensor, obs: Tensor | None = None) -> Tensor:
    """A site of scalar events, whatever the plates around it."""
    return pyro.sample(name, dist.Bernoulli(logits=logits), obs=obs)


def subsample_guide(x: Tensor, indices: Tensor) -> None:
    bernoulli("g", logits("q.g", 11))
    with pyro.plate("data", 6, subsample=indices):
        bernoulli_element("z", logits("q.z", 12) * x + logits("q.b", 13))


# --- constrained: probabilities on the unit interval, and a simplex ----------------------------


def constrained(x: Tensor) -> None:
    initial = torch.tensor([0.3, 0.8], dtype=torch.float64)
    p = pyro.param("p", lambda: initial, constraint=constraints.unit_interval)
    initial_simplex = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    s = pyro.param("s", lambda: initial_simplex, constraint=constraints.simplex)
    initial_rows = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    r = pyro.param("r", lambda: initial_rows, constraint=constraints.unit_interval)
    pyro.sample("a", dist.Bernoulli(p).to_event(1))
    k = pyro.sample("k", dist.Categorical(s))
    pyro.sample("x", dist.Bernoulli(r[k]), obs=x)


def constrained_guide(x: Tensor) -> None:
    bernoulli("a", logits("q.a", 11, 2))
    pyro.sample("k", dist.Categorical(logits=logits("q.k", 12, 3)))


# --- cpt: categorical tables with one and with two parents -------------------------------------


def cpt(a: Tensor, b: Tensor, d: Tensor) -> None:
    a = pyro.sample("a", dist.Categorical(logits=logits("ta", 1, 2)), obs=a)
    b = pyro.sample("b", dist.Categorical(logits=logits("tb", 2, 2, 3)[a]), obs=b)
    c = pyro.sample("c", dist.Categorical(logits=logits("tc", 3, 2, 3, 2)[a, b]))
    pyro.sample("d", dist.Categorical(logits=logits("td", 4, 2, 2)[c]), obs=d)


def cpt_guide(a: Tensor, b: Tensor, d: Tensor) -> None:
    pyro.sample("c", dist.Categorical(logits=logits("q.c", 11, 2, 2)[d]))


# --- sbn: a sigmoid belief network 3-2-4 -------------------------------------------------------


def sbn(v: Tensor) -> None:
    h2 = bernoulli("h2", logits("b2", 1, 3))
    h1 = bernoulli("h1", F.linear(h2, logits("W1", 2, 2, 3), logits("b1", 3, 2)))
    bernoulli("v", F.linear(h1, logits("W0", 4, 4, 2), logits("b0", 5, 4)), obs=v)


def sbn_guide(v: Tensor) -> None:
    h1 = bernoulli("h1", F.linear(v, logits("q.W1", 11, 2, 4), logits("q.b1", 12, 2)))
    bernoulli("h2", F.linear(h1, logits("q.W2", 13, 3, 2), logits("q.b2", 14, 3)))


# --- module: an nn.Linear registered by pyro.module --------------------------------------------


def linear_layer(seed: int, inputs: int, units: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, units, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(value(seed, units, inputs))
        layer.bias.copy_(value(seed + 1, units))
    return layer


DECODER = linear_layer(2, 2, 3)


def module(x: Tensor) -> None:
    decoder = pyro.module("decoder", DECODER)
    h = bernoulli("h", logits("prior", 1, 2))
    bernoulli("x", decoder(h), obs=x)


def module_guide(x: Tensor) -> None:
    bernoulli("h", logits("q.h", 11, 2))


# --- pyro_module: a program that is a PyroModule -----------------------------------------------


class Program(PyroModule):
    """A PyroParam for the root, a PyroModule[nn.Linear] for its child."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = PyroParam(lambda: value(1, 2))
        self.child = PyroModule[torch.nn.Linear](2, 2, dtype=torch.float64)
        with torch.no_grad():
            self.child.weight.copy_(value(2, 2, 2))
            self.child.bias.copy_(value(3, 2))

    def forward(self, x: Tensor) -> None:
        h = bernoulli("h", self.prior)
        bernoulli("x", self.child(h), obs=x)


PROGRAM = Program()


def pyro_module(x: Tensor) -> None:
    PROGRAM(x)


# --- masked: the middle one of three elements is masked ----------------------------------------


def masked(x: Tensor, mask: Tensor) -> None:
    z = bernoulli("z", logits("m", 1))
    with pyro.plate("n", 3), poutine.mask(mask=mask):
        bernoulli_element("x", logits("loc", 2, 3) + logits("w", 3) * z, obs=x)


def masked_guide(x: Tensor, mask: Tensor) -> None:
    bernoulli("z", logits("q.z", 11))


# --- tied: one linear layer at two sites -------------------------------------------------------


def tied(y: Tensor) -> None:
    weight, bias = logits("W", 2, 2, 2), logits("b", 3, 2)
    h = bernoulli("h", logits("p", 1, 2))
    x = bernoulli("x", F.linear(h, weight, bias))
    bernoulli("y", F.linear(x, weight, bias), obs=y)


def tied_guide(y: Tensor) -> None:
    bernoulli("h", logits("q.h", 11, 2))
    bernoulli("x", F.linear(y, logits("q.W", 12, 2, 2), logits("q.b", 13, 2)))


# --- regression: fully visible, covariates are an argument -------------------------------------


def regression(x: Tensor, y: Tensor) -> None:
    weight, bias = logits("W", 1, 2, 2), logits("b", 2, 2)
    with pyro.plate("data", len(x)):
        fn = dist.Bernoulli(logits=F.linear(x, weight, bias))
        pyro.sample("y", fn.to_event(1), obs=y)


# --- bank: two hidden sites in districts of their own, one visible family between --------------


def bank(x: Tensor, y: Tensor, z: Tensor) -> None:
    h = bernoulli("h", logits("ph", 1))
    x = bernoulli("x", logits("px", 2, 2)[h.long()], obs=x)
    y = bernoulli("y", logits("py", 3, 2)[x.long()], obs=y)
    g = bernoulli("g", logits("pg", 4, 2)[y.long()])
    bernoulli("z", logits("pz", 5, 2)[g.long()], obs=z)


def bank_guide(x: Tensor, y: Tensor, z: Tensor) -> None:
    bernoulli("h", logits("q.h", 11, 2)[x.long()])
    bernoulli("g", logits("q.g", 12, 2)[z.long()])


# --- squashed: probabilities that keep away from 0 and 1 ---------------------------------------


def squashed(c: Tensor) -> None:
    a = bernoulli("a", logits("b0", 1, 3))
    b = pyro.sample(
        "b", dist.Bernoulli(torch.sigmoid(F.linear(a, logits("W1", 2, 2, 3)))).to_event(1)
    )
    probs = 0.02 + 0.96 * torch.sigmoid(F.linear(b, logits("W2", 3, 3, 2), logits("b2", 4, 3)))
    pyro.sample("c", dist.Bernoulli(probs).to_event(1), obs=c)


# --- deep: a network with a hidden layer between two sites -------------------------------------


def deep(c: Tensor) -> None:
    a = bernoulli("a", logits("b0", 1, 2))
    h = torch.tanh(F.linear(a, logits("V", 2, 3, 2), logits("v", 3, 3)))
    bernoulli("c", F.linear(h, logits("U", 4, 3, 3), logits("u", 5, 3)), obs=c)


# --- convolution: one kernel at all places -----------------------------------------------------


def convolution(c: Tensor) -> None:
    a = bernoulli("a", logits("b0", 1, 4))
    bernoulli("c", F.conv1d(a[None, None], logits("kernel", 2, 1, 1, 2))[0, 0], obs=c)


# --- triangular: a fully visible belief network, written in place ------------------------------


def triangular(v: Tensor) -> None:
    weight, bias = logits("W", 1, 4, 4), logits("b", 2, 4)
    x = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        value = pyro.sample(f"v{i}", dist.Bernoulli(logits=weight[i] @ x + bias[i]), obs=v[i])
        x = x.clone()
        x[i] = value


CASES: tuple[Case, ...] = (
    Case(
        name="chain",
        model=chain,
        args=(bits(1)[0],),
        parents=dag(z1="", z2="z1", x="z2"),
        observed=frozenset({"x"}),
        blocks=frozenset({unit("a"), dense("b", "c", size=2), dense("d", "e", size=2)}),
        districts=sets("z1 z2 x"),
        guide=chain_guide,
        guide_parents=dag(z2="", z1="z2"),
    ),
    Case(
        name="collider",
        model=collider,
        args=(bits(1)[0],),
        parents=dag(a="", b="", c="a b"),
        observed=frozenset({"c"}),
        blocks=frozenset({unit("pa"), unit("pb"), dense("pc", size=3)}),
        districts=sets("a b c"),
        guide=collider_guide,
        guide_parents=dag(a="", b=""),
    ),
    Case(
        name="hidden_middle",
        model=hidden_middle,
        args=tuple(bits(1, 0, 1)),
        parents=dag(a="", h="a", c="h", d="a"),
        observed=frozenset({"a", "c", "d"}),
        blocks=frozenset({
            unit("pa"),
            unit("ph", count=2),
            unit("pc", count=2),
            unit("pd", count=2),
        }),
        districts=sets("a", "h c", "d"),
        guide=hidden_middle_guide,
        guide_parents=dag(h=""),
    ),
    Case(
        name="shared",
        model=shared,
        args=(bits(1)[0],),
        parents=dag(a="", b="a"),
        observed=frozenset({"b"}),
        blocks=frozenset({dense("t", "u", size=2)}),
        districts=sets("a b"),
        guide=shared_guide,
        guide_parents=dag(a=""),
    ),
    Case(
        name="hmm",
        model=hmm,
        args=(bits(1, 0, 1),),
        parents=dag(z0="", z1="z0", z2="z1", x0="z0", x1="z1", x2="z2"),
        observed=frozenset({"x0", "x1", "x2"}),
        blocks=frozenset({unit("transition", count=2, size=2), unit("emission", count=2)}),
        districts=sets("z0 z1 z2 x0 x1 x2"),
        guide=hmm_guide,
        guide_parents=dag(z0="", z1="", z2=""),
    ),
    Case(
        name="subsample",
        model=subsample,
        args=(bits(1, 0, 1), torch.tensor([0, 2, 5])),
        parents=dag(g="", z="", x="g z"),
        observed=frozenset({"x"}),
        blocks=frozenset({unit("p"), unit("w"), dense("v", "b", size=2)}),
        districts=sets("g z x"),
        guide=subsample_guide,
        guide_parents=dag(g="", z=""),
    ),
    Case(
        name="constrained",
        model=constrained,
        args=(bits(1)[0],),
        parents=dag(a="", k="", x="k"),
        observed=frozenset({"x"}),
        blocks=frozenset({unit("p", count=2), dense("s", size=3), unit("r", count=3)}),
        districts=sets("a", "k x"),
        guide=constrained_guide,
        guide_parents=dag(a="", k=""),
    ),
    Case(
        name="cpt",
        model=cpt,
        args=tuple(torch.tensor([1, 2, 0])),
        parents=dag(a="", b="a", c="a b", d="c"),
        observed=frozenset({"a", "b", "d"}),
        blocks=frozenset({
            dense("ta", size=2),
            unit("tb", count=2, size=3),
            unit("tc", count=6, size=2),
            unit("td", count=2, size=2),
        }),
        districts=sets("a", "b", "c d"),
        guide=cpt_guide,
        guide_parents=dag(c=""),
    ),
    Case(
        name="sbn",
        model=sbn,
        args=(bits(1, 0, 1, 1),),
        parents=dag(h2="", h1="h2", v="h1"),
        observed=frozenset({"v"}),
        blocks=frozenset({
            unit("b2", count=3),
            unit("W1", "b1", count=2, size=4),
            unit("W0", "b0", count=4, size=3),
        }),
        districts=sets("h2 h1 v"),
        guide=sbn_guide,
        guide_parents=dag(h1="", h2="h1"),
    ),
    Case(
        name="module",
        model=module,
        args=(bits(1, 0, 1),),
        parents=dag(h="", x="h"),
        observed=frozenset({"x"}),
        blocks=frozenset({
            unit("prior", count=2),
            unit("decoder$$$weight", "decoder$$$bias", count=3, size=3),
        }),
        districts=sets("h x"),
        guide=module_guide,
        guide_parents=dag(h=""),
    ),
    Case(
        name="pyro_module",
        model=pyro_module,
        args=(bits(1, 0),),
        parents=dag(h="", x="h"),
        observed=frozenset({"x"}),
        blocks=frozenset({
            unit("prior", count=2),
            unit("child.weight", "child.bias", count=2, size=3),
        }),
        districts=sets("h x"),
        guide=module_guide,
        guide_parents=dag(h=""),
    ),
    Case(
        name="masked",
        model=masked,
        args=(bits(1, 0, 1), torch.tensor([True, False, True])),
        parents=dag(z="", x="z"),
        observed=frozenset({"x"}),
        blocks=frozenset({unit("m"), dense("loc", "w", size=4)}),
        districts=sets("z x"),
        guide=masked_guide,
        guide_parents=dag(z=""),
    ),
    Case(
        name="tied",
        model=tied,
        args=(bits(1, 0),),
        parents=dag(h="", x="h", y="x"),
        observed=frozenset({"y"}),
        blocks=frozenset({unit("p", count=2), Block(frozenset({"W", "b"}))}),
        districts=sets("h x y"),
        guide=tied_guide,
        guide_parents=dag(h="", x=""),
    ),
    Case(
        name="regression",
        model=regression,
        args=(value(9, 4, 2), bits(1, 0, 1, 1, 0, 0, 1, 0).reshape(4, 2)),
        parents=dag(y=""),
        observed=frozenset({"y"}),
        blocks=frozenset({unit("W", "b", count=2, size=3)}),
        districts=sets("y"),
    ),
    Case(
        name="bank",
        model=bank,
        args=tuple(bits(1, 0, 1)),
        parents=dag(h="", x="h", y="x", g="y", z="g"),
        observed=frozenset({"x", "y", "z"}),
        blocks=frozenset({
            unit("ph"),
            unit("px", count=2),
            unit("py", count=2),
            unit("pg", count=2),
            unit("pz", count=2),
        }),
        districts=sets("h x", "y", "g z"),
        guide=bank_guide,
        guide_parents=dag(h="", g=""),
    ),
    Case(
        name="squashed",
        model=squashed,
        args=(bits(1, 0, 1),),
        parents=dag(a="", b="a", c="b"),
        observed=frozenset({"c"}),
        blocks=frozenset({
            unit("b0", count=3),
            unit("W1", count=2, size=3),
            unit("W2", "b2", count=3, size=3),
        }),
        districts=sets("a b c"),
    ),
    Case(
        name="deep",
        model=deep,
        args=(bits(1, 0, 1),),
        parents=dag(a="", c="a"),
        observed=frozenset({"c"}),
        blocks=frozenset({unit("b0", count=2), dense("V", "v", "U", "u", size=21)}),
        districts=sets("a c"),
    ),
    Case(
        name="convolution",
        model=convolution,
        args=(bits(1, 0, 1),),
        parents=dag(a="", c="a"),
        observed=frozenset({"c"}),
        blocks=frozenset({unit("b0", count=4), dense("kernel", size=2)}),
        districts=sets("a c"),
    ),
    Case(
        name="triangular",
        model=triangular,
        args=(bits(1, 0, 1, 1),),
        parents=dag(v0="", v1="v0", v2="v0 v1", v3="v0 v1 v2"),
        observed=frozenset({"v0", "v1", "v2", "v3"}),
        blocks=frozenset({unit("W", "b", count=4, size=5)}),
        districts=sets("v0", "v1", "v2", "v3"),
    ),
)
"""The table: name, program, structure."""

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
