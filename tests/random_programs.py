"""Random Pyro programs, and a numeric check of the partition that `pyronat.analyze` finds in them.

A program chains one to five `OPERATIONS` between its parameters and the distributions of one or two
sites. `pyronat.analyze` sees it once, with one set of parameters, inputs and indices. The check
draws several of them, differentiates the coordinates of every site by autograd, and asks of the
partition what is true of the Fisher information: two entries with a derivative in the same
Fisher-orthogonal group of coordinates are in the same block, and no entry with a derivative is in
none. The finest partition of which this holds for the draws is the reference for how fine it is.

The long run, and the operations one by one::

    python tests/random_programs.py --programs 3000 --first-seed 0
    python tests/random_programs.py --alone 20
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.utils.checkpoint import checkpoint as checkpointed

import pyronat
from pyronat.graph import BayesNet

MAX_COLUMNS = 6
LENGTHS = (1, 1, 2, 2, 3, 4, 5)
"""Of the chains: long ones mix everything into one block."""
DRAWS = 6
"""Draws of parameters, inputs and indices in which soundness is checked."""
MORE_DRAWS = 12
"""Further draws where the partition looks too coarse: some choices of indices are rare."""
TOLERANCE = 1e-11
"""Derivatives below it, relative to the largest, are round-off."""

Operation = Callable[["Tape", Tensor], Tensor]
Family = Callable[["Tape", Tensor], tuple[dist.Distribution, list[Tensor]]]


# --- programs ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Program:
    """A random program.

    Attributes:
        seed: what it is made from.
        chain: the operations, instead of random ones.
        operations: names of those in it, weights included.
        families: of its sites.
        args: arguments of the model in the analysis.
    """

    seed: int
    chain: tuple[str, ...] | None = None
    operations: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    args: tuple[Tensor, ...] = ()
    constants: list[Tensor] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def model(self, *args: Tensor) -> None:
        self._run(Tape(self, args))

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.leaves())

    def leaves(self) -> list[tuple[str, Tensor]]:
        """Unconstrained parameters by name."""
        return list(pyro.get_param_store().named_parameters())

    def coordinates(self) -> list[Tensor]:
        """Coordinates of all sites `[groups, size]` at new parameters, inputs and indices."""
        scale = 0.3 + torch.rand((), generator=self.generator)
        for _, leaf in self.leaves():
            value = torch.randn(leaf.shape, generator=self.generator)
            leaf.data.copy_(scale * value)
        return self.drawn().coordinates

    def drawn(self) -> Tape:
        """A run at the present parameters, and at new inputs and indices."""
        tape = Tape(self, None)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
            self._run(tape)
        return tape

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _run(self, tape: Tape) -> None:
        h = tape.floats(tape.rng.randint(2, 3), tape.rng.randint(2, 4))
        first = tape.grow(h)
        value = tape.site("first", first)
        if self.chain is None and tape.rng.random() < 0.4:
            if value.dtype == torch.long:
                value = tape.param(first.shape[1], tape.width())[value]
            value = torch.asinh(value)
            value = tape.choose([value, torch.cat([value, first], 1)])
            tape.site("second", tape.grow(value))
        self.operations, self.families = tuple(tape.operations), tuple(tape.families)


def random_program(seed: int, chain: Sequence[str] | None = None) -> Program:
    """The program of a seed; it clears the parameter store.

    Args:
        seed: determines everything.
        chain: operations to use instead of random ones, on plain weights and for one site of
            scalar coordinates.
    """
    pyro.clear_param_store()
    program = Program(seed, None if chain is None else tuple(chain))
    program.generator.manual_seed(seed)
    tape = program.drawn()
    # Zeros in the analysis, or the same index everywhere, must not hide a dependence.
    rng = random.Random(-seed - 1)
    if rng.random() < 0.2:
        for name, leaf in program.leaves():
            if "parametrizations" not in name:  # a zero direction has no norm
                leaf.data.zero_()
    zeros = rng.random() < 0.2
    program.args = tuple(torch.zeros_like(value) if zeros else value for value in tape.inputs)
    return program


class Tape:
    """One run of a program.

    Its choices and constants are those of the program. Its inputs are the arguments, or drawn from
    the generator of the program where there are none; then the sites are drawn outside Pyro and
    held fixed.
    """

    def __init__(self, program: Program, args: tuple[Tensor, ...] | None) -> None:
        self.program, self.args = program, args
        self.rng = random.Random(f"{program.seed} {program.chain}")
        self.shapes: dict[str, tuple[tuple[int, ...], object]] = {}
        self.inputs: list[Tensor] = []
        self.num_constants = self.num_modules = 0
        self.within_weight = False
        self.operations: list[str] = []
        self.families: list[str] = []
        self.coordinates: list[Tensor] = []

    def choose(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)

    def width(self) -> int:
        return self.rng.randint(2, 4)

    def axis(self) -> int:
        return self.choose([1, 1, 1, 0])

    def param(self, *shape: int, constraint: Any = constraints.real) -> Tensor:
        """A new parameter, sometimes an old one of the same shape."""
        same = [name for name, kind in self.shapes.items() if kind == (shape, constraint)]
        if same and self.rng.random() < 0.15:
            name = self.choose(same)
        else:
            name = f"p{len(self.shapes)}"
            self.shapes[name] = (shape, constraint)
        draw = partial(self.program.randn, *shape)
        return pyro.param(name, lambda: transform_to(constraint)(draw()), constraint=constraint)

    def weight(self, rows: int, columns: int) -> Tensor:
        """A parameter matrix, sometimes one that is computed."""
        if self.within_weight or self.program.chain is not None or self.rng.random() < 0.5:
            return self.param(rows, columns)
        if self.rng.random() < 0.3:
            return self.param(columns, rows).T
        self.within_weight = True
        name = self.choose([name for name in OPERATIONS if name in KEEP_SHAPE])
        self.operations.append(name)
        result = OPERATIONS[name](self, self.param(rows, columns))
        self.within_weight = False
        assert result.shape == (rows, columns), name
        return result

    def module(self, kind: Callable[..., nn.Module], *sizes: int, **options: Any) -> nn.Module:
        """A module of its own, registered with Pyro."""
        number = self.num_modules
        self.num_modules += 1
        if number == len(self.program.modules):
            self.program.modules.append(kind(*sizes, **options))
        return pyro.module(f"m{number}", self.program.modules[number])

    def floats(self, *shape: int) -> Tensor:
        return self._input(lambda: self.program.randn(*shape))

    def index(self, high: int, *shape: int) -> Tensor:
        return self._input(lambda: torch.randint(high, shape, generator=self.program.generator))

    def mask(self, *shape: int) -> Tensor:
        return self._input(lambda: self.program.randn(*shape) > 0)

    def shuffle(self, size: int) -> Tensor:
        return self._input(lambda: torch.randperm(size, generator=self.program.generator))

    def constant(self, *shape: int) -> Tensor:
        return self._constant(lambda: self.program.randn(*shape))

    def permutation(self, size: int) -> Tensor:
        return self._constant(lambda: torch.randperm(size, generator=self.program.generator))

    def _input(self, draw: Callable[[], Tensor]) -> Tensor:
        value = draw() if self.args is None else self.args[len(self.inputs)]
        self.inputs.append(value)
        return value

    def _constant(self, draw: Callable[[], Tensor]) -> Tensor:
        if self.num_constants == len(self.program.constants):
            self.program.constants.append(draw())
        self.num_constants += 1
        return self.program.constants[self.num_constants - 1]

    def grow(self, h: Tensor) -> Tensor:
        """Applies a chain of operations to `[rows, columns]`, rows being the data."""
        chain = self.program.chain
        if chain is None:
            chain = [self.choose(sorted(OPERATIONS)) for _ in range(self.choose(LENGTHS))]
            chain = [*self.choose([[], ["by_columns"], ["by_elements"]]), *chain]
        rows = len(h)
        for name in chain:
            self.operations.append(name)
            h = OPERATIONS[name](self, h)
            assert h.dim() == 2 and len(h) == rows, f"{name} gives {tuple(h.shape)}"
            if h.shape[1] > MAX_COLUMNS:
                h = h[:, :MAX_COLUMNS]
            if h.shape[1] < 2:
                h = h * self.param(2)
        return h if h.requires_grad else bias(self, h)

    def site(self, name: str, h: Tensor) -> Tensor:
        """Draws a site whose distribution is computed from h; its value."""
        any_family = self.program.chain is None and self.rng.random() < 0.3
        family = self.choose(sorted(FAMILIES) if any_family else SCALAR_FAMILIES)
        self.families.append(family)
        distribution, coordinates = FAMILIES[family](self, h)
        self.coordinates += coordinates
        batch_dims = len(distribution.batch_shape)
        events = self.rng.choice([batch_dims - 1, batch_dims - 1, 0, batch_dims])
        if self.args is None:
            return distribution.sample().detach()
        with ExitStack() as plates:
            for dim in range(events - batch_dims, 0):
                size = distribution.batch_shape[dim - events]
                plates.enter_context(pyro.plate(f"{name}{dim}", size, dim=dim))
            return pyro.sample(name, distribution.to_event(events))


# --- operations --------------------------------------------------------------------------------

OPERATIONS: dict[str, Operation] = {}
"""What stands between parameters and distributions, `[rows, columns]` to `[rows, anything]`."""
KEEP_SHAPE: set[str] = set()
"""Operations that keep the shape; they make weights from parameters too."""


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


def keeps_shape(function: Operation) -> Operation:
    KEEP_SHAPE.add(function.__name__)
    return operation(function)


def joined(tape: Tape, h: Tensor, other: Tensor) -> Tensor:
    return tape.choose([h + other, h * other, other.expand_as(h)])


def positive_definite(tape: Tape, size: int) -> Tensor:
    factor = tape.param(size, size)
    return factor @ factor.T + torch.eye(size)


# Products


@operation
def linear(tape: Tape, h: Tensor) -> Tensor:
    size = tape.width()
    b = tape.param(size) if tape.choose([True, False]) else None
    return F.linear(h, tape.weight(size, h.shape[1]), b)


@operation
def mm(tape: Tape, h: Tensor) -> Tensor:
    return h @ tape.weight(h.shape[1], tape.width())


@operation
def addmm(tape: Tape, h: Tensor) -> Tensor:
    size = tape.width()
    b = tape.param(*tape.choose([(size,), (1, size), (len(h), size)]))
    return torch.addmm(b, h, tape.weight(h.shape[1], size), beta=0.5, alpha=2.0)


@operation
def matmul_3d(tape: Tape, h: Tensor) -> Tensor:
    size = tape.width()
    kind = tape.choose(["rows", "columns", "stacked"])
    if kind == "rows":
        return (h.unsqueeze(1) @ tape.weight(h.shape[1], size)).squeeze(1)
    if kind == "columns":
        return (tape.weight(size, h.shape[1]) @ h.unsqueeze(-1)).squeeze(-1)
    return (torch.stack([h, h.flip(1)], 1) @ tape.weight(h.shape[1], size)).flatten(1)


@operation
def bmm(tape: Tape, h: Tensor) -> Tensor:
    return torch.bmm(h.unsqueeze(1), tape.param(len(h), h.shape[1], tape.width())).squeeze(1)


@operation
def baddbmm(tape: Tape, h: Tensor) -> Tensor:
    size = tape.width()
    b, w = tape.param(len(h), 1, size), tape.param(len(h), h.shape[1], size)
    return torch.baddbmm(b, h.unsqueeze(1), w).squeeze(1)


@operation
def einsum(tape: Tape, h: Tensor) -> Tensor:
    n, k = h.shape[1], tape.width()
    equation = tape.choose(["bi,ij->bj", "bi,ji->bj", "bi,i->bi", "bi,ij,jk->bk", "bi,bj,ijk->bk"])
    if equation == "bi,ij->bj":
        return torch.einsum(equation, h, tape.weight(n, k))
    if equation == "bi,ji->bj":
        return torch.einsum(equation, h, tape.weight(k, n))
    if equation == "bi,i->bi":
        return torch.einsum(equation, h, tape.param(n))
    if equation == "bi,ij,jk->bk":
        return torch.einsum(equation, h, tape.weight(n, 2), tape.weight(2, k))
    return torch.einsum(equation, h, h, tape.param(n, n, k))


@operation
def bilinear(tape: Tape, h: Tensor) -> Tensor:
    return F.bilinear(h, h.tanh(), tape.param(tape.width(), h.shape[1], h.shape[1]))


@operation
def tensordot(tape: Tape, h: Tensor) -> Tensor:
    return torch.tensordot(h, tape.weight(h.shape[1], tape.width()), 1)


@operation
def kron(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, torch.kron(tape.param(2, h.shape[1]), tape.param(2, 1)))


@operation
def outer(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return (h.unsqueeze(2) * h.unsqueeze(1)).sum(2)
    return (h.unsqueeze(2) * tape.param(2)).flatten(1)


@operation
def masked_weight(tape: Tape, h: Tensor) -> Tensor:
    size = tape.width()
    mask = (tape.constant(size, h.shape[1]) > 0).to(h.dtype)
    return F.linear(h, tape.param(size, h.shape[1]) * mask, tape.param(size))


@operation
def low_rank(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, tape.param(tape.width(), 1) @ tape.param(1, h.shape[1]))


@operation
def weight_norm(tape: Tape, h: Tensor) -> Tensor:
    v = tape.param(tape.width(), h.shape[1])
    return F.linear(h, tape.param(len(v), 1) * v / (0.1 + v.norm(dim=1, keepdim=True)))


@operation
def one_hot_mm(tape: Tape, h: Tensor) -> Tensor:
    rows = F.one_hot(tape.index(3, len(h)), 3).to(h.dtype)
    return joined(tape, h, rows @ tape.param(3, h.shape[1]))


@operation
def sparse_mm(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    cells = tape.permutation(n * n)[: n + 1]
    cells = torch.stack([cells // n, cells % n])
    values = tape.choose([tape.constant(n + 1), tape.param(n + 1)])
    matrix = torch.sparse_coo_tensor(cells, values, (n, n), check_invariants=False)
    return h + torch.sparse.mm(matrix, (h * tape.param(n)).T).T


@operation
def multi_dot(tape: Tape, h: Tensor) -> Tensor:
    return torch.linalg.multi_dot([h, tape.weight(h.shape[1], 2), tape.weight(2, tape.width())])


@operation
def matrix_vector(tape: Tape, h: Tensor) -> Tensor:
    v = tape.param(h.shape[1])
    return torch.stack([torch.mv(h, v), h @ tape.param(h.shape[1])], 1) + torch.dot(v, v)


@operation
def block_diag(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return F.linear(h, torch.block_diag(tape.param(2, 1), tape.param(1, n - 1)))


@operation
def mixture(tape: Tape, h: Tensor) -> Tensor:
    gates = F.linear(h, tape.param(2, h.shape[1])).softmax(1)
    return torch.einsum("bk,bi,kij->bj", gates, h, tape.param(2, h.shape[1], 2))


# Elementwise


@keeps_shape
def by_columns(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(h.shape[1])


@keeps_shape
def by_elements(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(*h.shape)


@keeps_shape
def bias(tape: Tape, h: Tensor) -> Tensor:
    return h + tape.param(h.shape[1])


@keeps_shape
def multiply(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(*tape.choose([(h.shape[1],), (len(h), 1), ()])).exp()


@keeps_shape
def addcmul(tape: Tape, h: Tensor) -> Tensor:
    return torch.addcmul(h, tape.param(h.shape[1]), tape.param(h.shape[1]), value=0.5)


@keeps_shape
def lerp(tape: Tape, h: Tensor) -> Tensor:
    share = tape.param(h.shape[1], constraint=constraints.unit_interval)
    return torch.lerp(h, tape.param(h.shape[1]).expand_as(h), share.expand_as(h))


@keeps_shape
def exp(tape: Tape, h: Tensor) -> Tensor:
    return torch.asinh(h).exp()


@keeps_shape
def tanh(tape: Tape, h: Tensor) -> Tensor:
    return h.tanh()


@keeps_shape
def softplus(tape: Tape, h: Tensor) -> Tensor:
    return F.softplus(h)


@keeps_shape
def leaky_relu(tape: Tape, h: Tensor) -> Tensor:
    return F.leaky_relu(h)


@keeps_shape
def relu(tape: Tape, h: Tensor) -> Tensor:
    return F.relu(h) + 0.1 * h


@keeps_shape
def gelu(tape: Tape, h: Tensor) -> Tensor:
    return F.gelu(h)


@operation
def glu(tape: Tape, h: Tensor) -> Tensor:
    return F.glu(torch.cat([h, h * tape.param(h.shape[1])], 1), 1)


@keeps_shape
def prelu(tape: Tape, h: Tensor) -> Tensor:
    return F.prelu(h, tape.param(tape.choose([1, h.shape[1]])))


@keeps_shape
def complex_abs(tape: Tape, h: Tensor) -> Tensor:
    return torch.complex(h, tape.param(h.shape[1]).expand_as(h)).abs()


@keeps_shape
def single_precision(tape: Tape, h: Tensor) -> Tensor:
    return h.float().to(h.dtype)


@keeps_shape
def detach_multiply(tape: Tape, h: Tensor) -> Tensor:
    return h * (1 + h.detach())


@keeps_shape
def logaddexp(tape: Tape, h: Tensor) -> Tensor:
    return torch.logaddexp(h, tape.param(h.shape[1]))


@keeps_shape
def atan2(tape: Tape, h: Tensor) -> Tensor:
    return torch.atan2(h, 1 + tape.param(h.shape[1]).exp())


@keeps_shape
def nan_to_num(tape: Tape, h: Tensor) -> Tensor:
    return torch.nan_to_num(h, nan=0.5)


@operation
def complex_view(tape: Tape, h: Tensor) -> Tensor:
    pairs = torch.stack([h, h * tape.param(h.shape[1])], 2)
    turned = torch.view_as_complex(pairs) * torch.complex(tape.param(), tape.param())
    return torch.view_as_real(turned).flatten(1)


# Indices into parameters


@operation
def embedding(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, F.embedding(tape.index(4, len(h)), tape.weight(4, h.shape[1])))


@operation
def embedding_bag(tape: Tape, h: Tensor) -> Tensor:
    bags, mode = tape.index(4, len(h), 2), tape.choose(["sum", "mean"])
    return joined(tape, h, F.embedding_bag(bags, tape.param(4, h.shape[1]), mode=mode))


@operation
def embedding_sum(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.weight(4, h.shape[1])[tape.index(4, len(h), 2)].sum(1))


@operation
def table(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.weight(3, h.shape[1])[tape.index(3, len(h))])


@operation
def table_of_two(tape: Tape, h: Tensor) -> Tensor:
    rows = tape.param(2, 3, h.shape[1])[tape.index(2, len(h)), tape.index(3, len(h))]
    return joined(tape, h, rows)


@operation
def table_element(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(3, 2)[tape.index(3, *h.shape), tape.index(2, *h.shape)])


@operation
def chained_index(tape: Tape, h: Tensor) -> Tensor:
    t = tape.param(3, 2, h.shape[1])
    rows = torch.arange(len(h))
    return joined(tape, h, t[tape.index(3, len(h))][rows, tape.index(2, len(h))])


@operation
def index_of_index(tape: Tape, h: Tensor) -> Tensor:
    inner = tape.index(3, 4)[tape.index(4, len(h))]
    return joined(tape, h, tape.param(3, h.shape[1])[inner])


@operation
def one_row(tape: Tape, h: Tensor) -> Tensor:
    t, i = tape.param(3, h.shape[1]), tape.index(3, *tape.choose([(), (1,)]))
    return joined(tape, h, t[i].expand_as(h))


@operation
def column_table(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(h.shape[1], 3)[:, tape.index(3, len(h))].T)


@operation
def gather(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return h.gather(1, tape.index(h.shape[1], *h.shape))
    return joined(tape, h, tape.param(3, h.shape[1]).gather(0, tape.index(3, *h.shape)))


@operation
def take_along_dim(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return h.take_along_dim(h.argsort(1), 1) * tape.param(h.shape[1])
    return joined(tape, h, tape.param(3, h.shape[1]).take_along_dim(tape.index(3, *h.shape), 0))


@operation
def take(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, torch.take(tape.param(2, 3), tape.index(6, *h.shape)))


@operation
def index_select(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return h.index_select(1, tape.index(h.shape[1], h.shape[1]))
    return joined(tape, h, tape.param(3, h.shape[1]).index_select(0, tape.index(3, len(h))))


@keeps_shape
def static_permutation(tape: Tape, h: Tensor) -> Tensor:
    order = tape.permutation(h.shape[1])
    return tape.choose([h[:, order], h[:, order.tolist()], h.index_select(1, order)])


@operation
def static_rows(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(5, h.shape[1])[torch.arange(len(h))])


@operation
def computed_index(tape: Tape, h: Tensor) -> Tensor:
    first, second = tape.index(4, len(h)), tape.index(4, len(h))
    t = tape.param(2, h.shape[1])
    return joined(tape, h, t[first % 2] * tape.param(2, h.shape[1])[(first + second) % 2])


@operation
def two_tables(tape: Tape, h: Tensor) -> Tensor:
    i, j = tape.index(3, len(h)), tape.index(3, len(h))
    t, u = tape.param(3, h.shape[1]), tape.param(3, h.shape[1])
    return joined(
        tape, h, tape.choose([t[i] + u[i], t[i] + u[j], t[i] + u[2 - i], t[i] + u[i + 0]])
    )


@operation
def checkpointed_tables(tape: Tape, h: Tensor) -> Tensor:
    # Nothing keeps the indices in memory here.
    t, u = tape.param(2, h.shape[1]), tape.param(2, h.shape[1])
    i, j = tape.index(4, len(h)), tape.index(4, len(h))
    return checkpointed(lambda h: h * t[i % 2] + u[j % 2], h, use_reentrant=False)


@operation
def table_of_joins(tape: Tape, h: Tensor) -> Tensor:
    t = tape.param(3, 2) @ tape.param(2, h.shape[1])
    return joined(tape, h, t[tape.index(3, len(h))])


@operation
def index_by_argsort(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(h.shape[1])[h.argsort(1)])


@operation
def bucketize(tape: Tape, h: Tensor) -> Tensor:
    cells = torch.bucketize(tape.floats(len(h)), torch.tensor([-0.5, 0.5]))
    return joined(tape, h, tape.param(3, h.shape[1])[cells])


@operation
def vmap_index(tape: Tape, h: Tensor) -> Tensor:
    t = tape.param(3, h.shape[1])
    rows = torch.func.vmap(lambda i: t.index_select(0, i.reshape(1)).squeeze(0))
    return joined(tape, h, rows(tape.index(3, len(h))))


@operation
def triangle_of_vector(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    rows, columns = torch.tril_indices(n, n)
    matrix = torch.zeros(n, n)
    matrix[rows, columns] = tape.param(n * (n + 1) // 2)
    return F.linear(h, matrix)


# Writing


@keeps_shape
def add_in_place(tape: Tape, h: Tensor) -> Tensor:
    return h.clone().add_(tape.param(h.shape[1]))


@keeps_shape
def multiply_in_place(tape: Tape, h: Tensor) -> Tensor:
    out = h.clone()
    out[:, 1:].mul_(tape.param(h.shape[1] - 1))
    return out


@keeps_shape
def copy_slice(tape: Tape, h: Tensor) -> Tensor:
    out = h.clone()
    kind = tape.choose(["parameter", "column", "add"])
    if kind == "parameter":
        out[:, 0] = tape.param()
    elif kind == "column":
        out[:, 1] = 2 * out[:, 0]
    else:
        out[:, :2] += tape.param(2)
    return out


@keeps_shape
def empty_buffer(tape: Tape, h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    for column in range(h.shape[1]):
        out[:, h.shape[1] - 1 - column].copy_(h[:, column] * tape.param())
    return out


@operation
def index_put(tape: Tape, h: Tensor) -> Tensor:
    rows, columns = tape.index(len(h), 2), tape.index(h.shape[1], 2)
    return h.index_put((rows, columns), tape.param(2), accumulate=tape.choose([True, False]))


@operation
def set_items(tape: Tape, h: Tensor) -> Tensor:
    out = h.clone()
    out[torch.arange(len(h)), tape.index(h.shape[1], len(h))] = tape.param(len(h))
    return out


@operation
def scatter(tape: Tape, h: Tensor) -> Tensor:
    return h.scatter(1, tape.index(h.shape[1], len(h), 1), tape.param(len(h), 1))


@operation
def scatter_add(tape: Tape, h: Tensor) -> Tensor:
    return h.scatter_add(1, tape.index(h.shape[1], *h.shape), tape.param(*h.shape))


@operation
def scatter_reduce(tape: Tape, h: Tensor) -> Tensor:
    cells = tape.index(h.shape[1], *h.shape)
    return h.scatter_reduce(1, cells, tape.param(*h.shape), tape.choose(["amax", "sum", "mean"]))


@operation
def index_add(tape: Tape, h: Tensor) -> Tensor:
    columns = tape.choose([tape.index(h.shape[1], 2), torch.tensor([1, 0])])
    return h.index_add(1, columns, tape.param(len(h), 2))


@operation
def index_copy(tape: Tape, h: Tensor) -> Tensor:
    return h.index_copy(1, tape.shuffle(h.shape[1])[:2], tape.param(len(h), 2))


@operation
def index_fill(tape: Tape, h: Tensor) -> Tensor:
    return (h * tape.param(h.shape[1])).index_fill(1, tape.index(h.shape[1], 1), 0.5)


@operation
def put(tape: Tape, h: Tensor) -> Tensor:
    cells = tape.shuffle(h.numel())[:2]
    return h.put(cells, tape.param(2), accumulate=tape.choose([True, False]))


@keeps_shape
def slice_scatter(tape: Tape, h: Tensor) -> Tensor:
    return h.slice_scatter(h[:, 1:] * tape.param(), 1, 0, h.shape[1] - 1)


@keeps_shape
def select_scatter(tape: Tape, h: Tensor) -> Tensor:
    return h.select_scatter(h[:, 0] * tape.param(), 1, 1)


@operation
def diagonal_scatter(tape: Tape, h: Tensor) -> Tensor:
    return h.diagonal_scatter(tape.param(min(h.shape)))


@keeps_shape
def write_through_view(tape: Tape, h: Tensor) -> Tensor:
    out = h.clone()
    view = out.T[1:]
    view.mul_(tape.param())
    first, *_ = out.unbind(1)
    return torch.cat([out, first.add(1).unsqueeze(1)], 1)[:, : h.shape[1]]


@keeps_shape
def swap_columns(tape: Tape, h: Tensor) -> Tensor:
    out = h.clone()
    out[:, [0, 1]] = out[:, [1, 0]] * tape.param()
    return out


@keeps_shape
def recurrence(tape: Tape, h: Tensor) -> Tensor:
    out, w = torch.zeros_like(h), tape.param()
    out[:, 0] = h[:, 0]
    for column in range(1, h.shape[1]):
        out[:, column] = h[:, column] + w * out[:, column - 1].clone()
    return out


# Choices by value


@keeps_shape
def where(tape: Tape, h: Tensor) -> Tensor:
    return torch.where(h > 0, h, tape.param(h.shape[1]))


@operation
def where_input(tape: Tape, h: Tensor) -> Tensor:
    return torch.where(tape.mask(*h.shape), h, tape.param(h.shape[1]))


@operation
def masked_fill(tape: Tape, h: Tensor) -> Tensor:
    return (h + tape.param(h.shape[1])).masked_fill(tape.mask(*h.shape), 0.5)


@operation
def masked_scatter(tape: Tape, h: Tensor) -> Tensor:
    return h.masked_scatter(tape.mask(*h.shape), tape.param(*h.shape))


@keeps_shape
def sort(tape: Tape, h: Tensor) -> Tensor:
    return h.sort(tape.axis()).values


@operation
def topk(tape: Tape, h: Tensor) -> Tensor:
    return h.topk(2, 1).values


@keeps_shape
def kthvalue(tape: Tape, h: Tensor) -> Tensor:
    return h - 2 * h.kthvalue(2, 1, keepdim=True).values


@keeps_shape
def median(tape: Tape, h: Tensor) -> Tensor:
    return h - 2 * h.median(tape.axis(), keepdim=True).values


@keeps_shape
def maximum(tape: Tape, h: Tensor) -> Tensor:
    return tape.choose([torch.maximum, torch.minimum])(h, tape.param(h.shape[1]))


@keeps_shape
def amax(tape: Tape, h: Tensor) -> Tensor:
    largest = h.max(tape.axis(), keepdim=True)
    return h + tape.choose([largest.values, h.amin(1, keepdim=True)])


@operation
def argmax_index(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(h.shape[1], 2)[h.argmax(1)].sum(1, keepdim=True)


@keeps_shape
def clamp(tape: Tape, h: Tensor) -> Tensor:
    low = tape.param(h.shape[1])
    return torch.clamp(h, low, low + 1)


@keeps_shape
def cummax(tape: Tape, h: Tensor) -> Tensor:
    return h.cummax(tape.axis()).values


@operation
def max_pool1d(tape: Tape, h: Tensor) -> Tensor:
    return F.max_pool1d(h.unsqueeze(1), 2, stride=1).squeeze(1)


@keeps_shape
def aminmax(tape: Tape, h: Tensor) -> Tensor:
    axis = tape.axis()
    low, high = torch.aminmax(h, dim=axis, keepdim=True)
    if low.grad_fn is not None and "NotImplemented" in low.grad_fn.name():  # in an early torch
        low, high = h.amin(axis, keepdim=True), h.amax(axis, keepdim=True)
    return (h - low) / (1 + high - low)


@keeps_shape
def quantile(tape: Tape, h: Tensor) -> Tensor:
    return h + h.quantile(0.3, dim=tape.axis(), keepdim=True)


@keeps_shape
def mode(tape: Tape, h: Tensor) -> Tensor:
    return h + h.mode(1, keepdim=True).values


# Along a dimension


@keeps_shape
def softmax(tape: Tape, h: Tensor) -> Tensor:
    return h.softmax(tape.axis())


@keeps_shape
def log_softmax(tape: Tape, h: Tensor) -> Tensor:
    return h.log_softmax(tape.axis())


@operation
def logsumexp(tape: Tape, h: Tensor) -> Tensor:
    total = h.logsumexp(1, keepdim=True)
    return tape.choose([total, h + 2 * total])


@keeps_shape
def layer_norm(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return F.layer_norm(h, (n,), tape.param(n), tape.param(n), eps=0.1)


@operation
def group_norm(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    pairs = torch.stack([h, h * tape.param(n)], 2)
    return F.group_norm(pairs, tape.choose([1, n]), tape.param(n), eps=0.1).flatten(1)


@operation
def rms_norm(tape: Tape, h: Tensor) -> Tensor:
    return F.rms_norm(h, (h.shape[1],), tape.param(h.shape[1]), eps=0.1)


@keeps_shape
def standardize(tape: Tape, h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (1 + h.var(0))


@keeps_shape
def batch_norm(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return F.batch_norm(h, None, None, tape.param(n), tape.param(n), training=True, eps=0.1)


@keeps_shape
def center(tape: Tape, h: Tensor) -> Tensor:
    return h - 0.5 * h.mean(tape.axis(), keepdim=True)


@keeps_shape
def spread(tape: Tape, h: Tensor) -> Tensor:
    return h * (0.1 + h.var(tape.axis(), keepdim=True)).sqrt()


@operation
def product(tape: Tape, h: Tensor) -> Tensor:
    return torch.cat([h, h.prod(1, keepdim=True)], 1)


@keeps_shape
def cumsum(tape: Tape, h: Tensor) -> Tensor:
    return h.cumsum(tape.axis())


@keeps_shape
def cumprod(tape: Tape, h: Tensor) -> Tensor:
    return h.cumprod(tape.axis())


@keeps_shape
def logcumsumexp(tape: Tape, h: Tensor) -> Tensor:
    return h.logcumsumexp(tape.axis())


@keeps_shape
def norm(tape: Tape, h: Tensor) -> Tensor:
    return h / (1 + h.norm(dim=tape.axis(), keepdim=True))


@operation
def normalize(tape: Tape, h: Tensor) -> Tensor:
    return F.normalize(h + tape.constant(h.shape[1]), dim=tape.axis())


@operation
def cdist(tape: Tape, h: Tensor) -> Tensor:
    return torch.cdist(h, tape.constant(2, h.shape[1]) + tape.param(2, h.shape[1]))


@operation
def cosine_similarity(tape: Tape, h: Tensor) -> Tensor:
    w = tape.constant(2, h.shape[1]) + tape.param(2, h.shape[1])
    return F.cosine_similarity(h.unsqueeze(1), w, dim=2, eps=0.1)


@keeps_shape
def rfft(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return torch.fft.fft(h, dim=1).abs()[:, :n] + torch.fft.irfft(torch.fft.rfft(h), n)


@operation
def diff(tape: Tape, h: Tensor) -> Tensor:
    return h.diff(dim=1, prepend=tape.param().expand(len(h), 1))


@keeps_shape
def trapezoid(tape: Tape, h: Tensor) -> Tensor:
    return h + torch.trapezoid(h, dim=1).unsqueeze(1)


@operation
def fourier_convolution(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(tape.param(n)), n)


@keeps_shape
def renorm(tape: Tape, h: Tensor) -> Tensor:
    return h.renorm(2, 0, 1.0)


# Shapes


@keeps_shape
def roll(tape: Tape, h: Tensor) -> Tensor:
    rolled = h.roll(1, tape.axis())
    return tape.choose([rolled, rolled + h])


@keeps_shape
def flip(tape: Tape, h: Tensor) -> Tensor:
    flipped = h.flip(tape.axis())
    return tape.choose([flipped, flipped * h])


@operation
def cat(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return torch.cat([h, tape.param(2).expand(len(h), 2)], 1)
    return torch.cat([h, tape.param(1, h.shape[1])])[1:]


@keeps_shape
def stack(tape: Tape, h: Tensor) -> Tensor:
    dim = tape.choose([0, 1, 2])
    pair = torch.stack([h, tape.param(h.shape[1]).expand_as(h)], dim)
    return tape.choose([pair.sum(dim), pair.unbind(dim)[0], pair.prod(dim)])


@keeps_shape
def chunk(tape: Tape, h: Tensor) -> Tensor:
    first, *rest = h.split(1, 1) if tape.choose([True, False]) else h.chunk(2, 1)
    return torch.cat([*rest, first * tape.param()], 1)


@keeps_shape
def transpose(tape: Tape, h: Tensor) -> Tensor:
    return tape.choose([h.T.cumsum(0).T, h.T.contiguous().T, h.T.reshape(h.shape)])


@operation
def permute(tape: Tape, h: Tensor) -> Tensor:
    pairs = torch.stack([h, h * tape.param(h.shape[1])], 2)
    return pairs.permute(0, 2, 1).reshape(len(h), -1)


@keeps_shape
def reshape(tape: Tape, h: Tensor) -> Tensor:
    return h.reshape(-1).flip(0).view(h.shape)


@keeps_shape
def as_strided(tape: Tape, h: Tensor) -> Tensor:
    rows, columns = h.shape
    flat = torch.cat([h.reshape(-1), tape.param(columns)])
    return flat.as_strided((rows, columns), (columns, 1), tape.choose([0, 1, columns]))


@operation
def unfold(tape: Tape, h: Tensor) -> Tensor:
    windows = h.unfold(1, 2, 1)
    return tape.choose([windows.sum(-1), windows.flatten(1)])


@operation
def diag_embed(tape: Tape, h: Tensor) -> Tensor:
    return (h.unsqueeze(1) @ torch.diag_embed(h * tape.param(h.shape[1]))).squeeze(1)


@operation
def diagonal(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(h.shape[1], h.shape[1]).diagonal())


@operation
def tril(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, tape.param(h.shape[1], h.shape[1]).tril())


@operation
def triu(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, tape.param(h.shape[1], h.shape[1]).triu())


@operation
def cross(tape: Tape, h: Tensor) -> Tensor:
    return torch.linalg.cross(F.pad(h, (0, 3))[:, :3] + tape.param(3), tape.param(1, 3))


@operation
def repeat(tape: Tape, h: Tensor) -> Tensor:
    return h.repeat(1, 2) * tape.param(2 * h.shape[1])


@operation
def repeat_interleave(tape: Tape, h: Tensor) -> Tensor:
    return h.repeat_interleave(2, 1) * tape.param(2 * h.shape[1])


@operation
def expand(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, tape.param(tape.width(), 1).expand(-1, h.shape[1]))


@operation
def tile(tape: Tape, h: Tensor) -> Tensor:
    return joined(tape, h, tape.param(1, h.shape[1]).tile(len(h), 1))


@operation
def pad_constant(tape: Tape, h: Tensor) -> Tensor:
    return F.pad(h, (1, 0), value=0.5) * tape.param(h.shape[1] + 1)


@operation
def pad_reflect(tape: Tape, h: Tensor) -> Tensor:
    return F.pad(h.unsqueeze(1), (1, 1), mode="reflect").squeeze(1)


@operation
def meshgrid(tape: Tape, h: Tensor) -> Tensor:
    first, second = torch.meshgrid(tape.param(2), tape.param(h.shape[1]), indexing="ij")
    return F.linear(h, first * second)


@keeps_shape
def half_turn(tape: Tape, h: Tensor) -> Tensor:
    return torch.rot90(h, 2)


@operation
def views(tape: Tape, h: Tensor) -> Tensor:
    deep = torch.stack([h, h * tape.param()], 2).movedim(2, 0).swapaxes(1, 2)
    return torch.hstack(deep.unflatten(0, (1, 2)).squeeze(0).mT.unbind())


@operation
def combinations(tape: Tape, h: Tensor) -> Tensor:
    pairs = torch.combinations(tape.param(3), 2)
    return h.unsqueeze(1).sum(2) + pairs.prod(1)


@operation
def interpolate(tape: Tape, h: Tensor) -> Tensor:
    mode, n = tape.choose(["linear", "nearest"]), 2 * h.shape[1]
    return F.interpolate(h.unsqueeze(1), size=n, mode=mode).squeeze(1) * tape.param(n)


@operation
def unfold_fold(tape: Tape, h: Tensor) -> Tensor:
    columns = F.unfold(h.reshape(len(h), 1, 1, -1), (1, 2)) * tape.param(2, 1)
    return F.fold(columns, (1, h.shape[1]), (1, 2)).flatten(1)


# Convolutions


@operation
def conv1d(tape: Tape, h: Tensor) -> Tensor:
    if tape.choose([True, False]):
        return F.conv1d(h.unsqueeze(1), tape.param(2, 1, 2), tape.param(2)).flatten(1)
    pair = torch.stack([h, h.tanh()], 1)
    return F.conv1d(pair, tape.param(2, 1, 2), groups=2).flatten(1)


@operation
def conv_transpose1d(tape: Tape, h: Tensor) -> Tensor:
    return F.conv_transpose1d(h.unsqueeze(1), tape.param(1, 2, 2)).flatten(1)


@operation
def avg_pool1d(tape: Tape, h: Tensor) -> Tensor:
    return F.avg_pool1d(h.unsqueeze(1), 2, stride=1, padding=1).squeeze(1)


@operation
def conv2d(tape: Tape, h: Tensor) -> Tensor:
    image = torch.stack([h, h.tanh()], 1).unsqueeze(1)
    return F.conv2d(image, tape.param(2, 1, 2, 2)).flatten(1)


# Recurrent networks, attention, and ways to call them


@operation
def gru_cell(tape: Tape, h: Tensor) -> Tensor:
    return tape.module(nn.GRUCell, h.shape[1], 2)(h)


@operation
def lstm_cell(tape: Tape, h: Tensor) -> Tensor:
    return torch.cat(tape.module(nn.LSTMCell, h.shape[1], 2)(h), 1)


@operation
def gru(tape: Tape, h: Tensor) -> Tensor:
    return tape.module(nn.GRU, 1, 2, batch_first=True)(h.unsqueeze(-1))[0][:, -1]


@operation
def lstm(tape: Tape, h: Tensor) -> Tensor:
    return tape.module(nn.LSTM, 1, 2, batch_first=True)(h.unsqueeze(-1))[0].flatten(1)


@operation
def multihead_attention(tape: Tape, h: Tensor) -> Tensor:
    words = h.unsqueeze(-1) * tape.param(2)
    attend = tape.module(nn.MultiheadAttention, 2, 1, batch_first=True)
    return attend(words, words, words, need_weights=tape.choose([True, False]))[0].sum(2)


@operation
def attention(tape: Tape, h: Tensor) -> Tensor:
    words = h.unsqueeze(-1) * tape.param(2)
    keys, causal = words @ tape.param(2, 2), tape.choose([True, False])
    return F.scaled_dot_product_attention(words, keys, words, is_causal=causal).sum(2)


@operation
def vmap(tape: Tape, h: Tensor) -> Tensor:
    w = tape.param(h.shape[1])
    if tape.choose([True, False]):
        return torch.func.vmap(lambda row: row.sin() * w)(h)
    return torch.func.vmap(torch.dot, in_dims=(None, 0))(w, h).unsqueeze(1) + h


@operation
def checkpoint(tape: Tape, h: Tensor) -> Tensor:
    w = tape.param(tape.width(), h.shape[1])
    return checkpointed(lambda h, w: F.linear(h, w).tanh(), h, w, use_reentrant=False)


class Scaled(torch.autograd.Function):
    """h ⊙ w, with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return gradient * w, (gradient * h).sum(0)


