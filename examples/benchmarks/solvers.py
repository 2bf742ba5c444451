"""What solving with the Fisher information of a layer costs, and how exact it is, by solver.

A layer has n data with inputs a of size d, and H units. Two kinds of blocks are solved with, at the
default damping and with gradients of other data, in float32 on one thread:

* units: (Σ_n w_nu a_n a_nᵀ + λ_u) x_u = g_u for every unit u of a Bernoulli layer by itself, held
  by matrices ("unit"), as rows ("cg"), in one basis ("shared") or by diagonals;
* joint: (Σ_n r_n r_nᵀ + λ) x = g with r_n = δ_n ⊗ a_n, a layer of a network in which δ flows back,
  held as a matrix ("dense"), as rows ("dual", "cg"), in Kronecker factors or by its diagonal.

Inputs are binary and correlated. In an early layer all weights w are about ¼, in a late one most
units are saturated and weights range over orders of magnitude. Seconds, of processor time, are

* those to form, factor and solve once, over the same by a plain batched Cholesky factorization of
  all matrices, formed by one batched product;
* those of the last part alone, a solve with what has been factored, in pairs of products: forward
  and backward through the layer, the least that a step does.

The error is that of the solution against the exact one, in the norm of the damped matrix, in which
its square is the part of the gain that is lost.

Run it as `python -m examples.benchmarks.solvers`, or with `--quick` for small shapes. It prints a
table, and writes the numbers to a file if `--json` names one.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from examples.benchmarks import files
from examples.comparison import markdown
from pyronat.conjugate_gradients import IterativeUnits
from pyronat.factored import Outer, Rows
from pyronat.kronecker import Kronecker
from pyronat.operators import BlockMatrix, BlockOperator, Diagonal
from pyronat.shared import SharedUnits
from pyronat.steps import LeverageDamping
from pyronat.unit_rows import UnitRows, gram

RATE = 0.1
"""The default one, which damping depends on."""
LARGEST = 4096
"""Entries of a joint block up to which its matrix is formed."""
AT_ONCE = 2**25
"""Numbers in the matrices that are formed at once for reference."""
REPEATS = 3
SHAPES = {
    "units": ((100, 65, 64), (1000, 101, 200), (200, 201, 784), (500, 785, 200)),
    "joint": ((200, 33, 32), (200, 65, 32), (200, 785, 20)),
}
QUICK = {"units": ((30, 9, 8),), "joint": ((20, 9, 4),)}
SPREAD = {"early": 0.3, "late": 5.0}
"""Standard deviation of logits."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Layer:
    """A linear system of a layer.

    Attributes:
        inputs: a `[data, size]`.
        weights: w, the Fisher information of each unit `[data, units]`.
        signs: of what flows back `[data, units]`.
        gradient: g `[units, size]`.
    """

    inputs: Tensor
    weights: Tensor
    signs: Tensor
    gradient: Tensor

    @property
    def flowing(self) -> Tensor:
        """δ of a joint block `[data, units]`."""
        return self.signs * self.weights.sqrt()


def make_layer(shape: tuple[int, int, int], phase: str) -> Layer:
    """Draws a layer.

    Args:
        shape: Data, size of the inputs and number of units.
        phase: "early" or "late".

    Returns:
        The layer.
    """
    count, size, units = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*lengths: int) -> Tensor:
        return torch.randn(*lengths, generator=generator)

    causes, offsets = normal(10, size - 1), normal(size - 1) - 0.5
    total = count + 100
    hidden = (normal(total, 10) @ causes / 2 + normal(total, size - 1) + offsets > 0).float()
    inputs = torch.cat([hidden, torch.ones(total, 1)], 1)
    spread = SPREAD[phase]
    logits = inputs @ normal(size, units) * spread / size**0.5 + spread * normal(units)
    means = logits.sigmoid()
    values = torch.bernoulli(means, generator=generator)
    signs = torch.randint(2, (count, units), generator=generator) * 2.0 - 1
    # Rounding leaves no weight of a saturated unit at exactly 0.
    weights = (means * (-logits).sigmoid())[:count].clamp_min(1e-12)
    gradient = (means - values)[count:].mT @ inputs[count:]
    return Layer(inputs[:count], weights, signs, gradient)


