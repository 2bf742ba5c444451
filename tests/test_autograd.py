"""Linear units against brute-force Jacobians: what is accepted must be exactly right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyronat import autograd
from pyronat.autograd import (
    ELEMENTWISE,
    ORDER_KEEPING,
    TRANSPOSING,
    LinearUnits,
    SampleGate,
    edge_of,
    leaves,
    linear_units,
)
from pyronat.jacobians import jacobian

EXACT = 1e-12


class Net:
    """Leaves and inputs of one small graph; square shapes, so that transposition is not caught."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def leaf(*shape: int) -> Tensor:
            return randn(*shape).requires_grad_()

        self.W, self.V, self.U = leaf(3, 3), leaf(3, 3), leaf(4, 3)
        self.b, self.c, self.r, self.s = leaf(3), leaf(3), leaf(1, 3), leaf(3, 1)
        self.m, self.cube, self.scalar, self.four = leaf(3, 3), leaf(2, 3, 3), leaf(), leaf(4)
        self.p = torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_()
        self.x, self.y, self.k = randn(3, 3), randn(3, 3), randn(3, 3)
        self.batch, self.long = randn(2, 3, 3), randn(5, 3)

    @property
    def leaves(self) -> list[Tensor]:
        found = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return [value for value in found if value.requires_grad and value.is_leaf]


def true_jacobian(theta: Tensor, params: Sequence[Tensor]) -> Tensor:
    """One backward pass for each element `[theta.numel(), params]`."""
    rows = []
    for element in theta.reshape(-1):
        gradients = torch.autograd.grad(element, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([
                torch.zeros_like(param).reshape(-1) if g is None else g.reshape(-1)
                for param, g in zip(params, gradients, strict=True)
            ])
        )
    return torch.stack(rows)