@operation
def custom_function(tape: Tape, h: Tensor) -> Tensor:
    return Scaled.apply(h, tape.param(h.shape[1]))


@operation
def functional_call(tape: Tape, h: Tensor) -> Tensor:
    layer = nn.Linear(h.shape[1], 2, device="meta")
    weights = {"weight": tape.weight(2, h.shape[1]), "bias": tape.param(2)}
    return torch.func.functional_call(layer, weights, h)


@operation
def autoregressive(tape: Tape, h: Tensor) -> Tensor:
    w = tape.param(h.shape[1], h.shape[1])
    columns = [h[:, 0]]
    for i in range(1, h.shape[1]):
        columns.append(h[:, i] + torch.stack(columns, 1).tanh() @ w[i, :i])
    return torch.stack(columns, 1)


@operation
def derivative(tape: Tape, h: Tensor) -> Tensor:
    w = tape.param(h.shape[1])
    return torch.func.vmap(torch.func.grad(lambda row: (row * w).sin().sum()))(h)


@operation
def energy_gradient(tape: Tape, h: Tensor) -> Tensor:
    x = h * tape.param(h.shape[1])
    energy = (F.linear(x, tape.param(2, h.shape[1])).tanh() ** 2).sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    return h + gradient


@operation
def nested_vmap(tape: Tape, h: Tensor) -> Tensor:
    distance = torch.func.vmap(lambda x, y: (x - y).square().sum(), in_dims=(None, 0))
    return torch.func.vmap(distance, in_dims=(0, None))(h, tape.param(2, h.shape[1]))