@dataclass(frozen=True)
class System:
    """A block of a layer, and its ways to be held.

    Attributes:
        damping: λ `[count]` of its vectors.
        gradient: g `[count, size]`.
        product: x → (G + λ) x without any matrix, for float64.
        exact: the solution in float64.
        naive: solves by plain batched Cholesky, or None where that is too large.
        held: makes the block, by structure.
        shapes: the shape of vectors, where a structure has another one.
    """

    damping: Tensor
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    exact: Tensor
    naive: Callable[[], Tensor] | None
    held: Mapping[str, Callable[[], BlockOperator]]
    shapes: Mapping[str, tuple[int, int]]

    def factored(self, structure: str) -> Callable[[], Tensor]:
        """Holds the block in a structure and factors it; what comes back solves with it."""
        operator = self.held[structure]()
        like = self.gradient.reshape(self.shapes.get(structure, self.gradient.shape))
        damping = operator.usable(self.damping.expand(len(like)))
        factor = operator.factor(damping)
        return lambda: factor.solve(like).reshape(self.gradient.shape)

    def error(self, found: Tensor) -> float:
        """Of a solution, in the norm of G + λ, relative to the exact one."""
        wrong = found.double() - self.exact
        error, whole = ((x * self.product(x)).sum() for x in (wrong, self.exact))
        return float((error / whole).sqrt())


