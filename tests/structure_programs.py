"""The truth table of structure: programs, and what is true of them, derived by hand.

Truth is a matter of structure, not of the values of one run: two parameter entries are coupled if
one Fisher group of one element of a site can depend on both of them, for some values of the
parameters, the data and the sites. An input that happens to be 0, a ReLU that is dead, or a row
of a table that was not drawn therefore change nothing. An index that is drawn or given as data
is an exclusive choice: the rows of a table are never read together by one element.

Entries are those of the unconstrained leaf: a simplex of K values has K of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

Names = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Block:
    """`count` blocks of `size` entries each, over the same parameters.

    Attributes:
        params: parameter names; those that end in "^T" hold one block per entry of their last
            dimension, all others one per entry of their leading dimensions.
        count: number of blocks.
        size: entries in each.
        at: the block of every entry by hand, -1 for none, where the layout above does not fit.
        idle: entries that no site reads; the analyzer may keep or drop them.
    """

    params: tuple[str, ...]
    count: int
    size: int
    at: Mapping[str, Any] = field(default_factory=dict)
    idle: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter names, bare."""
        return tuple(name.removesuffix("^T") for name in self.params)

    def units(self, name: str, shape: Sequence[int]) -> Tensor:
        """The block of every entry of one parameter, -1 for none."""
        if name in self.at:
            return torch.tensor(self.at[name]).reshape(tuple(shape))
        entries = torch.arange(int(np.prod(shape)))
        if f"{name}^T" in self.params:
            return (entries % self.count).reshape(tuple(shape))
        return (entries // (max(len(entries), 1) // self.count)).reshape(tuple(shape))


@dataclass(frozen=True, eq=False)
class Row:
    """A program and the truth about it.

    Attributes:
        name: the name of the row.
        model: the program.
        args: makes its arguments, afresh for every analysis.
        edges: parents of every site, through tensors.
        control: parents through Python alone; every site sampled after an escape has them.
        params: parameters that the distribution of a site depends on, other sites held fixed.
        blocks: the finest correct partition of the parameter entries.
        districts: the sites of each district.
        coupled: plates of a site along which its elements depend on each other.
        replicates: for a member of a district, the plates that the district replicates over;
            only what is named is claimed.
        coarse: for a row where a safe over-merge is documented: the coarsest partition that is
            accepted, None for any. A row without it must be exact.
        loose: whether parents and coupled plates may exceed the truth.
    """

    name: str
    model: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    edges: Names
    control: Names
    params: Names
    blocks: tuple[Block, ...]
    districts: frozenset[frozenset[str]]
    coupled: Mapping[str, tuple[str, ...]]
    replicates: Mapping[str, tuple[str, ...]]
    coarser: bool
    coarse: tuple[Block, ...] | None
    loose: bool

    def __str__(self) -> str:
        return self.name


ROWS: list[Row] = []

NONE = [-1] * 3
"""Three entries in no block."""

UNREAD = [[int(j >= i) for j in range(4)] for i in range(4)]
"""Entries of a 4 × 4 matrix that are not below its diagonal."""


def row(
    edges: Mapping[str, str],
    params: Mapping[str, str] | None = None,
    blocks: Sequence[Block] = (),
    districts: frozenset[frozenset[str]] | None = None,
    control: Mapping[str, str] | None = None,
    coupled: Mapping[str, tuple[str, ...]] | None = None,
    replicates: Mapping[str, tuple[str, ...]] | None = None,
    args: Callable[[], tuple[Any, ...]] = tuple,
    coarser: bool = False,
    coarse: Sequence[Block] | None = None,
    loose: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a program to the table; without `districts`, all sites are one."""
    assert districts is None or frozenset().union(*districts) == frozenset(edges)

    def names(given: Mapping[str, str] | None) -> dict[str, frozenset[str]]:
        return {site: frozenset((given or {}).get(site, "").split()) for site in edges}

    def add(model: Callable[..., Any]) -> Callable[..., Any]:
        ROWS.append(
            Row(
                name=model.__name__,
                model=model,
                args=args,
                edges=names(edges),
                control=names(control),
                params=names(params),
                blocks=tuple(blocks),
                districts=frozenset({frozenset(edges)}) if districts is None else districts,
                coupled={site: (coupled or {}).get(site, ()) for site in edges},
                replicates=replicates or {},
                coarser=coarser,
                coarse=None if coarse is None else tuple(coarse),
                loose=loose,
            )
        )
        return model

    return add


def block(params: str, count: int, size: int, at: Any = None, idle: Any = None) -> Block:
    return Block(tuple(params.split()), count, size, at or {}, idle or {})


def sets(*groups: str) -> frozenset[frozenset[str]]:
    """`sets("a b", "c")` is {{a, b}, {c}}."""
    return frozenset(frozenset(group.split()) for group in groups)


def param(name: str, *shape: int) -> Tensor:
    return pyro.param(name, lambda: torch.randn(shape))


def positive(name: str, *shape: int) -> Tensor:
    return pyro.param(name, lambda: torch.rand(shape) + 0.5, constraint=constraints.positive)


def simplex(name: str, *shape: int) -> Tensor:
    initial = torch.ones(shape) / shape[-1]
    return pyro.param(name, lambda: initial, constraint=constraints.simplex)


def unit(name: str, *shape: int) -> Tensor:
    initial = torch.linspace(0.2, 0.8, int(np.prod(shape))).reshape(shape)
    return pyro.param(name, lambda: initial, constraint=constraints.unit_interval)


def sample(name: str, fn: Any, obs: Any = None, plates: int = 0) -> Tensor:
    """A site whose dimensions are all of the event but the last ones that plates own."""
    return pyro.sample(name, fn.to_event(max(len(fn.batch_shape) - plates, 0)), obs=obs)


def normal(
    name: str, loc: Any, scale: Any = 1.0, obs: Tensor | None = None, plates: int = 0
) -> Tensor:
    return sample(name, dist.Normal(loc, scale), obs, plates)


def bernoulli(name: str, logits: Tensor, obs: Tensor | None = None, plates: int = 0) -> Tensor:
    return sample(name, dist.Bernoulli(logits=logits), obs, plates)


def bits(*shape: int) -> Tensor:
    return torch.bernoulli(torch.full(shape, 0.5))


def data(size: int = 5) -> Any:
    return pyro.plate("N", size)


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Deprecation warnings of torch's own subsystems are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- values: how they travel from site to site --------------------------------------------------


@row(
    edges={"a": "", "b": "a", "c": "b"},
    params={"a": "p", "b": "q", "c": "q"},
    # b reads q[0], c reads q[1].
    blocks=[block("p", 1, 1), block("q", 2, 1)],
)
def chain_with_shared_parameter() -> None:
    p, q = unit("p"), param("q", 2)
    a = bernoulli("a", torch.logit(p))
    b = normal("b", q[0] * a)
    normal("c", q[1] * b, obs=torch.tensor(0.0))


@row(
    edges={"z": "", "x": "z"},
    params={"z": "pi", "x": "mu"},
    blocks=[block("pi", 1, 3), block("mu", 3, 1)],
    replicates={"z": ("N",)},
)
def categorical_index() -> None:
    pi, mu = simplex("pi", 3), param("mu", 3)
    with data():
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias"},
    blocks=[block("net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias", 1, 26)],
    replicates={"z": ("N",)},
    args=lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),),
)
def module_between_sites(net: nn.Module) -> None:
    pyro.module("net", net)
    with data(4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        bernoulli("x", net(z), torch.ones(4, 2), plates=1)


class Bayesian(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.lin = PyroModule[nn.Linear](2, 2)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)
        self.w = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self) -> None:
        w = self.w
        with data(3):
            z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
            normal("x", self.lin(z), self.scale, torch.zeros(3, 2), plates=1)


@row(
    edges={"w": "", "z": "w", "x": "z"},
    params={"x": "lin.weight lin.bias scale"},
    blocks=[block("lin.weight lin.bias", 2, 3), block("scale", 2, 1)],
    replicates={"z": ()},  # w is global
    args=lambda: (Bayesian(),),
)
def pyro_module(program: Bayesian) -> None:
    program()


@row(
    edges={"a": "", "b": "", "x": "a b"},
    params={"x": "w"},
    blocks=[block("w", 3, 1)],
)
def in_place_writes() -> None:
    w = param("w", 3)
    h = torch.zeros(3)
    a = normal("a", torch.tensor(0.0))
    b = normal("b", torch.tensor(0.0))
    h[0] = a
    h[1:].add_(b)
    normal("x", h * w, obs=torch.zeros(3))


@row(
    edges={"a": "", "b": "", "x": "a", "y": "b"},
    districts=sets("a x", "b y"),
)
def in_place_writes_are_element_precise() -> None:
    h = torch.zeros(2)
    a = normal("a", torch.tensor(0.0))
    b = normal("b", torch.tensor(0.0))
    h[0] = a
    h[1] = b
    normal("x", h[0], obs=torch.tensor(0.0))
    normal("y", h[1], obs=torch.tensor(0.0))


@row(
    edges={"a": "", "b": "a", "x": ""},
    districts=sets("a b", "x"),
)
def overwritten_value() -> None:
    # The buffer is overwritten before x reads it.
    a = normal("a", torch.zeros(2))
    h = a.clone()
    normal("b", 2 * h)
    h.zero_()
    normal("x", h, obs=torch.zeros(2))


@row(edges={"a": "", "x": "a"})
def detached_value() -> None:
    a = normal("a", torch.tensor(0.0))
    normal("x", a.detach(), obs=torch.tensor(0.0))


@row(
    edges={"b": "", "a": "", "x": "", "y": ""},
    control={"x": "a", "y": "a"},  # y is sampled after the escape, b before it
    params={"y": "w"},
    blocks=[block("w", 1, 1)],
    districts=sets("b", "a x y"),
)
def item_and_numpy() -> None:
    normal("b", torch.tensor(0.0))
    a = normal("a", torch.tensor(0.0))
    normal("x", torch.tensor(float(a.detach().numpy())), obs=torch.tensor(0.0))
    normal("y", param("w"), obs=torch.tensor(0.0))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2 + p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return 2 * x * grad, grad


@row(edges={"a": "", "x": "a"}, params={"x": "p"}, blocks=[block("p", 1, 1)])
def custom_function_of_a_value() -> None:
    a = normal("a", torch.tensor(0.0))
    normal("x", Square.apply(a, param("p")), obs=torch.tensor(0.0))


@row(
    edges={"a": "", "b": "", "x": "b"},
    control={"b": "a", "x": "a"},
)
def control_flow() -> None:
    a = bernoulli("a", torch.tensor(0.0))
    b = normal("b", torch.tensor(5.0 if a else -5.0))
    fn = dist.Normal(b, 1.0) if a else dist.Cauchy(b, 1.0)
    pyro.sample("x", fn, obs=torch.tensor(0.0))


@row(
    edges={f"z{t}": f"z{t - 1}" if t else "" for t in range(5)}
    | {f"x{t}": f"z{t}" for t in range(5)},
    params={f"z{t}": "T" for t in range(5)} | {f"x{t}": "E" for t in range(5)},
    blocks=[block("T", 2, 2), block("E", 2, 1)],
)
def hidden_markov_loop() -> None:
    transition, emission = simplex("T", 2, 2), unit("E", 2)
    z = torch.tensor(0)
    for t in range(5):
        z = pyro.sample(f"z{t}", dist.Categorical(transition[z]))
        pyro.sample(f"x{t}", dist.Bernoulli(emission[z]), obs=torch.tensor(1.0))


@row(
    edges={"mu": "", "theta": "mu", "x": "theta"},
    params={"mu": "m", "x": "s"},
    blocks=[block("m", 1, 1), block("s", 1, 1)],
    replicates={"mu": ()},
)
def nested_plates_with_subsampling() -> None:
    mu = normal("mu", param("m"))
    with pyro.plate("g", 3, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("n", 10, subsample_size=4, dim=-1) as i:
            pyro.sample("x", dist.Normal(theta, positive("s")), obs=torch.zeros(3, 10)[:, i])


@row(edges={"a": "", "x": "a"}, params={"x": "w"}, blocks=[block("w", 1, 1)])
def mask_from_a_value() -> None:
    a = bernoulli("a", torch.tensor(0.0))
    with poutine.mask(mask=a > 0):
        normal("x", param("w"), obs=torch.tensor(0.0))


@row(
    edges={"z1": "", "z2": "", "x": "z1", "y": "z2"},
    params={"x": "w", "y": "w"},
    blocks=[block("w", 2, 1)],
    districts=sets("z1 x", "z2 y"),
)
def stack_and_select() -> None:
    w = param("w", 2)
    z1 = normal("z1", torch.tensor(0.0))
    z2 = normal("z2", torch.tensor(0.0))
    stacked = torch.stack([z1, z2]) * w
    normal("x", stacked[0], obs=torch.tensor(0.0))
    normal("y", stacked[1], obs=torch.tensor(0.0))


@row(edges={"z": "", "w": "z", "x": "w"})
def deterministic_between() -> None:
    z = pyro.sample("z", dist.Gamma(1.0, 1.0))
    w = pyro.sample("w", dist.LogNormal(z, 1.0))
    rate = pyro.deterministic("rate", w**2)
    pyro.sample("x", dist.Poisson(rate), obs=torch.tensor(3.0))


@row(edges={"z": "", "x": "z"})
def delta_between() -> None:
    z = normal("z", torch.tensor(0.0))
    fixed = pyro.sample("fixed", dist.Delta(z + 1))
    normal("x", fixed, obs=torch.tensor(0.0))


@row(edges={"z": "", "x": "z"})
def comparison() -> None:
    z = normal("z", torch.tensor(0.0))
    normal("x", (z > 0).double(), obs=torch.tensor(0.0))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "a b"},
    blocks=[block("a b", 1, 2)],  # no closed form
)
def transformed_distribution() -> None:
    a, b = param("a"), positive("b")
    z = normal("z", torch.tensor(0.0))
    affine = dist.transforms.AffineTransform(a + z, b)
    fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine])
    pyro.sample("x", fn, obs=torch.tensor(0.0))


@row(
    edges={"x0": "", "x1": "x0", "x2": "x1"},
    params={"x0": "w", "x1": "w", "x2": "w"},
    blocks=[block("w", 1, 1)],
    districts=sets("x0", "x1", "x2"),
    args=lambda: (torch.tensor([0.1, 0.2, 0.3]),),
)
def observed_autoregression(x: Tensor) -> None:
    # The data tensor is read, not the values that sample returns.
    w = param("w")
    for t in range(3):
        normal(f"x{t}", w * x[t - 1] if t else w, obs=x[t])


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    blocks=[block("w", 1, 1)],
    args=lambda: (torch.tensor([0.1, 0.2, 0.3]),),
    districts=sets("z x"),
)
def teacher_forcing_within_a_site(x: Tensor) -> None:
    # The site reads its own data one step back; that is no edge.
    z = normal("z", torch.tensor(0.0))
    before = torch.cat([torch.zeros(1), x[:-1]])
    normal("x", param("w") * before + z, obs=x)


GRU = "rnn$$$weight_ih_l0 rnn$$$weight_hh_l0 rnn$$$bias_ih_l0 rnn$$$bias_hh_l0"


@row(
    edges={"z": "", "x": "z"},
    params={"x": GRU},
    blocks=[block(GRU, 1, 63)],
    args=lambda: (nn.GRU(2, 3, batch_first=True),),
)
def gru(rnn: nn.Module) -> None:
    pyro.module("rnn", rnn)
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, 4, 2]).to_event(3))
    h, _ = rnn(z)
    normal("x", h, obs=torch.zeros(2, 4, 3))


@row(edges={"z": "", "x": "z"}, params={"x": "W b"}, blocks=[block("W b", 3, 5)])
def vmap_over_rows() -> None:
    weight, bias = param("W", 3, 4), param("b", 3)
    z = normal("z", torch.zeros(4))
    loc = torch.func.vmap(lambda row, shift: torch.sin((row * z).sum() + shift))(weight, bias)
    normal("x", loc, obs=torch.zeros(3))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    blocks=[block("w", 4, 1)],
)
def jit_script() -> None:
    w = param("w", 4)
    z = normal("z", torch.zeros(4))
    with quiet():
        scripted = torch.jit.script(_scripted)
        loc = scripted(z, w)
    normal("x", loc, obs=torch.zeros(4))


def _scripted(z: Tensor, w: Tensor) -> Tensor:
    return torch.sin(z) * 2 * w


@row(edges={"z": "", "x": "", "y": ""}, control={"x": "z", "y": "z"})
def data_tolist() -> None:
    z = normal("z", torch.tensor(0.0))
    normal("x", torch.tensor(z.data.tolist()), obs=torch.tensor(0.0))
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))


@row(
    edges={"z": "", "n": "", "x": "z"},
    control={"x": "n"},
    params={"n": "rate"},
    blocks=[block("rate", 1, 1)],
)
def stochastic_length() -> None:
    z = normal("z", torch.tensor(0.0))
    n = pyro.sample("n", dist.Poisson(20 + positive("rate")))
    total = torch.zeros(())
    for _ in range(int(n)):
        total = total + z
    normal("x", total, obs=torch.tensor(0.0))


@row(
    edges={"x": "", "y": ""},
    control={"y": "x"},
    districts=sets("x", "y"),
    args=lambda: (torch.tensor(0.3),),
)
def escape_of_an_observed_value(x: Tensor) -> None:
    x = normal("x", torch.tensor(0.0), obs=x)
    normal("y", torch.tensor(1.0 if x.item() > 0 else -1.0), obs=torch.tensor(0.1))


# --- values: rougher roads ----------------------------------------------------------------------


@row(edges={"z": "", "x": "z"})
def sparse_constant_times_value() -> None:
    with quiet():
        matrix = torch.eye(3).to_sparse()
        z = normal("z", torch.zeros(3))
        loc = torch.sparse.mm(matrix, z[:, None])[:, 0]
    normal("x", loc, obs=torch.zeros(3))


@row(
    edges={"z": "", "x": "z"},
    loose=True,  # sparse tensors have no memory to follow; an escape is documented
)
def value_made_sparse() -> None:
    with quiet():
        z = normal("z", torch.zeros(3, 3))
        loc = torch.sparse.mm(z.to_sparse(), torch.ones(3, 2))
    normal("x", loc, obs=torch.zeros(3, 2))


@row(edges={"z": "", "x": "z"})
def deepcopy_of_a_value() -> None:
    z = normal("z", torch.zeros(3))
    normal("x", copy.deepcopy(z), obs=torch.zeros(3))


ATTENTION = "att$$$in_proj_weight att$$$in_proj_bias att$$$out_proj.weight att$$$out_proj.bias"


@row(
    edges={"z": "", "x": "z"},
    params={"x": ATTENTION},
    blocks=[block(ATTENTION, 1, 80)],
    args=lambda: (nn.MultiheadAttention(4, 2, batch_first=True),),
)
def multihead_attention(att: nn.Module) -> None:
    pyro.module("att", att)
    z = normal("z", torch.zeros(2, 5, 4))
    h, _ = att(z, z, z, need_weights=False)
    normal("x", h, obs=torch.zeros(2, 5, 4))


ENCODER = " ".join(
    f"enc$$${name}" for name, _ in nn.TransformerEncoderLayer(4, 2, 8).named_parameters()
)  # 12 names


@row(
    edges={"z": "", "x": "z"},
    params={"x": ENCODER},
    # Attention 80, feed-forward 8·5 + 4·9, two norms of 8; the first norm joins the first half,
    # the second norm joins every output to all of it.
    blocks=[block(ENCODER, 1, 172)],
    args=lambda: (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),),
)
def transformer_encoder_layer(enc: nn.Module) -> None:
    pyro.module("enc", enc)
    z = normal("z", torch.zeros(2, 5, 4))
    normal("x", enc(z), obs=torch.zeros(2, 5, 4))


@row(
    edges={"z": "", "x": "z"},
    params={"x": GRU},
    # LSTM(2, 3): 12·2 + 12·3 + 12 + 12.
    blocks=[block(GRU, 1, 84)],
    args=lambda: (nn.LSTM(2, 3, batch_first=True),),
)
def packed_lstm(rnn: nn.Module) -> None:
    pyro.module("rnn", rnn)
    z = normal("z", torch.zeros(3, 4, 2))
    h = _packed(rnn, z, torch.tensor([4, 3, 2]))
    normal("x", h, obs=torch.zeros(3, 4, 3))


def _packed(net: nn.Module, z: Tensor, lengths: Tensor) -> Tensor:
    h, _ = net(rnn.pack_padded_sequence(z, lengths, batch_first=True))
    return rnn.pad_packed_sequence(h, batch_first=True)[0]


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    blocks=[block("w", 4, 1)],
)
def compiled() -> None:
    w = param("w", 4)
    z = normal("z", torch.zeros(4))
    with quiet():
        loc = torch.compile(lambda z, w: torch.sin(z) * w, backend="eager")(z, w)
    normal("x", loc, obs=torch.zeros(4))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias"},
    blocks=[block("net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias", 1, 26)],
    args=lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),),
)
def checkpointed(net: nn.Module) -> None:
    pyro.module("net", net)
    z = normal("z", torch.zeros(3))
    normal("x", checkpoint(net, z, use_reentrant=False), obs=torch.zeros(2))


@row(
    edges={"z": "", "x": "z", "y": ""},
    params={"x": "v", "y": "w"},
    # Frequency 0 is the sum of w.
    blocks=[block("v", 4, 1), block("w", 1, 4)],
    districts=sets("z x", "y"),
)
def fourier_transform() -> None:
    z = normal("z", torch.zeros(4))
    normal("x", torch.fft.fft(z).real * param("v", 4), obs=torch.zeros(4))
    normal("y", torch.fft.fft(param("w", 4)).real, obs=torch.zeros(4))


@row(edges={"z": "", "x": "z"}, params={"x": "m"}, blocks=[block("m", 1, 3)])
def cholesky_of_a_sampled_matrix() -> None:
    z = normal("z", torch.zeros(3))
    covariance = torch.outer(z, z) + torch.eye(3)
    factor = torch.linalg.cholesky(covariance)
    pyro.sample("x", dist.MultivariateNormal(param("m", 3), scale_tril=factor), obs=torch.zeros(3))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    blocks=[block("w", 3, 1)],  # the gradient of sum(w z²) / 2 is w z, entry by entry
    coarser=True,  # the sum joins the entries
    coarse=[block("w", 1, 3)],
)
def gradient_within_the_program() -> None:
    w = param("w", 3)
    z = normal("z", torch.zeros(3)).detach().requires_grad_()
    with torch.enable_grad():
        energy = 0.5 * (w * z**2).sum()
        (force,) = torch.autograd.grad(energy, z, create_graph=True)
    normal("x", force, obs=torch.zeros(3))


@row(edges={"z": "", "x": "z"})
def data_set_to_a_value() -> None:
    z = normal("z", torch.zeros(3))
    buffer = torch.zeros(3)
    buffer.data = z
    normal("x", buffer, obs=torch.zeros(3))


@row(edges={"z": "", "x": "", "y": ""}, control={"x": "z", "y": "z"})
def numpy_round_trip() -> None:
    z = normal("z", torch.zeros(3))
    normal("x", torch.from_numpy(np.sin(z.numpy())), obs=torch.zeros(3))
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))


@row(edges={"z": "", "x": ""}, control={"x": "z"})
def frombuffer() -> None:
    z = normal("z", torch.zeros(3))
    buffer = bytearray(z.numpy().tobytes())
    normal("x", torch.frombuffer(buffer, dtype=torch.float64), obs=torch.zeros(3))


@row(
    edges={"z": "", "x": "z", "y": ""},
    districts=sets("z x", "y"),
    loose=True,  # the shape of the selection is seen by Python, so y may come after an escape
)
def masked_select() -> None:
    z = normal("z", torch.zeros(6))
    normal("x", z[z > -1].sum() + z.masked_select(z > 0).sum(), obs=torch.tensor(0.0))
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))


@row(edges={"z": "", "x": ""}, control={"x": "z"}, params={"z": "p"}, blocks=[block("p", 6, 1)])
def length_of_nonzero() -> None:
    z = bernoulli("z", param("p", 6))
    normal("x", torch.tensor(float(len(z.nonzero()))), obs=torch.tensor(0.0))


@row(edges={"z": "", "x": ""}, control={"x": "z"})
def length_of_a_selection() -> None:
    z = normal("z", torch.zeros(6))
    normal("x", torch.full((), 0.5 * z[z > 0].shape[0]), obs=torch.tensor(0.0))


@row(edges={"z": "", "x": ""}, control={"x": "z"})
def length_of_unique() -> None:
    z = sample("z", dist.Categorical(torch.ones(6, 3)))
    normal("x", torch.zeros(()) + z.unique().numel(), obs=torch.tensor(0.0))


@row(edges={"z1": "", "z2": "", "y": "", "x": "z1 z2"}, districts=sets("z1 z2 x", "y"))
def tensor_of_values() -> None:
    z1 = normal("z1", torch.tensor(0.0))
    z2 = normal("z2", torch.tensor(0.0))
    with quiet():
        loc = torch.tensor([z1, z2])
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))
    normal("x", loc, obs=torch.zeros(2))


@row(edges={"z": "", "y": "", "x": "z"}, districts=sets("z x", "y"))
def as_tensor_of_a_value() -> None:
    z = normal("z", torch.tensor(0.0))
    with quiet():
        loc = torch.as_tensor([z, 1.0])
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))
    normal("x", loc, obs=torch.zeros(2))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "mu"},
    blocks=[block("mu", 3, 1)],  # one-hot weights read one entry at a time
    coarser=True,  # that the weights are one-hot is a matter of values
    coarse=[block("mu", 1, 3)],
    replicates={"z": ("N",)},
)
def scatter_to_one_hot() -> None:
    mu = param("mu", 3)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        one_hot = torch.zeros(5, 3).scatter(1, z[:, None], 1.0)
        pyro.sample("x", dist.Normal((one_hot * mu).sum(-1), 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z", "y": ""},
    params={"x": "mu"},
    blocks=[block("mu", 6, 1)],
    districts=sets("z x", "y"),
    replicates={"z": ("N",)},
    coarser=True,  # as above: a product with a one-hot vector is a sum to the dataflow
    coarse=[block("mu^T", 2, 3)],
    loose=True,  # torch checks the classes with `.item()`
)
def one_hot_of_a_value() -> None:
    mu = param("mu", 3, 2)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        normal("x", F.one_hot(z, 3).double() @ mu, obs=torch.zeros(5, 2), plates=1)
    normal("y", torch.tensor(0.0), obs=torch.tensor(0.0))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    # Element k of the sum may hold any of the five entries that were drawn to k.
    blocks=[block("w", 1, 5)],
)
def index_add_at_a_value() -> None:
    z = sample("z", dist.Categorical(torch.ones(5, 3)))
    loc = torch.zeros(3).index_add(0, z, param("w", 5))
    normal("x", loc, obs=torch.zeros(3))


@row(
    edges={"z": "", "y": "", "x": "z y"},
)
def index_put_at_a_value() -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    y = normal("y", torch.tensor(0.0))
    buffer = torch.zeros(3)
    buffer[z] = y
    normal("x", buffer, obs=torch.zeros(3))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "mu"},
    blocks=[block("mu", 3, 1)],
    replicates={"z": ("N",)},
)
def gather_at_a_value() -> None:
    mu = param("mu", 3)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        loc = mu.expand(5, 3).gather(1, z[:, None])[:, 0]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(5))


@row(edges={"z": "", "x": "z", "y": "z"})
def sort_and_topk() -> None:
    z = normal("z", torch.zeros(4))
    normal("x", z.sort().values, obs=torch.zeros(4))
    normal("y", z.topk(2).indices.double(), obs=torch.zeros(2))


@row(edges={"a": "", "b": "", "x": "a b"}, params={"x": "T"}, blocks=[block("T", 6, 1)])
def two_indices_without_dimensions() -> None:
    a = pyro.sample("a", dist.Categorical(torch.ones(2)))
    b = pyro.sample("b", dist.Categorical(torch.ones(3)))
    bernoulli("x", param("T", 2, 3)[a, b], obs=torch.tensor(1.0))


@row(
    edges={"z": "", "y": "", "x": "z"},
    params={"x": "T", "y": "v"},
    blocks=[block("T", 3, 2), block("v", 1, 1)],
    districts=sets("z x", "y"),
)
def index_without_dimensions_is_no_escape() -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    rows = param("T", 3, 2)[z]
    normal("y", param("v"), obs=torch.tensor(0.0))
    pyro.sample("x", dist.Categorical(logits=rows), obs=torch.tensor(0))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "a b"},
    blocks=[block("a b", 3, 2)],  # the families of one z couple a[z] with b[z]
    replicates={"z": ("N",)},
)
def gamma_rows_at_one_index() -> None:
    a, b = positive("a", 3), positive("b", 3)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Gamma(a[z], b[z]), obs=torch.ones(5))


@row(
    edges={"z": "", "u": "", "x": "z u"},
    params={"x": "a b"},
    blocks=[block("a b", 1, 5)],  # a[z] meets every b[u]
    replicates={"z": ("N",)},
)
def gamma_rows_at_two_indices() -> None:
    a, b = positive("a", 3), positive("b", 2)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        u = pyro.sample("u", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Gamma(a[z], b[u]), obs=torch.ones(5))


# --- blocks: layers -----------------------------------------------------------------------------


def linear_args(inputs: int = 4, units: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (nn.Linear(inputs, units), bits(7, inputs))


LINEAR = "net$$$weight net$$$bias"


@row(edges={"x": ""}, params={"x": LINEAR}, blocks=[block(LINEAR, 3, 5)], args=linear_args())
def linear_rows(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", net(v), plates=1)


@row(edges={"x": ""}, params={"x": LINEAR}, blocks=[block(LINEAR, 3, 5)], args=linear_args())
def linear_to_probabilities(net: nn.Linear, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        probs = torch.sigmoid(F.linear(v, net.weight, net.bias))
        pyro.sample("x", dist.Bernoulli(probs).to_event(1))


@row(
    edges={"x": ""},
    params={"x": "W b"},
    blocks=[block("W^T b", 4, 5)],  # units are columns
    args=lambda: (bits(7, 4),),
)
def columns_of_a_square_matrix(v: Tensor) -> None:
    with data(7):
        bernoulli("x", v @ param("W", 4, 4) + param("b", 4), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b"},
    blocks=[block("W b", 3, 5)],
    args=lambda: (bits(7, 4),),
)
def einsum_rows(v: Tensor) -> None:
    with data(7):
        bernoulli("x", torch.einsum("bi,oi->bo", v, param("W", 3, 4)) + param("b", 3), plates=1)


@row(
    edges={"h": "", "x": "h"},
    params={"h": "W b", "x": "V c"},
    blocks=[block("W b", 3, 5), block("V c", 5, 4)],
    args=lambda: (bits(7, 4),),
    replicates={"h": ("N",)},
)
def two_layers(v: Tensor) -> None:
    with data(7):
        h = bernoulli("h", F.linear(v, param("W", 3, 4), param("b", 3)), plates=1)
        bernoulli("x", F.linear(h, param("V", 5, 3), param("c", 5)), torch.ones(7, 5), plates=1)


@row(
    edges={"x": ""},
    params={"x": "net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias"},
    blocks=[block("net$$$0.weight net$$$0.bias net$$$2.weight net$$$2.bias", 1, 59)],
    args=lambda: (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(7, 3)),
)
def mlp_is_joint(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", net(v), plates=1)


@row(edges={"x": ""}, params={"x": LINEAR}, blocks=[block(LINEAR, 1, 20)], args=linear_args(3, 5))
def categorical_linear_is_joint(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        pyro.sample("x", dist.Categorical(logits=net(v)))


@row(
    edges={"x": ""},
    params={"x": "W b V c"},
    blocks=[block("W b", 3, 5), block("V c", 3, 5)],
    args=lambda: (bits(7, 4),),
)
def normal_heads(v: Tensor) -> None:
    with data(7):
        loc = F.linear(v, param("W", 3, 4), param("b", 3))
        normal("x", loc, F.linear(v, param("V", 3, 4), param("c", 3)).exp(), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b V c"},
    blocks=[block("W b V c", 3, 10)],
    args=lambda: (bits(7, 4),),
)
def gamma_heads(v: Tensor) -> None:
    with data(7):
        shape = F.linear(v, param("W", 3, 4), param("b", 3)).exp()
        rate = F.linear(v, param("V", 3, 4), param("c", 3)).exp()
        sample("x", dist.Gamma(shape, rate), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 6, 5)],  # loc and scale of a normal are orthogonal
    args=linear_args(4, 6),
)
def chunks_of_a_linear_for_a_normal(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        loc, log_scale = net(v).chunk(2, -1)
        normal("x", loc, log_scale.exp(), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b"},
    # Row i holds the concentration, row i + 3 the rate of element i.
    blocks=[
        block("W b", 3, 10, at={"W": [[u] * 4 for u in (0, 1, 2) * 2], "b": [0, 1, 2, 0, 1, 2]})
    ],
    args=lambda: (bits(7, 4),),
)
def chunks_of_a_linear_for_a_gamma(v: Tensor) -> None:
    with data(7):
        out = F.linear(v, param("W", 6, 4), param("b", 6)).exp()
        sample("x", dist.Gamma(*out.chunk(2, -1)), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 4, 10)],
    args=lambda: (nn.Conv2d(1, 4, 3, padding=1), torch.randn(7, 1, 5, 5)),
)
def convolution_per_channel(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", net(v), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 4, 7)],
    args=lambda: (nn.Conv1d(2, 4, 3, padding=1), nn.MaxPool1d(2), torch.randn(7, 2, 6)),
    coarser=True,
    coarse=[block(LINEAR, 1, 28)],
)
def pooled_convolution_per_channel(net: nn.Module, pool: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", pool(net(v)), plates=1)


@row(
    edges={"x": ""},
    params={"x": "E"},
    blocks=[block("E", 18, 1)],
    args=lambda: (torch.randint(0, 6, (7,)),),
)
def embedding_of_bernoulli_per_entry(index: Tensor) -> None:
    with data(7):
        bernoulli("x", F.embedding(index, param("E", 6, 3)), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR.split()[0]},
    blocks=[block("net$$$weight", 6, 3)],  # rows 2 to 5 are not drawn in this run
    args=lambda: (nn.Embedding(6, 3), torch.randint(0, 2, (7,))),
)
def embedding_of_categorical_per_row(net: nn.Module, index: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        pyro.sample("x", dist.Categorical(logits=net(index)))


@row(
    edges={"x": ""},
    params={"x": "E"},
    blocks=[block("E^T", 3, 6)],  # sums over words: columns
    args=lambda: (torch.randint(0, 2, (7, 4)),),
)
def embedding_bag(index: Tensor) -> None:
    with data(7):
        bernoulli("x", param("E", 6, 3)[index].sum(1), plates=1)


@row(
    edges={"x": ""},
    params={"x": "E"},
    # Rows 0 and 3 meet, column by column; the others reach no site.
    blocks=[block("E", 3, 2, at={"E": [[0, 1, 2], NONE, NONE, [0, 1, 2], NONE, NONE]})],
    coarser=True,  # an index tensor is taken for data
    coarse=[block("E^T", 3, 6)],
)
def static_index() -> None:
    rows = param("E", 6, 3)[torch.tensor([0, 3])]
    bernoulli("x", rows[0] + rows[1])


@row(
    edges={"x": ""},
    params={"x": "W b g s"},
    blocks=[block("W b g s", 1, 21)],
    args=lambda: (bits(7, 4),),
)
def layer_norm_is_joint(v: Tensor) -> None:
    with data(7):
        h = F.linear(v, param("W", 3, 4), param("b", 3))
        bernoulli("x", F.layer_norm(h, (3,), param("g", 3), param("s", 3)), plates=1)


@row(edges={"x": ""}, params={"x": LINEAR}, blocks=[block(LINEAR, 1, 20)], args=linear_args(4, 4))
def tied_weight_used_twice(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", net(net(v)), plates=1)


@row(
    edges={"x": "", "y": "x"},
    params={"x": LINEAR, "y": LINEAR},
    blocks=[block(LINEAR, 4, 5)],  # unit i of both sites reads row i
    districts=sets("x y"),
    args=linear_args(4, 4),
)
def linear_shared_by_two_sites(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        x = bernoulli("x", net(v), plates=1)
        bernoulli("y", net(x), plates=1)


@row(
    edges={"h": "", "x": "h"},
    params={"h": "W", "x": "W"},
    blocks=[block("W", 1, 12)],  # rows at h, columns at x
    args=lambda: (bits(7, 4), bits(7, 4)),
    replicates={"h": ("N",)},
)
def weight_and_its_transpose(v: Tensor, x: Tensor) -> None:
    weight = param("W", 3, 4)
    with data(7):
        h = bernoulli("h", v @ weight.T, plates=1)
        bernoulli("x", h @ weight, x, plates=1)


@row(
    edges={"x": ""},
    params={"x": "W"},
    blocks=[block("W", 1, 12)],
    args=lambda: (bits(7, 4),),
)
def autoencoder_without_a_code(v: Tensor) -> None:
    # The site reads its own data, and rows and columns of one matrix.
    weight = param("W", 3, 4)
    with data(7):
        bernoulli("x", torch.tanh(v @ weight.T) @ weight, v, plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 3, 5)],  # not 3 blocks of 1: that the inputs are 0 is a matter of values
    args=lambda: (nn.Linear(4, 3), torch.zeros(7, 4)),
)
def zero_inputs(net: nn.Module, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        bernoulli("x", net(v), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b V c"},
    blocks=[block("W b V c", 1, 35)],
    args=lambda: (bits(7, 4),),
)
def dead_relu(v: Tensor) -> None:
    with data(7):
        h = torch.relu(F.linear(v, param("W", 3, 4), param("b", 3)) - 1e3)
        bernoulli("x", F.linear(h, param("V", 5, 3), param("c", 5)), plates=1)


@row(
    edges={"x": ""},
    params={"x": "mu s"},
    blocks=[block("mu", 7, 1), block("s", 1, 1)],
)
def parameter_of_a_plate() -> None:
    with data(7):
        pyro.sample("x", dist.Normal(param("mu", 7), positive("s")))


@row(
    edges={"x": ""},
    params={"x": "U V"},
    blocks=[block("U V", 1, 14)],
    args=lambda: (bits(7, 4),),
)
def low_rank_weight_is_joint(v: Tensor) -> None:
    with data(7):
        bernoulli("x", v @ param("U", 4, 2) @ param("V", 2, 3), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 3, 5)],  # masked entries stay with their row
    args=linear_args(),
)
def masked_weight(net: nn.Linear, v: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        weight = net.weight * torch.ones(3, 4).tril()
        bernoulli("x", F.linear(v, weight, net.bias), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W"},
    blocks=[block("W", 3, 4)],
    args=lambda: (bits(7, 4),),
)
def weight_normalised_by_row(v: Tensor) -> None:
    weight = param("W", 3, 4)
    with data(7):
        bernoulli("x", F.linear(v, weight / weight.norm(dim=1, keepdim=True)), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W"},
    blocks=[block("W", 1, 12)],
    args=lambda: (bits(7, 4),),
)
def weight_normalised_as_a_whole(v: Tensor) -> None:
    weight = param("W", 3, 4)
    with data(7):
        bernoulli("x", F.linear(v, weight / weight.norm()), plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b s"},
    blocks=[block("W b", 1, 15), block("s", 1, 3)],
    args=lambda: (bits(7, 4),),
)
def multivariate_normal(v: Tensor) -> None:
    with data(7):
        loc = F.linear(v, param("W", 3, 4), param("b", 3))
        factor = torch.eye(3) * positive("s", 3)
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor))


@row(
    edges={"z": "", "x": "z"},
    params={"x": "M L"},
    # One row of means per component; the factor is shared, its upper triangle is not read.
    blocks=[
        block("M", 2, 3),
        block("L", 1, 9, idle={"L": [[0, 1, 1], [0, 0, 1], [0, 0, 0]]}),
    ],
    replicates={"z": ("N",)},
)
def mixture_of_multivariate_normals() -> None:
    means = param("M", 2, 3)
    factor = pyro.param("L", lambda: torch.eye(3), constraint=constraints.lower_cholesky)
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        fn = dist.MultivariateNormal(means[z], scale_tril=factor)
        pyro.sample("x", fn, obs=torch.zeros(5, 3))


@row(
    edges={"x": ""},
    params={"x": "T"},
    blocks=[block("T", 6, 1)],
    args=lambda: (torch.randint(0, 2, (7,)), torch.randint(0, 3, (7,))),
)
def table_with_two_parents(a: Tensor, b: Tensor) -> None:
    with data(7):
        pyro.sample("x", dist.Bernoulli(unit("T", 2, 3)[a, b]))


@row(
    edges={"x": ""},
    params={"x": "W b E"},
    blocks=[block("W b E^T", 3, 11)],  # unit c: row c of W, b[c], column c of E
    args=lambda: (bits(7, 4), torch.randint(0, 6, (7,))),
)
def linear_plus_embedding(v: Tensor, index: Tensor) -> None:
    with data(7):
        loc = F.linear(v, param("W", 3, 4), param("b", 3)) + F.embedding(index, param("E", 6, 3))
        bernoulli("x", loc, plates=1)


@row(
    edges={"x": ""},
    params={"x": "W b p"},
    blocks=[block("W b p", 3, 6)],
    args=lambda: (bits(7, 4),),
)
def custom_function_of_rows(v: Tensor) -> None:
    with data(7):
        h = F.linear(v, param("W", 3, 4), param("b", 3))
        bernoulli("x", Square.apply(h, param("p", 3)), plates=1)


@row(
    edges={"x": ""},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 4, 7)],
    args=lambda: (nn.Bilinear(2, 3, 4), torch.randn(7, 2), torch.randn(7, 3)),
    coarser=True,
    coarse=[block(LINEAR, 1, 28)],
    loose=True,
)
def bilinear_rows(net: nn.Module, left: Tensor, right: Tensor) -> None:
    pyro.module("net", net)
    with data(7):
        normal("x", net(left, right), plates=1)


# --- blocks: tables, packed vectors, families ---------------------------------------------------


@row(
    edges={"a": "", "b": ""},
    params={"a": "w", "b": "w"},
    blocks=[
        block("w", 1, 3, at={"w": [0, 0, 0, -1, -1]}),
        block("w", 1, 2, at={"w": [-1, -1, -1, 0, 0]}),
    ],
    districts=sets("a", "b"),
)
def packed_parameter_vector() -> None:
    w = param("w", 5)
    pyro.sample("a", dist.Categorical(logits=w[:3]), obs=torch.tensor(0))
    pyro.sample("b", dist.Categorical(logits=w[3:]), obs=torch.tensor(1))


@row(
    edges={"a": "", "x": "a"},
    params={"a": "w", "x": "w"},
    # A logit, a 2 × 2 weight and its two biases, unrolled from one vector.
    blocks=[
        block("w", 1, 1, at={"w": [0, -1, -1, -1, -1, -1, -1]}),
        block("w", 2, 3, at={"w": [-1, 0, 0, 1, 1, 0, 1]}),
    ],
)
def unrolled_parameter_vector() -> None:
    top, weight, bias = param("w", 7).split([1, 4, 2])
    a = bernoulli("a", top.expand(2))
    bernoulli("x", F.linear(a, weight.view(2, 2), bias), obs=torch.ones(2))


@row(
    edges={"x": ""},
    params={"x": "w"},
    blocks=[block("w", 1, 1)],
    districts=sets("x"),
    args=lambda: (bits(7),),
)
def detached_parameter(v: Tensor) -> None:
    # p is a constant to the program: no block.
    p, w = param("p"), param("w")
    with data(7):
        bernoulli("x", p.detach() + w * v, plates=1)


@row(
    edges={"a": "", "x": "", "y": ""},
    params={"a": "r", "x": "q", "y": "q"},
    # p moves the distributions only where it changes its sign; r and both q are on their own.
    blocks=[block("r", 1, 1), block("q", 2, 1)],
    districts=sets("a", "x", "y"),
    coarser=True,  # everything after an escape of a parameter is joint
)
def parameter_in_a_condition() -> None:
    normal("a", param("r"))
    q = param("q", 2)
    sign = 1.0 if param("p") > 0 else -1.0
    normal("x", sign * q[0])
    normal("y", q[1])


@row(
    edges={"h": "", "x": "h"},
    params={"h": "p", "x": "W"},
    blocks=[block("p", 2, 1), block("W", 3, 2)],
)
def regularizer_merges_nothing() -> None:
    weight = param("W", 3, 2)
    pyro.factor("penalty", -(weight**2).sum())
    h = bernoulli("h", param("p", 2))
    bernoulli("x", weight @ h, obs=torch.ones(3))


@row(
    edges={"z": "", "x": "z"},
    params={"z": "gate$$$weight gate$$$bias", "x": "mu s"},
    blocks=[
        block("gate$$$weight gate$$$bias", 1, 12),
        block("mu", 3, 1),
        block("s", 3, 1),
    ],
    args=lambda: (nn.Linear(3, 3), torch.randn(5, 3)),
    replicates={"z": ("N",)},
)
def mixture_with_a_gate(gate: nn.Module, v: Tensor) -> None:
    pyro.module("gate", gate)
    mu, s = param("mu", 3), positive("s", 3)
    with data():
        z = pyro.sample("z", dist.Categorical(logits=gate(v)))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=torch.zeros(5))


def experts() -> tuple[Any, ...]:
    nets = [nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)) for _ in range(2)]
    return nn.Linear(3, 2), nn.ModuleList(nets), torch.randn(5, 3)


EXPERTS = [
    " ".join(f"e$$${k}.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    for k in range(2)
]
GATE = block("gate$$$weight gate$$$bias", 1, 8)


@row(
    edges={"z": "", "x": "z"},
    params={"z": "gate$$$weight gate$$$bias", "x": " ".join(EXPERTS)},
    blocks=[GATE, block(EXPERTS[0], 1, 11), block(EXPERTS[1], 1, 11)],  # one expert speaks
    args=experts,
    replicates={"z": ("N",)},
)
def mixture_of_experts(gate: nn.Module, nets: nn.ModuleList, v: Tensor) -> None:
    pyro.module("gate", gate)
    pyro.module("e", nets)
    with data():
        z = pyro.sample("z", dist.Categorical(logits=gate(v)))
        opinions = torch.cat([net(v) for net in nets], -1)
        loc = opinions.gather(-1, z[:, None])[:, 0]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    params={"z": "gate$$$weight gate$$$bias", "x": " ".join(EXPERTS)},
    blocks=[GATE, block(EXPERTS[0], 1, 11), block(EXPERTS[1], 1, 11)],
    args=experts,
    replicates={"z": ("N",)},
    coarser=True,  # Vindex counts the examples by an index tensor, which is taken for data
    coarse=[GATE, block(" ".join(EXPERTS), 1, 22)],
    loose=True,
)
def mixture_of_experts_by_vindex(gate: nn.Module, nets: nn.ModuleList, v: Tensor) -> None:
    pyro.module("gate", gate)
    pyro.module("e", nets)
    with data():
        z = pyro.sample("z", dist.Categorical(logits=gate(v)))
        opinions = torch.cat([net(v) for net in nets], -1)
        pyro.sample("x", dist.Normal(Vindex(opinions)[..., z], 1.0), obs=torch.zeros(5))


@row(
    edges={"a": "", "b": "", "x": "a b"},
    params={"x": "T"},
    blocks=[block("T", 6, 4)],  # one row of logits per pair of parents
    replicates={"a": ("N",)},
)
def table_by_vindex() -> None:
    table = param("T", 2, 3, 4)
    with data():
        a = pyro.sample("a", dist.Categorical(torch.ones(2)))
        b = pyro.sample("b", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Categorical(logits=Vindex(table)[a, b, :]), obs=torch.zeros(5))


@row(
    edges={"a": "", "b": "", "x": "a b"},
    params={"x": "E G"},
    blocks=[block("E^T G^T", 3, 6)],  # E[a, c] meets every G[b, c]
    replicates={"a": ("N",)},
)
def sum_of_two_embeddings() -> None:
    first, second = param("E", 4, 3), param("G", 2, 3)
    with data():
        a = pyro.sample("a", dist.Categorical(torch.ones(4)))
        b = pyro.sample("b", dist.Categorical(torch.ones(2)))
        normal("x", first[a] + second[b], obs=torch.zeros(5, 3), plates=1)


@row(
    edges={"z": "", "x": "z"},
    params={"x": "E s"},
    blocks=[block("E^T s", 3, 5)],  # s[c] meets every E[z, c]
    replicates={"z": ("N",)},
)
def scaled_embedding() -> None:
    with data():
        z = pyro.sample("z", dist.Categorical(torch.ones(4)))
        normal("x", param("E", 4, 3)[z] * param("s", 3), obs=torch.zeros(5, 3), plates=1)


@row(
    edges={"z": "", "x": "z"},
    params={"x": "a b"},
    blocks=[block("a", 3, 1), block("b", 3, 1)],  # each element reads a or b, never both
    coarser=True,  # `where` is a pointwise operation
    coarse=[block("a b", 3, 2)],
)
def where_is_a_choice() -> None:
    z = normal("z", torch.zeros(3))
    normal("x", torch.where(z > 0, param("a", 3), param("b", 3)), obs=torch.zeros(3))


@row(edges={"x": ""}, params={"x": "p q"}, blocks=[block("p q", 1, 2)])
def one_parameter_in_loc_and_scale() -> None:
    p, q = param("p"), param("q")
    normal("x", p + q, p.exp())


@row(edges={"x": ""}, params={"x": "w"}, blocks=[block("w", 1, 4)])
def cumulative_sum_is_joint() -> None:
    normal("x", param("w", 4).cumsum(0))


@row(
    edges={"x": ""},
    params={"x": "loc F d"},
    blocks=[block("loc", 1, 3), block("F d", 1, 9)],
)
def low_rank_multivariate_normal() -> None:
    fn = dist.LowRankMultivariateNormal(param("loc", 3), param("F", 3, 2), positive("d", 3))
    pyro.sample("x", fn)


@row(
    edges={"x": ""},
    params={"x": "b s"},
    blocks=[block("b", 1, 1), block("s", 1, 1)],
)
def laplace_is_orthogonal() -> None:
    pyro.sample("x", dist.Laplace(param("b"), positive("s")))


@row(
    edges={"x": ""},
    params={"x": "n l"},
    blocks=[block("n l", 1, 2)],
)
def negative_binomial_with_a_learned_count() -> None:
    pyro.sample("x", dist.NegativeBinomial(positive("n"), logits=param("l")))


@row(
    edges={"theta": ""},
    params={"theta": "a"},
    blocks=[block("a", 5, 3)],  # elements of the plate are independent
)
def dirichlets_of_a_plate() -> None:
    with data():
        pyro.sample("theta", dist.Dirichlet(positive("a", 5, 3)))


@row(edges={"x": ""}, params={"x": "a b"}, blocks=[block("a b", 3, 2)])
def beta_pairs() -> None:
    sample("x", dist.Beta(positive("a", 3), positive("b", 3)))


@row(
    edges={"x": ""},
    params={"x": "W"},
    blocks=[block("W", 3, 4)],
    args=lambda: (bits(7, 4), bits(7, 3).bool()),
)
def masked_distribution(v: Tensor, mask: Tensor) -> None:
    with data(7):
        fn = dist.Bernoulli(logits=v @ param("W", 3, 4).T)
        pyro.sample("x", fn.mask(mask).to_event(1))


@row(
    edges={"x": "", "y": ""},
    params={"x": "m s", "y": "w"},
    blocks=[block("m", 1, 1), block("s", 4, 1), block("w", 1, 1)],
    districts=sets("x", "y"),
)
def independent_and_expanded() -> None:
    # Every element of x reads m; s varies along the last dimension.
    pyro.sample("x", dist.Normal(param("m"), positive("s", 4)).expand([3, 4]).to_event(2))
    pyro.sample("y", dist.Normal(param("w"), 1.0).expand([3]).to_event(1))


@row(
    edges={"x": "", "y": ""},
    params={"x": "W", "y": "V"},
    blocks=[block("W", 3, 5), block("V", 3, 5)],
    districts=sets("x", "y"),
    args=lambda: (torch.randn(7, 5), torch.ones(7, 3)),
)
def generalized_linear_models(v: Tensor, y: Tensor) -> None:
    with data(7):
        sample("x", dist.Poisson(F.linear(v, param("W", 3, 5)).exp()), y, plates=1)
        sample("y", dist.Exponential(F.softplus(F.linear(v, param("V", 3, 5)))), y, plates=1)


# --- loops --------------------------------------------------------------------------------------


@row(
    edges={"h": ""} | {f"x{i}": "h" for i in range(4)},
    params={f"x{i}": "W" for i in range(4)},
    blocks=[block("W", 4, 3)],
)
def a_site_for_every_row() -> None:
    weight = param("W", 4, 3)
    h = bernoulli("h", torch.zeros(3))
    for i in range(4):
        bernoulli(f"x{i}", weight[i] @ h, obs=torch.tensor(1.0))


@row(
    edges={f"x{i}": " ".join(f"x{j}" for j in range(i)) for i in range(4)},
    params={f"x{i}": "W b" for i in range(4)},
    blocks=[block("W b", 4, 5)],
    districts=sets("x0 x1 x2 x3"),
)
def visible_belief_network_in_place() -> None:
    # Whole rows are read; entries that meet a 0 are a matter of values.
    weight, bias = param("W", 4, 4), param("b", 4)
    x = torch.zeros(4)
    for i in range(4):
        x[i] = bernoulli(f"x{i}", weight[i] @ x.clone() + bias[i])


@row(
    edges={f"x{i}": " ".join(f"x{j}" for j in range(i)) for i in range(4)},
    params={"x0": ""} | {f"x{i}": "W" for i in range(1, 4)},
    # Row i reads its first i entries; a row stays whole.
    blocks=[block("W", 4, 4, idle={"W": UNREAD})],
)
def triangular_weight_by_slices() -> None:
    weight = param("W", 4, 4)
    x = torch.zeros(4)
    for i in range(4):
        x[i] = bernoulli(f"x{i}", (weight[i, :i] * x[:i].clone()).sum() if i else torch.zeros(()))


@row(
    edges={f"x{i}": " ".join(f"x{j}" for j in range(i)) for i in range(4)},
    params={"x0": ""} | {f"x{i}": "W" for i in range(1, 4)},
    blocks=[block("W", 4, 4, idle={"W": UNREAD})],
    coarser=True,  # autograd shows W behind an empty slice of it, and no more than that
)
def empty_slice_of_a_weight() -> None:
    weight = param("W", 4, 4)
    x = torch.zeros(4)
    for i in range(4):
        x[i] = bernoulli(f"x{i}", weight[i, :i] @ x[:i].clone())


@row(
    edges={f"x{t}": f"x{t - 1}" if t else "" for t in range(130)},
    params={f"x{t}": "w v" for t in range(130)},
    # w[t] is the own weight of site t, v is shared by all of them: the loc joins everything.
    blocks=[block("w v", 1, 131)],
)
def chain_of_130_sites() -> None:
    w, v = param("w", 130), param("v")
    x = torch.tensor(0.0)
    for t in range(130):
        x = normal(f"x{t}", 0.1 * w[t] * x + v)


@row(
    edges={f"h{i}": "" for i in range(70)} | {f"x{i}": f"h{i}" for i in range(70)},
    params={f"x{i}": "w" for i in range(70)},
    blocks=[block("w", 70, 1)],
    districts=sets(*(f"h{i} x{i}" for i in range(70))),
)
def seventy_hidden_sites() -> None:
    w = param("w", 70)
    hidden = [bernoulli(f"h{i}", torch.tensor(0.0)) for i in range(70)]
    for i, h in enumerate(hidden):
        normal(f"x{i}", w[i] * h, obs=torch.tensor(0.0))


@row(
    edges={f"h{i}": "" for i in range(70)} | {"x": "h3 h68"},
    districts=sets("h3 h68 x", *(f"h{i}" for i in range(70) if i not in {3, 68})),
)
def two_of_seventy_hidden_sites() -> None:
    hidden = torch.stack([normal(f"h{i}", torch.tensor(0.0)) for i in range(70)])
    normal("x", hidden[3] + hidden[-2], obs=torch.tensor(0.0))


@row(
    edges={f"z{t}": " ".join(f"z{s}" for s in (t - 2, t - 1) if s >= 0) for t in range(4)}
    | {f"x{t}": f"z{t}" for t in range(4)},
    params={f"z{t}": "T" for t in range(4)} | {f"x{t}": "E" for t in range(4)},
    blocks=[block("T", 4, 2), block("E", 2, 1)],
)
def second_order_markov() -> None:
    transition, emission = param("T", 2, 2, 2), param("E", 2)
    before, last = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(4), history=2):
        z = pyro.sample(f"z{t}", dist.Categorical(logits=transition[before, last]))
        before, last = last, z
        bernoulli(f"x{t}", emission[z], obs=torch.tensor(1.0))


@row(
    edges={
        "z0": "", "d0": "z0", "x0": "z0 d0",
        "z1": "z0", "d1": "z1", "x1": "z1 d1",
    },
    params={
        "z0": "T", "d0": "R", "x0": "M",
        "z1": "T", "d1": "R", "x1": "M",
    },
    blocks=[block("T", 2, 2), block("R", 2, 1), block("M", 2, 1)],
)  # fmt: skip
def semi_markov() -> None:
    # Segments with a state and a duration.
    transition, rate, mean = param("T", 2, 2), positive("R", 2), param("M", 2)
    z = torch.tensor(0)
    for s in pyro.markov(range(2)):
        z = pyro.sample(f"z{s}", dist.Categorical(logits=transition[z]))
        duration = pyro.sample(f"d{s}", dist.Poisson(rate[z]))
        normal(f"x{s}", mean[z] * (1 + duration), obs=torch.tensor(0.0))


@row(
    edges={"z0": "", "z1": "z0", "z2": "z1", "x0": "z0", "x1": "z1", "x2": "z2"},
    params={f"z{t}": "A q" for t in range(3)} | {f"x{t}": "C" for t in range(3)},
    blocks=[block("A", 2, 2), block("q", 2, 1), block("C", 3, 2)],
    replicates={"z0": ("N",)},
)
def kalman_filter_of_many_series() -> None:
    dynamics, noise, readout = param("A", 2, 2), positive("q", 2), param("C", 3, 2)
    with data():
        z = torch.zeros(5, 2)
        for t in range(3):
            z = normal(f"z{t}", z @ dynamics.T, noise, plates=1)
            normal(f"x{t}", z @ readout.T, obs=torch.zeros(5, 3), plates=1)


CELL = "cell$$$weight_ih cell$$$weight_hh cell$$$bias_ih cell$$$bias_hh"


@row(
    edges={"z0": "", "z1": "z0", "z2": "z0 z1", "x0": "z0", "x1": "z1", "x2": "z2"},
    params={f"z{t}": CELL for t in range(3)} | {f"x{t}": "C" for t in range(3)},
    # GRUCell(2, 2): 6·2 + 6·2 + 6 + 6.
    blocks=[block(CELL, 1, 36), block("C", 3, 2)],
    args=lambda: (nn.GRUCell(2, 2),),
    replicates={"z0": ("N",)},
)
def deep_markov(cell: nn.Module) -> None:
    # The state h of the cell carries all values before.
    pyro.module("cell", cell)
    readout = param("C", 3, 2)
    with data():
        z, h = torch.zeros(5, 2), torch.zeros(5, 2)
        for t in range(3):
            h = cell(z, h)
            z = normal(f"z{t}", h, plates=1)
            normal(f"x{t}", z @ readout.T, obs=torch.zeros(5, 3), plates=1)


# --- plates: independent examples, and those that are not ---------------------------------------


@row(
    edges={"z": "", "x": "z"},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 3, 2)],  # gain and shift of one feature
    coupled={"x": ("N",)},
    replicates={"z": ()},
    args=lambda: (nn.BatchNorm1d(3),),
)
def batch_norm(net: nn.Module) -> None:
    pyro.module("net", net)
    with data():
        z = normal("z", torch.zeros(5, 3), plates=1)
        normal("x", net(z), obs=torch.zeros(5, 3), plates=1)


@row(
    edges={"z": "", "x": "z"},
    params={"x": LINEAR},
    blocks=[block(LINEAR, 3, 2)],
    replicates={"z": ("N",)},
    args=lambda: (nn.BatchNorm1d(3).eval(),),
)
def batch_norm_in_evaluation(net: nn.Module) -> None:
    pyro.module("net", net)
    with data():
        z = normal("z", torch.zeros(5, 3), plates=1)
        normal("x", net(z), obs=torch.zeros(5, 3), plates=1)


@row(
    edges={"z": "", "x": "z"},
    params={"x": "w"},
    blocks=[block("w", 1, 1)],
    coupled={"x": ("N",)},
    replicates={"z": ()},
)
def flip_of_the_batch() -> None:
    with data():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(param("w") * z.flip(0), 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    coupled={"x": ("N",)},
    replicates={"z": ()},
)
def mean_of_the_batch() -> None:
    with data():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(0), 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    coupled={"x": ("N",)},
    replicates={"z": ()},
)
def attention_over_the_batch() -> None:
    with data():
        z = normal("z", torch.zeros(5, 3), plates=1)
        weights = torch.softmax(z @ z.T, -1)
        normal("x", weights @ z, obs=torch.zeros(5, 3), plates=1)


@row(
    edges={"y": ""},
    params={"y": "W"},
    blocks=[block("W", 3, 4)],
    coupled={"y": ("N",)},
    args=lambda: (torch.randn(5, 4), bits(5, 3)),
)
def centred_covariates(v: Tensor, y: Tensor) -> None:
    # The examples are tied through an argument of the program.
    with data():
        bernoulli("y", F.linear(v - v.mean(0), param("W", 3, 4)), y, plates=1)


@row(
    edges={"x": "", "y": "x"},
    params={"y": "w"},
    blocks=[block("w", 1, 1)],
    districts=sets("x", "y"),
    coupled={"y": ("N",)},
    replicates={"x": ("N",), "y": ()},
    args=lambda: (torch.randn(5),),
)
def shift_of_observed_values(x: Tensor) -> None:
    with data():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]), obs=x)
        pyro.sample("y", dist.Normal(param("w") * x.roll(1), 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    coupled={"x": ("words",)},
    replicates={"z": ("docs",)},
)
def coupled_along_one_of_two_plates() -> None:
    with pyro.plate("docs", 3, dim=-2), pyro.plate("words", 4, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 4), 1.0))
        pyro.sample("x", dist.Normal(z.flip(-1), 1.0), obs=torch.zeros(3, 4))


@row(
    edges={"z": "", "y": "z"},
    params={"z": "m", "y": "w"},
    blocks=[block("m", 1, 1), block("w", 1, 1)],
    replicates={"z": ()},  # y is outside the plate and reads all of it
)
def site_outside_that_reads_the_plate() -> None:
    with data():
        z = pyro.sample("z", dist.Normal(param("m"), 1.0))
    normal("y", param("w") * z.mean(), obs=torch.tensor(0.0))


@row(
    edges={"phi": "", "theta": "", "z": "theta", "w": "phi z"},
    params={"phi": "beta", "theta": "alpha"},
    blocks=[block("alpha", 1, 2), block("beta", 1, 4)],
    replicates={"phi": ()},  # the topics are global
)
def topics_with_a_prior() -> None:
    alpha, beta = positive("alpha", 2), positive("beta", 4)
    with pyro.plate("topics", 2):
        phi = pyro.sample("phi", dist.Dirichlet(beta))
    with pyro.plate("docs", 3, dim=-1):
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
        with pyro.plate("words", 5, dim=-2):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(phi[z]), obs=torch.zeros(5, 3))


@row(
    edges={"theta": "", "z": "theta", "w": "z"},
    params={"theta": "alpha", "w": "phi"},
    blocks=[block("alpha", 1, 2), block("phi", 2, 4)],
    replicates={"theta": ("docs",)},  # theta is not inside the words
)
def topics_as_parameters() -> None:
    alpha, phi = positive("alpha", 2), simplex("phi", 2, 4)
    with pyro.plate("docs", 3, dim=-1):
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
        with pyro.plate("words", 5, dim=-2):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(phi[z]), obs=torch.zeros(5, 3))


@row(
    edges={"mu": "", "theta": "mu", "x": "theta"},
    params={"mu": "m", "theta": "s", "x": "t"},
    blocks=[block("m", 1, 1), block("s", 1, 1), block("t", 1, 1)],
    replicates={"mu": ()},
)
def hierarchy_under_a_global_site() -> None:
    mu = normal("mu", param("m"))
    with data():
        theta = pyro.sample("theta", dist.Normal(mu, positive("s")))
        pyro.sample("x", dist.Normal(theta, positive("t")), obs=torch.zeros(5))


@row(
    edges={"mu": "", "theta": "mu", "x": "theta"},
    params={"theta": "s"},
    blocks=[block("s", 1, 1)],
    districts=sets("mu", "theta x"),  # mu is observed
    replicates={"mu": (), "theta": ("N",)},
)
def hierarchy_under_an_observed_site() -> None:
    mu = normal("mu", torch.tensor(0.0), obs=torch.tensor(0.2))
    with data():
        theta = pyro.sample("theta", dist.Normal(mu, positive("s")))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=torch.zeros(5))


@row(
    edges={"z": "", "x": "z"},
    params={"z": "pi", "x": "mu s"},
    blocks=[block("pi", 1, 3), block("mu", 6, 1), block("s", 1, 1)],
    replicates={"z": ("N",)},
)
def gaussian_mixture() -> None:
    pi, mu, s = param("pi", 3), param("mu", 3, 2), positive("s")
    with data():
        z = pyro.sample("z", dist.Categorical(logits=pi))
        normal("x", mu[z], s, torch.zeros(5, 2), plates=1)


@row(
    edges={"x": ""},
    params={"x": "loc"},
    blocks=[block("loc", 10, 1)],  # any of the ten may be drawn into the subsample
)
def parameter_per_datum_of_a_subsample() -> None:
    loc = param("loc", 10)
    with pyro.plate("N", 10, subsample_size=4) as index:
        pyro.sample("x", dist.Normal(loc[index], 1.0))


@row(
    edges={f"z{i}": "" for i in range(3)} | {f"x{i}": f"z{i}" for i in range(3)},
    params={f"z{i}": "p" for i in range(3)} | {f"x{i}": "w" for i in range(3)},
    blocks=[block("p", 3, 1), block("w", 1, 1)],
    districts=sets("z0 x0", "z1 x1", "z2 x2"),
    replicates={"z0": ("inner",)},
)
def sequential_plate_around_a_plate() -> None:
    p, w = param("p", 3), param("w")
    inner = pyro.plate("inner", 2)
    for i in pyro.plate("outer", 3):
        with inner:
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=p[i]))
            pyro.sample(f"x{i}", dist.Normal(w * z, 1.0), obs=torch.zeros(2))


@row(
    edges={"h1": "", "h2": "", "v1": "h1", "v2": "h1 h2", "v3": "v2", "h3": "v3", "v4": "h3",
           "v5": "h3"},
    params={site: f"p{site}" for site in ("h1", "h2", "v1", "v2", "v3", "h3", "v4", "v5")},
    blocks=[
        *(block(f"p{site}", 1, 1) for site in ("h1", "h2")),
        *(block(f"p{site}", 2, 1) for site in ("v1", "v3", "h3", "v4", "v5")),
        block("pv2", 4, 1),
    ],
    # v3 and its parent are visible; h3 hides, but its parent v3 does not.
    districts=sets("h1 h2 v1 v2", "v3", "h3 v4 v5"),
    args=lambda: tuple(bits(5).long() for _ in range(5)),
    replicates={"h1": ("N",), "v3": ("N",), "h3": ("N",)},
)  # fmt: skip
def three_districts(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, v5: Tensor) -> None:
    def site(name: str, *parents: Tensor, obs: Tensor | None = None) -> Tensor:
        logits = param(f"p{name}", *[2] * len(parents))
        logits = logits[tuple(parent.long() for parent in parents)] if parents else logits
        target = None if obs is None else obs.double()
        return pyro.sample(name, dist.Bernoulli(logits=logits), obs=target)

    with data():
        h1, h2 = site("h1"), site("h2")
        site("v1", h1, obs=v1)
        v2 = site("v2", h1, h2, obs=v2)
        v3 = site("v3", v2, obs=v3)
        h3 = site("h3", v3)
        site("v4", h3, obs=v4)
        site("v5", h3, obs=v5)


@row(
    edges={"a": "", "b": "a", "c": "a b"},
    params={"a": "pa", "b": "wb", "c": "wc"},
    blocks=[block("pa", 1, 1), block("wb", 1, 2), block("wc", 1, 3)],
    districts=sets("a", "b", "c"),
    args=lambda: tuple(bits(5) for _ in range(3)),
    replicates={"a": ("N",), "b": ("N",), "c": ("N",)},
)
def fully_visible(a: Tensor, b: Tensor, c: Tensor) -> None:
    wb, wc = param("wb", 2), param("wc", 3)
    with data():
        a = pyro.sample("a", dist.Bernoulli(logits=param("pa")), obs=a)
        b = pyro.sample("b", dist.Bernoulli(logits=wb[0] + wb[1] * a), obs=b)
        pyro.sample("c", dist.Bernoulli(logits=wc[0] + wc[1] * a + wc[2] * b), obs=c)


# --- programs under handlers, and guides --------------------------------------------------------


def handled() -> None:
    z = normal("z", param("p"))
    normal("x", param("w") * z, obs=torch.tensor(0.3))
    normal("y", param("v") * z)


HANDLED = [block("p", 1, 1), block("w", 1, 1), block("v", 1, 1)]
OWNERS = {"z": "p", "x": "w", "y": "v"}


@row(edges={"z": "", "x": "z", "y": "z"}, params=OWNERS, blocks=HANDLED)
def scaled_program() -> None:
    poutine.scale(handled, 2.0)()


@row(
    edges={"z": "", "x": "z", "y": "z"},
    params=OWNERS,
    blocks=HANDLED,
    districts=sets("z", "x", "y"),  # all is observed
)
def conditioned_program() -> None:
    poutine.condition(handled, data={"z": torch.tensor(0.1), "y": torch.tensor(0.2)})()


@row(
    edges={"x": "", "y": ""},
    # z is no site of the program that is seen from outside: its draw p + noise is arithmetic.
    params={"x": "p w", "y": "p v"},
    blocks=[block("p w v", 1, 3)],
    districts=sets("x", "y"),
)
def blocked_program() -> None:
    poutine.block(handled, hide=["z"])()


@row(
    # z is sampled, but its children read what was put in its place.
    edges={"z": "", "x": "", "y": ""},
    params=OWNERS,
    blocks=HANDLED,
    districts=sets("z", "x", "y"),
)
def intervened_program() -> None:
    with quiet():
        poutine.do(handled, data={"z": torch.tensor(0.1)})()


def gaussian(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    w = pyro.sample("w", dist.Gamma(2.0, 1.0))
    pyro.sample("x", dist.Normal(z.sum() * w, 1.0), obs=x)


@row(
    edges={"z_unconstrained": "", "w_unconstrained": ""},
    params={
        "z_unconstrained": "AutoNormal.locs.z AutoNormal.scales.z",
        "w_unconstrained": "AutoNormal.locs.w AutoNormal.scales.w",
    },
    blocks=[
        block("AutoNormal.locs.z", 2, 1),
        block("AutoNormal.scales.z", 2, 1),
        block("AutoNormal.locs.w", 1, 1),
        block("AutoNormal.scales.w", 1, 1),
    ],
    districts=sets("z_unconstrained", "w_unconstrained"),
    args=lambda: (AutoNormal(gaussian), torch.tensor(0.3)),
)
def auto_normal(guide: Any, x: Tensor) -> None:
    guide(x)


@row(
    edges={"_AutoDiagonalNormal_latent": ""},
    params={"_AutoDiagonalNormal_latent": "AutoDiagonalNormal.loc AutoDiagonalNormal.scale"},
    blocks=[block("AutoDiagonalNormal.loc", 3, 1), block("AutoDiagonalNormal.scale", 3, 1)],
    args=lambda: (AutoDiagonalNormal(gaussian), torch.tensor(0.3)),
)
def auto_diagonal_normal(guide: Any, x: Tensor) -> None:
    guide(x)


AUTO = "AutoMultivariateNormal"


@row(
    edges={f"_{AUTO}_latent": ""},
    params={f"_{AUTO}_latent": f"{AUTO}.loc {AUTO}.scale {AUTO}.scale_tril"},
    # scale_tril is unit lower triangular: three of its nine entries are read.
    blocks=[
        block(f"{AUTO}.loc", 1, 3),
        block(
            f"{AUTO}.scale {AUTO}.scale_tril",
            1,
            12,
            idle={f"{AUTO}.scale_tril": [[1, 1, 1], [0, 1, 1], [0, 0, 1]]},
        ),
    ],
    args=lambda: (AutoMultivariateNormal(gaussian), torch.tensor(0.3)),
)
def auto_multivariate_normal(guide: Any, x: Tensor) -> None:
    guide(x)


@row(
    edges={},
    districts=frozenset(),
    args=lambda: (AutoDelta(gaussian), torch.tensor(0.3)),
)
def auto_delta(guide: Any, x: Tensor) -> None:
    guide(x)