@operation
def parametrized(tape: Tape, h: Tensor) -> Tensor:
    def layer(size: int) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(size, 2))

    return tape.module(layer, h.shape[1])(h)


@operation
def sequential(tape: Tape, h: Tensor) -> Tensor:
    def layers(size: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size, 3), nn.LayerNorm(3), nn.SiLU(), nn.Linear(3, 2))

    return tape.module(layers, h.shape[1])(h)


@operation
def transformer(tape: Tape, h: Tensor) -> Tensor:
    words = h.unsqueeze(-1) * tape.param(2)
    options = {"dim_feedforward": 2, "dropout": 0.0, "batch_first": True}
    return tape.module(nn.TransformerEncoderLayer, 2, 1, **options)(words).sum(2)


# Linear algebra


@operation
def cholesky(tape: Tape, h: Tensor) -> Tensor:
    return F.linear(h, torch.linalg.cholesky(positive_definite(tape, h.shape[1])))


@operation
def solve_triangular(tape: Tape, h: Tensor) -> Tensor:
    factor = tape.param(h.shape[1], h.shape[1]).tril(-1) + 2 * torch.eye(h.shape[1])
    return torch.linalg.solve_triangular(factor, h.T, upper=False).T


@operation
def inverse(tape: Tape, h: Tensor) -> Tensor:
    return h @ torch.linalg.inv(positive_definite(tape, h.shape[1]))