def units(layer: Layer) -> System:
    """Every unit by itself."""
    inputs, weights, gradient = layer.inputs, layer.weights, layer.gradient
    diagonal = weights.mT @ inputs.square()
    leverage = 0.25 * inputs.square().sum(1).mean().expand(len(gradient))
    damping = LeverageDamping()(diagonal.mean(1), leverage, RATE)
    a, w, strength = inputs.double(), weights.double(), damping.double().unsqueeze(1)

    def naive(a: Tensor, w: Tensor, damping: Tensor, right: Tensor) -> Tensor:
        found = []
        some = max(AT_ONCE // a.shape[1] ** 2, 1)
        parts = (w.split(some, 1), damping.split(some), right.split(some))
        for weight, strength, part in zip(*parts, strict=True):
            matrix = (a.mT * weight.mT.unsqueeze(1)) @ a
            matrix.diagonal(dim1=1, dim2=2).add_(strength.unsqueeze(1))
            lower = torch.linalg.cholesky(matrix)
            found.append(torch.cholesky_solve(part.unsqueeze(2), lower).squeeze(2))
        return torch.cat(found)

    return System(
        damping,
        gradient,
        lambda x: (w * (a @ x.mT)).mT @ a + strength * x,
        naive(a, w, damping.double(), gradient.double()),
        lambda: naive(inputs, weights, damping, gradient),
        {
            "unit": lambda: BlockMatrix(gram(weights, inputs)),
            "cg": lambda: IterativeUnits(UnitRows(weights, inputs)),
            "shared": lambda: SharedUnits(UnitRows(weights, inputs)),
            "diagonal": lambda: Diagonal(weights.mT @ inputs.square()),
        },
        {},
    )


def joint(layer: Layer) -> System:
    """All units in one block."""
    inputs, flowing = layer.inputs, layer.flowing
    shape, gradient = (flowing.shape[1], inputs.shape[1]), layer.gradient.reshape(1, -1)

    def rows(method: str, dtype: torch.dtype = torch.float32) -> Rows:
        piece = Outer(flowing.to(dtype), inputs.to(dtype), columns=False)
        return Rows((piece,), "cg" if method == "cg" else "dual", len(inputs))

    def kronecker(corrected: bool) -> Kronecker:
        kept = (flowing.unsqueeze(1), inputs.unsqueeze(1)) if corrected else None
        count = torch.tensor(float(len(inputs)))
        return Kronecker(inputs.mT @ inputs / count, flowing.mT @ flowing, count, kept)

    def explicit() -> Tensor:
        wide = (flowing.unsqueeze(2) * inputs.unsqueeze(1)).flatten(1)
        return (wide.mT @ wide).unsqueeze(0)

    def naive() -> Tensor:
        matrix = explicit()
        matrix.diagonal(dim1=1, dim2=2).add_(damping)
        return torch.cholesky_solve(gradient.unsqueeze(2), torch.linalg.cholesky(matrix)).squeeze(2)

    oracle = rows("dual", torch.float64)
    leverage = (flowing.square().sum(1) * inputs.square().sum(1)).mean().unsqueeze(0)
    damping = LeverageDamping()(oracle.mean_diagonal().float(), leverage, RATE)
    small = gradient.numel() <= LARGEST
    dense = {"dense": lambda: BlockMatrix(explicit())} if small else {}
    return System(
        damping,
        gradient,
        lambda x: oracle.mv(x) + damping.double() * x,
        oracle.factor(damping.double()).solve(gradient.double()),
        naive if small else None,
        {
            **dense,
            "dual": lambda: rows("dual"),
            "cg": lambda: rows("cg"),
            "kronecker": lambda: kronecker(True),
            "kfac": lambda: kronecker(False),
            "diagonal": lambda: Diagonal(oracle.diagonal().float().unsqueeze(0)),
        },
        {"kronecker": shape, "kfac": shape},
    )


KINDS: dict[str, Callable[[Layer], System]] = {"units": units, "joint": joint}


@dataclass(frozen=True)
class Result:
    """A solver on a block.

    Attributes:
        kind: "units" or "joint".
        shape: Data, size of the inputs and number of units.
        phase: "early" or "late".
        structure: How the block is held.
        relative: Seconds to form, factor and solve once, over those of plain Cholesky, or None
            where that is too large.
        pairs: The same in pairs of products through the layer.
        solve: A solve with what has been factored, in pairs.
        error: Of the solution, in the norm of the damped matrix.
    """

    kind: str
    shape: tuple[int, int, int]
    phase: str
    structure: str
    relative: float | None
    pairs: float
    solve: float
    error: float


def timed(function: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds of processor time of one call, and what it returns."""
    begin = time.process_time()
    found = function()
    return time.process_time() - begin, found


def pair(layer: Layer) -> float:
    """Seconds of one product forward through the layer and one backward."""
    repeats = 20
    weight = layer.gradient

    def work() -> None:
        for _ in range(repeats):
            layer.signs.mT @ layer.inputs
            layer.inputs @ weight.mT

    return timed(work)[0] / repeats


def measure(kind: str, shape: tuple[int, int, int], phase: str, repeats: int) -> list[Result]:
    """Solves with a block by all that it can be held in, by turns.

    Args:
        kind: "units" or "joint".
        shape: Data, size of the inputs and number of units.
        phase: "early" or "late".
        repeats: How often.

    Returns:
        Medians by structure.
    """
    layer = make_layer(shape, phase)
    system = KINDS[kind](layer)
    names, errors = list(system.held), dict.fromkeys(system.held, 0.0)
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        unit = max(pair(layer), 1e-7)
        plain = None if system.naive is None else timed(system.naive)[0]
        for name in names:
            seconds, solve = timed(partial(system.factored, name))
            once, found = timed(solve)
            again = timed(solve)[0]
            errors[name] = system.error(found)
            whole = seconds + once
            ratio = 0.0 if plain is None else whole / max(plain, 1e-9)
            rows[name].append((ratio, whole / unit, again / unit))
    results = []
    for name in names:
        relative, pairs, solve = map(statistics.median, zip(*rows[name], strict=True))
        known = None if system.naive is None else relative
        results.append(Result(kind, shape, phase, name, known, pairs, solve, errors[name]))
    return results


def run(shapes: Mapping[str, Sequence[tuple[int, int, int]]], repeats: int) -> list[Result]:
    """Measures all kinds of blocks on all shapes, early and late.

    Args:
        shapes: By kind.
        repeats: How often.

    Returns:
        What was found.
    """
    return [
        result
        for kind, some in shapes.items()
        for shape in some
        for phase in SPREAD
        for result in measure(kind, shape, phase, repeats)
    ]


def table(results: Sequence[Result]) -> str:
    """The solvers as a table in Markdown."""
    header = ["block", "data, size, units", "layer", "held as", "of plain Cholesky"]
    rows = [[*header, "pairs", "a further solve", "error"]]
    for result in results:
        rows.append([
            result.kind,
            ", ".join(map(str, result.shape)),
            result.phase,
            result.structure,
            "–" if result.relative is None else f"{result.relative:.3f}",
            f"{result.pairs:.0f}",
            f"{result.solve:.1f}",
            f"{result.error:.1e}" if result.error < 1e-3 else f"{result.error:.3f}",
        ])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    parser = files.parser("Cost and error of solvers of a layer.", "small shapes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(QUICK if options.quick else SHAPES, REPEATS)
    print(table(results))
    if options.json is not None:
        files.write(options.json, repeats=REPEATS, results=[asdict(result) for result in results])


if __name__ == "__main__":
    main()