def implied_jacobian(theta: Tensor, units: LinearUnits, params: Sequence[Tensor]) -> Tensor:
    """What linear units say ∂θ/∂params is, θ_nu = f_nu(Σ_i a_ni W_ui), entry by entry."""
    full = {id(param): torch.zeros(theta.numel(), *param.shape) for param in params}
    assert theta.numel() % (units.rows * units.units) == 0
    slope = units.slope
    if slope is not None:
        assert slope.shape == (theta.numel() // units.units, units.units)
    for term in units.terms:
        assert term.inputs.shape[0] == units.rows and not term.inputs.requires_grad
        for flat in range(theta.numel()):
            row, unit = divmod(flat, units.units)
            place = row % units.rows if units.places is None else units.places[row]
            derivative = term.inputs[place]
            derivative = derivative if slope is None else slope[row, unit] * derivative
            target = full[id(term.leaf)][flat]
            by_unit = target.mT if term.unit_axes == (1,) else target.reshape(units.units, -1)
            by_unit[unit] += derivative
    return torch.cat([full[id(param)].reshape(theta.numel(), -1) for param in params], 1)


def check(theta: Tensor, units: LinearUnits, params: Sequence[Tensor]) -> float:
    """Largest error of the implied Jacobian."""
    truth = true_jacobian(theta, params)
    return float((implied_jacobian(theta, units, params) - truth).abs().max())


Builder = Callable[[Net], Tensor]

RECOGNIZED: dict[str, Builder] = {
    "F.linear": lambda n: F.linear(n.x, n.W, n.b),
    "F.linear without bias": lambda n: F.linear(n.x, n.W),
    "F.linear wide": lambda n: F.linear(n.long, n.U, n.four),
    "F.linear 3-D": lambda n: F.linear(n.batch, n.W, n.b),
    "F.linear 3-D without bias": lambda n: F.linear(n.batch, n.W),
    "F.linear of a vector": lambda n: F.linear(n.x[0], n.W, n.b),
    "x @ W": lambda n: n.x @ n.W,
    "x @ W.T": lambda n: n.x @ n.W.T,
    "x @ W.mT": lambda n: n.x @ n.W.mT,
    "x @ W.mH": lambda n: n.x @ n.W.mH,
    "x @ W.T.T": lambda n: n.x @ n.W.T.T,
    "x @ W.t().mT.t()": lambda n: n.x @ n.W.t().mT.t(),
    "x @ permute": lambda n: n.x @ n.W.permute(1, 0),
    "x @ permute negative": lambda n: n.x @ n.W.permute(-1, -2),
    "x @ permute identity": lambda n: n.x @ n.W.permute(0, 1),
    "x @ permute identity negative": lambda n: n.x @ n.W.permute(-2, -1),
    "x @ transpose": lambda n: n.x @ n.W.transpose(0, 1),
    "x @ transpose negative": lambda n: n.x @ n.W.transpose(-1, -2),
    "x @ transpose mixed": lambda n: n.x @ n.W.transpose(0, -1),
    "x @ transpose identity": lambda n: n.x @ n.W.transpose(0, -2),
    "x @ permute of transpose": lambda n: n.x @ n.W.T.permute(1, 0),
    "wide x @ W.T": lambda n: n.long @ n.U.T,
    "x.T @ W": lambda n: n.x.T @ n.W,
    "torch.mm": lambda n: torch.mm(n.x, n.W),
    "torch.addmm": lambda n: torch.addmm(n.b, n.x, n.W),
    "torch.addmm of constants": lambda n: torch.addmm(n.k, n.x, n.W),
    "torch.addmm with a row": lambda n: torch.addmm(n.r, n.x, n.W),
    "matmul 3-D": lambda n: torch.matmul(n.batch, n.W.mT) + n.b,
    "bias first": lambda n: n.b + n.x @ n.W,
    "two biases": lambda n: n.x @ n.W + n.b + n.r,
    "constant added": lambda n: n.x @ n.W + n.k,
    "two heads": lambda n: n.x @ n.W + n.y @ n.V.T + n.b,
    "two heads of F.linear": lambda n: F.linear(n.x, n.W, n.b) + F.linear(n.y, n.V, n.c),
    "same inputs twice": lambda n: F.linear(n.x, n.W, n.b) + F.linear(n.x, n.V, n.c),
    "sigmoid": lambda n: F.linear(n.x, n.W, n.b).sigmoid(),
    "softplus": lambda n: F.softplus(F.linear(n.x, n.W, n.b)),
    "scaled shifted": lambda n: 0.3 + 0.5 * F.linear(n.x, n.W, n.b).tanh(),
    "constant factor by element": lambda n: n.k * (n.x @ n.W),
    "constant factor by row": lambda n: n.k[:, :1] * (n.x @ n.W),
    "product of two functions": lambda n: (h := n.x @ n.W).sigmoid() * h.exp(),
    "minus": lambda n: 1 - F.linear(n.x, n.W, n.b),
    "residual of itself": lambda n: (h := F.linear(n.x, n.W)) + h.tanh(),
    "in-place function": lambda n: F.linear(n.x, n.W).add_(1.0).sigmoid_(),
    "logits of probs": lambda n: dist.Bernoulli(probs=(n.x @ n.W).sigmoid()).logits,
    "logits": lambda n: dist.Bernoulli(logits=F.linear(n.x, n.W, n.b)).logits,
    "reshaped": lambda n: (n.x @ n.W).reshape(9).sigmoid().reshape(3, 3),
    "flattened": lambda n: F.linear(n.batch, n.W, n.b).flatten(),
    "expanded over leading dims": lambda n: F.linear(n.x, n.W, n.b).expand(4, 2, 3, 3),
    "expanded with ones": lambda n: F.linear(n.x[:1], n.W, n.b).expand(4, 3),
    "function of expanded": lambda n: F.linear(n.x, n.W).sigmoid().expand(2, 3, 3).exp(),
    "expanded twice": lambda n: (n.x @ n.W).expand(2, 3, 3).exp().expand(2, 2, 3, 3),
    "expanded factor": lambda n: (n.x @ n.W).expand(2, 3, 3) * n.batch,
    "expanded distribution": lambda n: dist.Bernoulli(logits=n.x @ n.W).expand_by([2]).logits,
    "parameter": lambda n: n.b,
    "parameter matrix": lambda n: n.m,
    "parameter elementwise": lambda n: n.cube.exp(),
    "parameter expanded": lambda n: n.b.expand(4, 3),
    "parameter expanded elementwise": lambda n: n.cube.tanh().expand(2, 2, 3, 3).exp(),
    "parameter shifted by row": lambda n: n.b + n.k,
    "constrained parameter": lambda n: n.p.log() - (-n.p).log1p(),
    "scalar": lambda n: n.scalar,
    "scalar expanded": lambda n: n.scalar.exp().expand(3, 2),
    "one output": lambda n: n.x @ n.s,
    "detached inputs": lambda n: F.linear((n.y @ n.V).detach(), n.W, n.b),
    "tanh inputs, detached": lambda n: F.linear((n.y @ n.V).tanh().detach(), n.W, n.b).tanh(),
    "last expansion of units": lambda n: (n.x @ n.s).expand(3, 4),
    "function of a parameter, broadcast": lambda n: n.b.exp() * n.k,
    "function of one row, broadcast": lambda n: (n.x[:1] @ n.W).exp() * n.k,
    "function of one unit, broadcast": lambda n: (n.x @ n.s).exp() * n.k,
    "expanded in the middle": lambda n: F.linear(n.batch[:, :1], n.W, n.b).expand(2, 4, 3),
    "expanded at both ends": lambda n: (
        F.linear(n.batch[:, :1], n.W).exp().expand(2, 2, 2, 3).tanh()
    ),
    "constants by row, broadcast": lambda n: F.linear(n.batch[:, :1], n.W).exp() + n.k * n.x,
    "two ways, broadcast alike": lambda n: (
        (h := n.batch[:, :1] @ n.W).tanh() * n.k + h.expand(2, 3, 3)
    ),
    "clamped": lambda n: (n.x @ n.W).clamp(-0.5, 0.5),
    "cast": lambda n: (n.x @ n.W).to(torch.float32).to(torch.float64),
}

REFUSED: dict[str, Builder] = {
    "times its first row": lambda n: (h := n.x @ n.W) * h[:1],
    "plus its first row": lambda n: (h := n.x @ n.W) + h[:1],
    "times its first column": lambda n: (h := n.x @ n.W) * h[:, :1],
    "times its own transpose": lambda n: (h := n.x @ n.W) * h.T,
    "plus its own transpose": lambda n: (h := n.x @ n.W) + h.T,
    "times its mean": lambda n: (h := n.x @ n.W) * h.mean(),
    "weight behind exp": lambda n: n.x @ n.W.exp(),
    "weight behind a mask": lambda n: n.x @ (n.W * n.k),
    "bias behind exp": lambda n: F.linear(n.x, n.W, n.b.exp()),
    "weight twice": lambda n: n.x @ n.W + n.y @ n.W,
    "weight twice, transposed": lambda n: n.x @ n.W + n.y @ n.W.T,
    "bias twice": lambda n: n.x @ n.W + n.b + n.b,
    "bias twice in F.linear": lambda n: F.linear(n.x, n.W, n.b) + F.linear(n.y, n.V, n.b),
    "two units of a product": lambda n: (n.x @ n.W) * (n.y @ n.V),
    "deep": lambda n: F.linear(F.linear(n.x, n.W, n.b).tanh(), n.V, n.c),
    "deep without a function": lambda n: n.x @ n.W @ n.V,
    "deep with its own inputs": lambda n: F.linear(n.x, n.W).tanh() + F.linear(n.x, n.W),
    "weight on the left": lambda n: n.W @ n.x,
    "quadratic": lambda n: n.W @ n.W,
    "addmm beta": lambda n: torch.addmm(n.b, n.x, n.W, beta=0.5),
    "addmm alpha": lambda n: torch.addmm(n.b, n.x, n.W, alpha=2.0),
    "addmm matrix bias": lambda n: torch.addmm(n.m, n.x, n.W),
    "addmm column bias": lambda n: torch.addmm(n.s, n.x, n.W),
    "column bias": lambda n: n.x @ n.W + n.s,
    "matrix bias": lambda n: n.x @ n.W + n.m,
    "scalar bias": lambda n: n.x @ n.W + n.scalar,
    "two ways, broadcast differently": lambda n: (h := n.x @ n.s) * h.reshape(1, 3),
    "rows against rows": lambda n: (h := n.x @ n.W)[:, None] + h.reshape(1, 3, 3),
    "units broadcast in the middle": lambda n: n.m.reshape(3, 1, 3).exp() * n.k,
    "learnable factor": lambda n: n.scalar * (n.x @ n.W),
    "learnable factor by unit": lambda n: n.b * (n.x @ n.W),
    "outer sum": lambda n: n.b + n.s,
    "outer product": lambda n: n.b * n.s,
    "expanded inside": lambda n: (n.long @ n.W).unsqueeze(1).expand(5, 2, 3),
    "middle expansion of a parameter": lambda n: n.m[:, None].expand(3, 2, 3),
    "last expansion": lambda n: n.s.expand(3, 4),
    "expanded by repeat_interleave": lambda n: (n.x @ n.W).repeat_interleave(2, 0),
    "einsum": lambda n: torch.einsum("ni,ui->nu", n.x, n.W),
    "function of a column, broadcast": lambda n: n.s.exp() * n.k,
    "softmax over units": lambda n: (n.x @ n.W).softmax(-1),
    "log-softmax over units": lambda n: (n.x @ n.W).log_softmax(-1),
    "Categorical logits": lambda n: dist.Categorical(logits=n.x @ n.W).logits,
    "cumsum": lambda n: (n.x @ n.W).cumsum(-1),
    "flip": lambda n: (n.x @ n.W).flip(-1),
    "roll": lambda n: (n.x @ n.W).roll(1, -1),
    "sort": lambda n: (n.x @ n.W).sort(-1).values,
    "transposed": lambda n: (n.x @ n.W).T,
    "transposed and copied": lambda n: (n.x @ n.W).T.contiguous(),
    "permuted batch": lambda n: F.linear(n.batch, n.W).permute(2, 1, 0).reshape(2, 3, 3),
    "indexed": lambda n: (n.x @ n.W)[:, torch.tensor([1, 0, 2])],
    "indexed parameter": lambda n: n.m[torch.tensor([1, 0, 0])],
    "concatenated": lambda n: torch.cat([n.x @ n.W, n.y @ n.V]),
    "concatenated with itself": lambda n: torch.cat([n.x @ n.W] * 2, 1),
    "written in place": lambda n: _written((n.x @ n.W).clone(), n.k),
    "summed": lambda n: (n.x @ n.W).sum(-1),
    "norm": lambda n: (h := n.x @ n.W) / h.norm(),
    "layer norm": lambda n: F.layer_norm(n.x @ n.W, (3,)),
    "batched weights": lambda n: torch.bmm(n.batch, n.cube),
    "triangle": lambda n: (n.x @ n.W).tril(),
    "no parameter": lambda n: n.x,
    "constant weight": lambda n: n.x @ n.W.detach(),
}


def _written(target: Tensor, source: Tensor) -> Tensor:
    target[0] = source[0]
    target[1] += target[0]
    return target


@pytest.mark.parametrize("name", RECOGNIZED)
@pytest.mark.parametrize("seed", [0, 1])
def test_recognized(name: str, seed: int) -> None:
    net = Net(seed)
    theta = RECOGNIZED[name](net)
    units = linear_units(theta, SampleGate([]))
    assert units is not None
    assert {id(term.leaf) for term in units.terms} == {id(leaf) for leaf in leaves([theta], ())}
    tolerance = 1e-5 if name == "cast" else EXACT
    assert check(theta, units, net.leaves) < tolerance
    assert true_jacobian(theta, net.leaves).abs().max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert linear_units(REFUSED[name](Net()), SampleGate([])) is None


@pytest.mark.parametrize(
    "mutate",
    [
        lambda net, units: LinearUnits(
            tuple(
                autograd.Term(
                    t.leaf, (1 - t.unit_axes[0],) if t.leaf is net.W else t.unit_axes, t.inputs
                )
                for t in units.terms
            ),
            units.units,
            units.rows,
            units.slope,
        ),
        lambda net, units: LinearUnits(units.terms, units.units, units.rows, None),
        lambda net, units: LinearUnits(units.terms[:1], units.units, units.rows, units.slope),
    ],
    ids=["transposed", "no slope", "no bias"],
)
def test_mutants_are_seen(mutate: Callable[[Net, LinearUnits], LinearUnits]) -> None:
    net = Net()
    theta = F.linear(net.x, net.W, net.b).sigmoid()
    units = linear_units(theta, SampleGate([]))
    assert units is not None and check(theta, units, net.leaves) < EXACT
    assert check(theta, mutate(net, units), net.leaves) > 1e-3


def test_rows_that_are_not_repeated_in_turn_are_seen() -> None:
    net = Net()
    theta = F.linear(net.batch[:, :1], net.W, net.b).expand(2, 4, 3)
    units = linear_units(theta, SampleGate([]))
    assert units is not None and check(theta, units, net.leaves) < EXACT
    assert check(theta, replace(units, places=None), net.leaves) > 1e-3


def test_jacobian_of_every_graph() -> None:
    for name, build in {**RECOGNIZED, **REFUSED}.items():
        net = Net(2)
        theta = build(net)
        if not theta.requires_grad or name == "cast":
            continue
        truth = true_jacobian(theta, net.leaves)
        many = jacobian(theta, net.leaves, SampleGate([]))
        assert not many.requires_grad
        torch.testing.assert_close(many, truth, rtol=0, atol=EXACT, msg=name)
        used = [leaf for leaf in leaves([theta], ()) if any(leaf is n for n in net.leaves)][:1]
        few = jacobian(theta, used, SampleGate([]))
        torch.testing.assert_close(few, true_jacobian(theta, used), rtol=0, atol=EXACT, msg=name)


# --- random programs ---------------------------------------------------------------------------

Step = Callable[[Tensor, Net], Tensor]


def _like(tensor: Tensor, h: Tensor) -> Tensor:
    """A constant that broadcasts against h: its last dimensions, tiled."""
    flat = tensor.reshape(-1)
    repeated = flat.repeat(-(-h.numel() // flat.numel()))
    return repeated[: h.numel()].reshape(h.shape)


GENTLE: tuple[Step, ...] = (
    lambda h, n: h.sigmoid(),
    lambda h, n: h.tanh(),
    lambda h, n: F.softplus(h),
    lambda h, n: (0.1 * h).exp(),
    lambda h, n: h * _like(n.k, h),
    lambda h, n: _like(n.y, h) - h,
    lambda h, n: h + _like(n.x, h),
    lambda h, n: h * _like(n.k, h)[..., :1],
    lambda h, n: h * h,
    lambda h, n: h + 0.5 * h.sin().detach(),
    lambda h, n: h.clamp(-0.7, 0.9),
    lambda h, n: h / (1 + h.square()),
    lambda h, n: h.reshape(-1),
    lambda h, n: h.reshape(-1, 3) if h.numel() % 3 == 0 else h,
    lambda h, n: h.reshape(3, -1) if h.numel() % 3 == 0 else h,
    lambda h, n: h.reshape(1, *h.shape).expand(2, *h.shape),
    lambda h, n: h.expand(2, *h.shape),
    lambda h, n: h + n.b if h.shape[-1:] == (3,) else h,
    lambda h, n: h + n.y @ n.V if h.shape == (3, 3) else h,
    lambda h, n: h.contiguous().view(h.shape),
    lambda h, n: h.clone().mul_(0.7),
)
ROUGH: tuple[Step, ...] = (
    lambda h, n: h.mT if h.dim() > 1 else h,
    lambda h, n: h.transpose(0, -1).reshape(h.shape),
    lambda h, n: h * h[:1],
    lambda h, n: h + h[..., :1],
    lambda h, n: h * h.transpose(0, -1) if h.shape == h.transpose(0, -1).shape else h,
    lambda h, n: h + h.mean(-1, keepdim=True),
    lambda h, n: h[..., :2],
    lambda h, n: h[1:],
    lambda h, n: h[..., torch.arange(h.shape[-1] - 1, -1, -1)],
    lambda h, n: h.flip(0),
    lambda h, n: h.flip(-1),
    lambda h, n: h.roll(1, -1),
    lambda h, n: h.cumsum(-1),
    lambda h, n: h.sort(-1).values,
    lambda h, n: h.softmax(-1),
    lambda h, n: h.unsqueeze(-2).expand(*h.shape[:-1], 2, h.shape[-1]),
    lambda h, n: h.unsqueeze(-1).expand(*h.shape, 2),
    lambda h, n: torch.cat([h, h]),
    lambda h, n: torch.stack([h, h.exp()]),
    lambda h, n: h.repeat_interleave(2, -1),
    lambda h, n: torch.where(_like(n.k, h) > 0, h, h.flip(-1)),
    lambda h, n: h + n.s if h.shape[-2:] == (3, 3) else h,
    lambda h, n: h * n.b if h.shape[-1:] == (3,) else h,
    lambda h, n: h + n.b.exp() if h.shape[-1:] == (3,) else h,
    lambda h, n: h @ n.V if h.shape[-1:] == (3,) else h,
    lambda h, n: h @ n.k if h.shape[-1:] == (3,) else h,
    lambda h, n: h + n.m if h.shape[-2:] == (3, 3) else h,
    lambda h, n: torch.addmm(n.c, n.y, n.V, alpha=2) + h if h.shape == (3, 3) else h,
    lambda h, n: h + n.y @ n.W if h.shape == (3, 3) else h,
)
HEADS: tuple[Builder, ...] = (
    lambda n: F.linear(n.x, n.W, n.b),
    lambda n: F.linear(n.batch, n.W, n.c),
    lambda n: n.x @ n.W,
    lambda n: n.x @ n.W.T,
    lambda n: n.long @ n.U.T,
    lambda n: n.x[:1] @ n.W,
    lambda n: n.x @ n.W + n.y @ n.V.T,
    lambda n: torch.addmm(n.r, n.x, n.W),
    lambda n: torch.addmm(n.k, n.x, n.W.T, beta=2),
    lambda n: n.b,
    lambda n: n.m,
    lambda n: n.cube,
    lambda n: n.r + n.s,
    lambda n: n.scalar.expand(3),
)
PROGRAMS = 200


def random_program(number: int) -> tuple[Net, Tensor, list[int]]:
    """One head and a chain of up to six operations; sometimes only gentle ones."""
    chooser = random.Random(number)
    net = Net(number)
    steps = (*GENTLE, *ROUGH)
    rough = chooser.choice([0.0, 0.0, 0.15, 0.5])
    theta = chooser.choice(HEADS)(net)
    chain = []
    for _ in range(chooser.randint(0, 6)):
        pool = ROUGH if chooser.random() < rough else GENTLE
        step = chooser.choice(pool)
        moved = step(theta, net)
        if 0 < moved.numel() <= 72:
            theta = moved
            chain.append(steps.index(step))
    return net, theta, chain


@pytest.mark.parametrize("batch", range(4))
def test_random_programs(batch: int) -> None:
    accepted = 0
    for number in range(batch * PROGRAMS, (batch + 1) * PROGRAMS):
        net, theta, chain = random_program(number)
        units = linear_units(theta, SampleGate([]))
        if units is None:
            continue
        accepted += 1
        found = {id(term.leaf) for term in units.terms}
        assert found == {id(leaf) for leaf in leaves([theta], ())}, f"program {number}: {chain}"
        scale = true_jacobian(theta, net.leaves).abs().max().clamp_min(1.0)
        error = check(theta, units, net.leaves) / scale
        assert error < 1e-10, f"program {number} with steps {chain}: error {error:.2e}"
    print(f"{accepted} of {PROGRAMS} accepted")
    assert accepted > 0.2 * PROGRAMS


# --- the gate ----------------------------------------------------------------------------------


def reparametrized(net: Net) -> Tensor:
    """A sample value that carries the graph of V and c."""
    return F.linear(net.y, net.V, net.c) + net.k


def test_gate_cuts_reparametrized_values() -> None:
    net = Net()
    z = reparametrized(net)
    gate = SampleGate([z])
    theta = F.linear(z, net.W, net.b).tanh()
    held = F.linear(z.detach(), net.W, net.b).tanh()
    expected = true_jacobian(held, net.leaves)
    torch.testing.assert_close(jacobian(theta, net.leaves, gate), expected, rtol=0, atol=0)
    leaking = jacobian(theta, net.leaves, SampleGate([]))
    assert (leaking - expected).abs().max() > 0.1
    gate.remove()


def test_gate_lets_linear_units_stop_at_values() -> None:
    net = Net()
    z = reparametrized(net)
    theta = F.linear(z, net.W, net.b)
    assert linear_units(theta, SampleGate([])) is None
    units = linear_units(theta, SampleGate([z]))
    assert units is not None and len(units.terms) == 2
    expected = true_jacobian(F.linear(z.detach(), net.W, net.b), net.leaves)
    torch.testing.assert_close(
        implied_jacobian(theta, units, net.leaves), expected, rtol=0, atol=EXACT
    )


def test_gate_beside_the_units() -> None:
    # The value is not an input but an addend, and the parameter behind it the same weight.
    net = Net()
    z = net.x @ net.W
    theta = (net.y @ net.W + z).sigmoid() * z
    gate = SampleGate([z])
    units = linear_units(theta, gate)
    value = z.detach()
    expected = true_jacobian((net.y @ net.W + value).sigmoid() * value, net.leaves)
    assert units is not None
    torch.testing.assert_close(
        implied_jacobian(theta, units, net.leaves), expected, rtol=0, atol=EXACT
    )
    torch.testing.assert_close(jacobian(theta, net.leaves, gate), expected, rtol=0, atol=EXACT)


def test_coordinates_that_are_sample_values_have_no_jacobian() -> None:
    net = Net()
    z = reparametrized(net)
    gate = SampleGate([z])
    assert linear_units(z, gate) is None
    assert jacobian(z, net.leaves, gate).abs().max() == 0
    flat = net.y[0] @ net.V
    assert jacobian(flat, net.leaves, SampleGate([flat])).abs().max() == 0
    assert jacobian(flat, net.leaves, SampleGate([])).abs().max() > 0


def test_open_gate_does_nothing() -> None:
    net = Net()
    z = reparametrized(net)
    plain = torch.autograd.grad((z @ net.W).sum(), net.V, retain_graph=True)[0]
    gate = SampleGate([z])
    with gate.closed():
        (cut,) = torch.autograd.grad((z @ net.W).sum(), net.V, retain_graph=True, allow_unused=True)
        assert cut is None or cut.abs().max() == 0
    assert torch.equal(torch.autograd.grad((z @ net.W).sum(), net.V, retain_graph=True)[0], plain)
    gate.remove()
    with gate.closed():
        assert torch.equal(torch.autograd.grad((z @ net.W).sum(), net.V)[0], plain)


def test_gate_opens_after_an_error() -> None:
    net = Net()
    z = reparametrized(net)
    gate = SampleGate([z])
    with pytest.raises(ZeroDivisionError), gate.closed():
        raise ZeroDivisionError
    assert torch.autograd.grad((z @ net.W).sum(), net.V)[0].abs().max() > 0


# --- leaves ------------------------------------------------------------------------------------


def ids(tensors: Sequence[Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def test_leaves() -> None:
    net = Net()
    theta = F.linear(net.x, net.W, net.b) + net.scalar
    assert ids(leaves([theta], ())) == ids([net.W, net.b, net.scalar])
    assert ids(leaves([net.W], ())) == ids([net.W])
    assert leaves([net.x, net.W.detach()], ()) == []
    with torch.no_grad():
        assert leaves([net.x @ net.W], ()) == []
    assert leaves([], ()) == []


def test_leaves_are_found_once() -> None:
    net = Net()
    found = leaves([net.x @ net.W, net.W.exp() @ net.W, net.W], ())
    assert len(found) == 1 and found[0] is net.W


def test_leaves_stop_at_values() -> None:
    net = Net()
    z = reparametrized(net)
    theta = z @ net.W
    assert ids(leaves([theta], ())) == ids([net.V, net.c, net.W])
    assert ids(leaves([theta], [edge_of(z)])) == ids([net.W])
    # A second way around the value is not stopped.
    assert ids(leaves([theta + net.c], [edge_of(z)])) == ids([net.W, net.c])


def test_leaves_without_gradient_are_left_out() -> None:
    net = Net()
    net.V.requires_grad_(False)
    assert ids(leaves([net.x @ net.W + net.y @ net.V], ())) == ids([net.W])


def test_stops_are_outputs_not_nodes() -> None:
    # Of a node with two outputs, only the one given stops the walk.
    net = Net()
    first, second = (net.x @ net.W).unbind(0)[:2]
    stops = [edge_of(first)]
    assert leaves([first], stops) == []
    assert ids(leaves([second], stops)) == ids([net.W])


# --- private names of torch --------------------------------------------------------------------


def _clamped(x: Tensor) -> Tensor:
    return torch.clamp(x, torch.zeros(3), torch.ones(3))


NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "AbsBackward0": torch.abs,
    "AddBackward0": lambda x: x + 1,
    "AliasBackward0": torch.ops.aten.alias,
    "ClampBackward0": _clamped,
    "ClampBackward1": lambda x: x.clamp(0, 1),
    "ClampMinBackward0": lambda x: x.clamp_min(0),
    "ClampMaxBackward0": lambda x: x.clamp_max(0),
    "CloneBackward0": torch.clone,
    "DivBackward0": lambda x: x / 2,
    "EluBackward0": F.elu,
    "ExpBackward0": torch.exp,
    "Expm1Backward0": torch.expm1,
    "GeluBackward0": F.gelu,
    "LeakyReluBackward0": F.leaky_relu,
    "LogBackward0": torch.log,
    "Log1PBackward0": torch.log1p,
    "LogSigmoidBackward0": F.logsigmoid,
    "MulBackward0": lambda x: 2 * x,
    "NegBackward0": torch.neg,
    "PowBackward0": lambda x: x**3,
    "ReciprocalBackward0": torch.reciprocal,
    "ReluBackward0": torch.relu,
    "RsqrtBackward0": torch.rsqrt,
    "RsubBackward1": lambda x: torch.rsub(x, 1.0),
    "SigmoidBackward0": torch.sigmoid,
    "SiluBackward0": F.silu,
    "SoftplusBackward0": F.softplus,
    "SqrtBackward0": torch.sqrt,
    "SubBackward0": lambda x: x - 1,
    "TanhBackward0": torch.tanh,
    "ToCopyBackward0": lambda x: x.to(torch.float32),
    "UnsafeViewBackward0": lambda x: F.linear(torch.ones(2, 2, 3), x.expand(2, 3)),
    "ViewBackward0": lambda x: x.view(3, 1),
}
CANARY = "torch renamed a private attribute or node that pyronat.autograd relies on: "


@pytest.mark.parametrize("name", sorted(NODES))
def test_elementwise_nodes_have_their_names(name: str) -> None:
    result = NODES[name](torch.full((3,), 0.3, requires_grad=True))
    assert result.grad_fn.name() == name, CANARY + f"expected {name}"


def test_every_elementwise_node_is_tried() -> None:
    assert set(NODES) == ELEMENTWISE
    assert ORDER_KEEPING < ELEMENTWISE
    assert not TRANSPOSING & ELEMENTWISE


@pytest.mark.parametrize(
    ("build", "name", "attributes"),
    [
        (
            lambda n: F.linear(n.x, n.W, n.b),
            "AddmmBackward0",
            "_saved_mat1 _saved_alpha _saved_beta",
        ),
        (lambda n: n.x @ n.W, "MmBackward0", "_saved_self"),
        (lambda n: n.x + n.W, "AddBackward0", "_saved_alpha"),
        (lambda n: n.W.permute(1, 0), "PermuteBackward0", "_saved_dims"),
        (lambda n: n.W.transpose(0, 1), "TransposeBackward0", "_saved_dim0 _saved_dim1"),
        (lambda n: n.W.t(), "TBackward0", ""),
        (lambda n: n.W.expand(2, 3, 3), "ExpandBackward0", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" not in value else "",
)
def test_private_attributes_have_their_names(build: Builder, name: str, attributes: str) -> None:
    net = Net()
    theta = build(net)
    node = theta.grad_fn
    assert node.name() == name, CANARY + f"expected {name}, found {node.name()}"
    for attribute in [*attributes.split(), "_input_metadata", "next_functions"]:
        assert hasattr(node, attribute), CANARY + f"{name}.{attribute} is gone"
    assert tuple(node._input_metadata[0].shape) == theta.shape, CANARY + "_input_metadata.shape"
    leaf = next(edge[0] for edge in (net.W + 1).grad_fn.next_functions)
    assert getattr(leaf, "variable", None) is net.W, CANARY + "AccumulateGrad.variable"


def test_saved_inputs_are_the_inputs() -> None:
    net = Net()
    addmm, mm = F.linear(net.x, net.W, net.b), net.x @ net.W
    assert torch.equal(addmm.grad_fn._saved_mat1, net.x), CANARY + "AddmmBackward0._saved_mat1"
    assert torch.equal(mm.grad_fn._saved_self, net.x), CANARY + "MmBackward0._saved_self"
    assert torch.addmm(net.b, net.x, net.W, alpha=3).grad_fn._saved_alpha == 3, CANARY + "alpha"


def test_renamed_private_attributes_lead_to_the_general_path(monkeypatch):
    inputs, weight = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    theta = inputs @ weight.T
    assert linear_units(theta, SampleGate([])) is not None

    def renamed(node):
        raise AttributeError("_saved_dims")

    monkeypatch.setattr(autograd, "_exchanges_axes", renamed)
    assert linear_units(theta, SampleGate([])) is None