@operation
def solve(tape: Tape, h: Tensor) -> Tensor:
    return torch.linalg.solve(positive_definite(tape, h.shape[1]), h.T).T


@operation
def logdet(tape: Tape, h: Tensor) -> Tensor:
    return h * (1 + positive_definite(tape, 2).logdet())


@operation
def eigenvalues(tape: Tape, h: Tensor) -> Tensor:
    distinct = torch.diag(torch.arange(float(h.shape[1])))
    return h * torch.linalg.eigvalsh(positive_definite(tape, h.shape[1]) + distinct)


@operation
def qr(tape: Tape, h: Tensor) -> Tensor:
    q, r = torch.linalg.qr(tape.param(h.shape[1], h.shape[1]) + 2 * torch.eye(h.shape[1]))
    return h @ tape.choose([q, r])


@operation
def matrix_exp(tape: Tape, h: Tensor) -> Tensor:
    return h @ torch.matrix_exp(tape.param(h.shape[1], h.shape[1]))


@operation
def svd(tape: Tape, h: Tensor) -> Tensor:
    matrix = tape.param(2, 2) + torch.diag(torch.tensor([2.0, 5.0]))
    return h.unsqueeze(1).mean(2) + torch.linalg.svdvals(matrix)


@operation
def batched_cholesky(tape: Tape, h: Tensor) -> Tensor:
    outer = h.unsqueeze(2) * h.unsqueeze(1) + torch.eye(h.shape[1])
    return (torch.linalg.cholesky(outer) @ tape.param(h.shape[1], 1)).squeeze(2)


# Constraints


@keeps_shape
def positive(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(h.shape[1], constraint=constraints.positive)


@operation
def simplex(tape: Tape, h: Tensor) -> Tensor:
    return h @ tape.param(h.shape[1], tape.width(), constraint=constraints.simplex)


@operation
def simplex_table(tape: Tape, h: Tensor) -> Tensor:
    t = tape.param(3, h.shape[1], constraint=constraints.simplex)
    return joined(tape, h, t[tape.index(3, len(h))].log())


@keeps_shape
def unit_interval(tape: Tape, h: Tensor) -> Tensor:
    return h * tape.param(h.shape[1], constraint=constraints.unit_interval)


@operation
def lower_cholesky(tape: Tape, h: Tensor) -> Tensor:
    n = h.shape[1]
    return F.linear(h, tape.param(n, n, constraint=constraints.lower_cholesky))


ALONE = [chain for name in sorted(OPERATIONS) for chain in ([name], ["by_elements", name])]
"""Chains of one operation each, also after parameters that can be told apart."""


# --- families ----------------------------------------------------------------------------------


def above_zero(h: Tensor) -> Tensor:
    return torch.asinh(h).exp()


def below_one(h: Tensor) -> Tensor:
    return torch.asinh(h).sigmoid()


def second(tape: Tape, h: Tensor) -> Tensor:
    """A positive second parameter for every column of h."""
    kind = tape.choose(["constant", "parameter", "flipped", "linear"])
    if kind == "constant":
        return torch.full_like(h, 0.7)
    if kind == "parameter":
        return tape.param(h.shape[1], constraint=constraints.positive)
    if kind == "flipped":
        return above_zero(h.flip(1))
    return above_zero(F.linear(h, tape.weight(h.shape[1], h.shape[1])))


def scalars(*coordinates: Tensor) -> list[Tensor]:
    """Every element of every tensor is a group of its own."""
    return [tensor.reshape(-1, 1) for tensor in coordinates]


def together(*coordinates: Tensor) -> list[Tensor]:
    """The elements at one place of the tensors are a group."""
    stacked = torch.stack(torch.broadcast_tensors(*coordinates), -1)
    return [stacked.flatten(0, -2)]


def bernoulli_logits(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    return dist.Bernoulli(logits=h), scalars(h)


def bernoulli_probs(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    probs = below_one(h)
    return dist.Bernoulli(probs), scalars(probs)


def binomial(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    return dist.Binomial(3, logits=h), scalars(h)


def categorical(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    if tape.choose([True, False]):
        return dist.Categorical(logits=h), [h]
    probs = above_zero(h)
    return dist.Categorical(probs), [probs]


def one_hot_categorical(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    if tape.choose([True, False]):
        return dist.OneHotCategorical(logits=h), [h]
    probs = h.softmax(1)
    return dist.OneHotCategorical(probs), [probs]


def normal(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    scale = second(tape, h)
    return dist.Normal(h, scale), scalars(h, scale)


def log_normal(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    loc, scale = torch.asinh(h), second(tape, h)
    return dist.LogNormal(loc, scale), scalars(loc, scale)


def gamma(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    concentration, rate = above_zero(h), second(tape, h)
    return dist.Gamma(concentration, rate), together(concentration, rate)


def beta(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    concentrations = above_zero(h), second(tape, h)
    return dist.Beta(*concentrations), together(*concentrations)


def poisson(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    rate = above_zero(h)
    return dist.Poisson(rate), scalars(rate)


def exponential(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    rate = above_zero(h)
    return dist.Exponential(rate), scalars(rate)


def multivariate_normal(tape: Tape, h: Tensor) -> tuple[dist.Distribution, list[Tensor]]:
    n = h.shape[1]
    kind = tape.choose(["parameter", "second", "covariance"])
    if kind == "covariance":
        covariance = positive_definite(tape, n)
        return dist.MultivariateNormal(h, covariance), [h, covariance.reshape(1, -1)]
    factor = tape.param(n, n, constraint=constraints.lower_cholesky)
    if kind == "second":
        factor = factor.tril(-1) + torch.diag_embed(second(tape, h))
    distribution = dist.MultivariateNormal(h, scale_tril=factor)
    return distribution, [h, factor.reshape(-1, n * n)]


FAMILIES: dict[str, Family] = {
    function.__name__: function
    for function in (
        *(bernoulli_logits, bernoulli_probs, binomial, categorical, one_hot_categorical, normal),
        *(log_normal, gamma, beta, poisson, exponential, multivariate_normal),
    )
}
"""Name → (distribution, its Fisher-orthogonal groups of coordinates as rows)."""
SCALAR_FAMILIES = "bernoulli_logits bernoulli_probs binomial normal poisson exponential".split()
"""Those that join no coordinates: what an operation joins is seen through them."""


# --- the check ---------------------------------------------------------------------------------


def dependence(program: Program) -> Tensor:
    """Which groups depend on which entries at one draw: `[groups, entries]`, boolean."""
    coordinates = program.coordinates()
    leaves = [leaf for _, leaf in program.leaves()]
    rows = []
    for groups in coordinates:
        if not groups.requires_grad:
            continue
        # A random combination of a group's coordinates depends on what any of them depends on.
        for group in (groups * program.randn(*groups.shape)).sum(1):
            found = torch.autograd.grad(group, leaves, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in found]))
    jacobian = torch.stack(rows)
    if not jacobian.isfinite().all():
        raise FloatingPointError(f"program {program.seed} has no finite derivatives")
    return jacobian.abs() > TOLERANCE * max(1.0, jacobian.abs().max().item())


def finest_partition(dependences: Tensor) -> Tensor:
    """Connected components of entries that some group depends on together; -1 where none does."""
    labels = torch.arange(dependences.shape[1])
    for row in dependences.unique(dim=0):
        if row.any():
            members = labels[row].unique()
            labels[torch.isin(labels, members)] = members[0]
    return labels.masked_fill(~dependences.any(0), -1)


def split_rows(dependences: Tensor, blocks: Tensor) -> Tensor:
    """Rows whose entries are not all in one block, `[rows]`, boolean."""
    lowest = torch.where(dependences, blocks, blocks.max()).amin(1)
    highest = torch.where(dependences, blocks, -1).amax(1)
    return dependences.any(1) & ((lowest != highest) | (lowest < 0))


def num_blocks(dependences: Tensor, blocks: Tensor) -> int:
    """Number of blocks among the entries that anything depends on."""
    return len(blocks[dependences.any(0)].unique())


def entry_blocks(net: BayesNet, program: Program) -> Tensor:
    """The block unit of every entry of every parameter, in one row; -1 where there is none."""
    found = pyronat.testing.entry_blocks(net)
    ids = [
        found[name].reshape(-1) if name in found else torch.full((leaf.numel(),), -1)
        for name, leaf in program.leaves()
    ]
    return torch.cat(ids)


def entry_names(program: Program) -> list[str]:
    """A name for every entry, such as `p0[1, 2]`."""
    return [
        f"{name}{[int(i) for i in torch.unravel_index(torch.tensor(k), leaf.shape)]}"
        for name, leaf in program.leaves()
        for k in range(leaf.numel())
    ]


@dataclass(frozen=True)
class Verdict:
    """What the check says of one program.

    Attributes:
        seed: of the program.
        operations: in the program.
        families: of its sites.
        blocks: number of blocks of the net, among entries with a derivative.
        finest: number of blocks of the finest partition found, among the same entries.
        violation: entries that depend on each other and are in different blocks, or "".
        error: what the analysis raised, or "".
    """

    seed: int
    operations: tuple[str, ...]
    families: tuple[str, ...]
    blocks: int
    finest: int
    violation: str = ""
    error: str = ""

    @property
    def is_finest(self) -> bool:
        return self.blocks == self.finest and not self.violation and not self.error


def check(program: Program, draws: int = DRAWS, more_draws: int = MORE_DRAWS) -> Verdict:
    """Analyzes a program once and compares its blocks with what several draws depend on."""
    about = program.seed, program.operations, program.families
    try:
        with torch.random.fork_rng():
            torch.manual_seed(program.seed)
            net = pyronat.analyze(program.model, *program.args)
    except Exception as error:  # whatever it is, it is a finding
        return Verdict(*about, 0, 0, error=f"{type(error).__name__}: {error}".split("\n")[0])
    blocks = entry_blocks(net, program)
    found = torch.cat([dependence(program) for _ in range(draws)]).unique(dim=0)
    for _ in range(more_draws):
        if num_blocks(found, blocks) >= num_blocks(found, finest_partition(found)):
            break
        found = torch.cat([found, dependence(program)]).unique(dim=0)
    finest = num_blocks(found, finest_partition(found))
    split = found[split_rows(found, blocks)]
    violation = ""
    if len(split):
        names = entry_names(program)
        entries = split[0].nonzero().reshape(-1).tolist()
        violation = ", ".join(f"{names[entry]} in {blocks[entry]}" for entry in entries)
    return Verdict(*about, num_blocks(found, blocks), finest, violation)


# --- the long run ------------------------------------------------------------------------------


def report(verdicts: Sequence[Verdict], seconds: float) -> Iterable[str]:
    """The counts of a run, failures, and operations in programs that are coarser than finest."""
    sound = [verdict for verdict in verdicts if not verdict.violation and not verdict.error]
    operations = {name for verdict in verdicts for name in verdict.operations}
    finest = sum(verdict.is_finest for verdict in sound)
    several = sum(verdict.finest > 1 for verdict in sound)
    yield (
        f"programs {len(verdicts)}, of several blocks {several}, operations {len(operations)}, "
        f"violations {sum(bool(verdict.violation) for verdict in verdicts)}, "
        f"errors {sum(bool(verdict.error) for verdict in verdicts)}, "
        f"finest {finest} ({finest / max(1, len(sound)):.1%}), {seconds:.0f} s"
    )
    for verdict in verdicts:
        if verdict.violation or verdict.error:
            yield (
                f"  seed {verdict.seed}: {', '.join(verdict.operations)} → "
                f"{', '.join(verdict.families)}: {verdict.violation or verdict.error}"
            )
    yield "coarser than finest, by operation and by family:"
    for kind in ("operations", "families"):
        total = Counter(name for verdict in sound for name in set(getattr(verdict, kind)))
        coarse = Counter(
            name
            for verdict in sound
            if not verdict.is_finest
            for name in set(getattr(verdict, kind))
        )
        for name in sorted(coarse, key=lambda name: -coarse[name] / total[name]):
            yield f"  {name}: {coarse[name]} of {total[name]} ({coarse[name] / total[name]:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--alone", type=int, default=0, help="programs of each operation alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    seeds = range(options.first_seed, options.first_seed + (options.alone or options.programs))
    chains = ALONE if options.alone else [None]
    start = time.perf_counter()
    verdicts = [
        check(random_program(seed, chain), options.draws) for chain in chains for seed in seeds
    ]
    print("\n".join(report(verdicts, time.perf_counter() - start)))


if __name__ == "__main__":
    main()
