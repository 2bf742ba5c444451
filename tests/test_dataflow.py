"""Labels through torch operations: never one too few, and not too many where it matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyronat import dataflow
from pyronat.lattices import LabelSets


class Dataflow(dataflow.Dataflow):
    """Follows sets of named labels."""

    def __init__(self, names: Sequence[str]) -> None:
        self.sets = LabelSets(names)
        super().__init__(self.sets)

    def mark(self, tensor: Tensor, label: str) -> None:
        super().mark(tensor, self.sets.of(label))

    def labels(self, *tensors: Tensor) -> frozenset[str]:
        return self.sets.decode(self.joined(*tensors))

    @property
    def escaped_labels(self) -> frozenset[str]:
        return self.sets.decode(self.escaped)


NAMES = ("a", "b", "i", "z")


@dataclass(frozen=True)
class Values:
    """Labeled tensors: two matrices, an index vector, and a 0-d index."""

    a: Tensor
    b: Tensor
    i: Tensor
    z: Tensor


def follow(program: Callable[[Values], Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Labels of a program's result, and labels that left for Python."""
    values = Values(torch.randn(3, 3), torch.randn(3, 3), torch.tensor([2, 0, 1]), torch.tensor(1))
    flow = Dataflow(NAMES)
    with flow.active():
        for name in NAMES:
            flow.mark(getattr(values, name), name)
        result = program(values)
    found = flow.labels(result) if isinstance(result, Tensor) else frozenset()
    return found, flow.escaped_labels


def _into_zeros(v: Values) -> Tensor:
    buffer = torch.zeros(3, 3)
    buffer[1] = v.a[0]
    return buffer


def _other_row(v: Values) -> Tensor:
    buffer = torch.zeros(3, 3)
    buffer[1] = v.a[0]
    return buffer[0] + v.b[0]


def _overwritten(v: Values) -> Tensor:
    copy = v.a.clone()
    copy.copy_(v.b)
    return copy


def _zeroed(v: Values) -> Tensor:
    copy = v.a.clone()
    copy.zero_()
    return copy


def _overwritten_row(v: Values) -> Tensor:
    copy = v.b.clone()
    copy[1] = v.a[0]
    return copy


def _partly_zeroed(v: Values) -> Tensor:
    copy = v.a.clone()
    copy[0].zero_()
    return copy


def _through_view(v: Values) -> Tensor:
    buffer = torch.zeros(9)
    buffer.view(3, 3)[:, 0].add_(v.a[0])
    return buffer


def _out_argument(v: Values) -> Tensor:
    out = torch.empty(3, 3)
    torch.add(v.a, v.b, out=out)
    return out


def _linear(v: Values) -> Tensor:
    return nn.Linear(3, 2)(v.a)


def _sequence(v: Values) -> Tensor:
    layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1))
    return layers(v.a)


def _recurrent(v: Values) -> Tensor:
    return nn.GRU(3, 2)(v.a[None])[0]


def _embedding(v: Values) -> Tensor:
    return nn.Embedding(3, 2)(v.i)


def _custom_function(v: Values) -> Tensor:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    return Double.apply(v.a)


def _no_grad(v: Values) -> Tensor:
    with torch.no_grad():
        return v.a * 2


def _inference_free_data(v: Values) -> Tensor:
    return v.a.data + 1


def _sorted_by(v: Values) -> Tensor:
    return v.b[v.a[:, 0].argsort()]


def _scatter(v: Values) -> Tensor:
    return torch.zeros(3, 3).scatter(1, v.i[:, None], 1.0)


FLOWS: dict[str, tuple[Callable[[Values], Any], str]] = {
    "itself": (lambda v: v.a, "a"),
    "constant": (lambda v: torch.ones(2), ""),
    "sum": (lambda v: v.a + v.b, "a b"),
    "scaled": (lambda v: 2 * v.a, "a"),
    "zero times": (lambda v: 0 * v.a, "a"),
    "detached": (lambda v: v.a.detach() * 2, "a"),
    "no_grad": (_no_grad, "a"),
    "data": (_inference_free_data, "a"),
    "compared": (lambda v: (v.a > 0).double(), "a"),
    "where": (lambda v: torch.where(v.a > 0, v.b, torch.zeros(3, 3)), "a b"),
    "masked fill": (lambda v: v.b.masked_fill(v.a > 0, 0.0), "a b"),
    "indexed by integers": (lambda v: torch.randn(3)[v.i], "i"),
    "indexed values": (lambda v: v.a[v.i], "a i"),
    "indexed by 0-d": (lambda v: torch.randn(3)[v.z], "z"),
    "indexed values by 0-d": (lambda v: v.a[v.z], "a z"),
    "indexed by 0-d and slice": (lambda v: v.a[:, v.z], "a z"),
    "indexed by mask": (lambda v: v.b[v.a > 0], "a b"),
    "gathered": (lambda v: v.b.gather(1, v.i[:, None]), "b i"),
    "index_select": (lambda v: v.b.index_select(0, v.i), "b i"),
    "one-hot": (lambda v: F.one_hot(v.i, 3), "i"),
    "scattered": (_scatter, "i"),
    "sorted by": (_sorted_by, "a b"),
    "argmax": (lambda v: v.a.argmax(-1), "a"),
    "long": (lambda v: v.a.long(), "a"),
    "cast": (lambda v: v.a.float().half().double(), "a"),
    "view": (lambda v: v.a.reshape(9)[:4], "a"),
    "transposed": (lambda v: v.a.T.contiguous(), "a"),
    "expanded": (lambda v: v.a[:1].expand(5, 3) * 1, "a"),
    "unbound": (lambda v: v.a.unbind()[1], "a"),
    "split": (lambda v: v.a.split(2)[0].sum(), "a"),
    "stacked": (lambda v: torch.stack([v.a, v.b]), "a b"),
    "concatenated": (lambda v: torch.cat([v.a, v.b, torch.zeros(1, 3)]), "a b"),
    "reduced": (lambda v: v.a.sum(), "a"),
    "deviation": (lambda v: v.a.std(0), "a"),
    "softmax": (lambda v: v.a.softmax(-1), "a"),
    "cumulated": (lambda v: v.a.cumsum(0), "a"),
    "product": (lambda v: v.a @ v.b, "a b"),
    "product with a constant": (lambda v: v.a @ torch.ones(3, 2), "a"),
    "batched product": (lambda v: v.a[None].expand(2, 3, 3) @ v.b, "a b"),
    "einsum": (lambda v: torch.einsum("ij,kj->ik", v.a, v.b), "a b"),
    "linear": (_linear, "a"),
    "sequence of modules": (_sequence, "a"),
    "recurrent": (_recurrent, "a"),
    "embedding": (_embedding, "i"),
    "convolution": (lambda v: nn.Conv1d(3, 2, 2)(v.a[None]), "a"),
    "dropout": (lambda v: F.dropout(v.a), "a"),
    "custom function": (_custom_function, "a"),
    "vmap": (lambda v: torch.vmap(lambda row: row.sin().sum())(v.a), "a"),
    "vmap of two": (lambda v: torch.vmap(torch.dot)(v.a, v.b), "a b"),
    "cholesky": (lambda v: torch.linalg.cholesky(v.a @ v.a.T + torch.eye(3)), "a"),
    "written into zeros": (_into_zeros, "a"),
    "added in place": (lambda v: torch.zeros(3, 3).add_(v.a), "a"),
    "augmented": (lambda v: v.b.clone().mul_(v.a).sin_(), "a b"),
    "written through a view": (_through_view, "a"),
    "out argument": (_out_argument, "a b"),
    "overwritten": (_overwritten, "b"),
    "filled by zeros": (_zeroed, ""),
    "filled by a value": (lambda v: v.a.clone().fill_(v.b[0, 0]), "b"),
    "written over a view": (lambda v: _overwritten_row(v)[1], "a"),
    "rest of a written view": (lambda v: _overwritten_row(v)[2], "b"),
    "partly zeroed": (lambda v: _partly_zeroed(v), "a"),
    "zeroed part": (lambda v: _partly_zeroed(v)[0], ""),
    "ones like": (lambda v: torch.ones_like(v.a), ""),
    "zeros like": (lambda v: torch.zeros_like(v.a) + 1, ""),
    "full like": (lambda v: torch.full_like(v.a, 3.0), ""),
    "random like": (lambda v: torch.randn_like(v.a) + torch.rand_like(v.a), ""),
    "new": (lambda v: v.a.new_zeros(2) + v.a.new_ones(2) + v.a.new_full((2,), 3.0), ""),
    "new tensor": (lambda v: v.a.new_tensor([1.0]), ""),
    "random of parameter": (lambda v: torch.bernoulli(v.a.sigmoid()), "a"),
    "sampled by probability": (lambda v: torch.multinomial(v.a.exp(), 1), "a"),
    # Precision where sites are stacked: the elements of an untouched part stay clean.
    "untouched row": (_other_row, "b"),
    "row of a stack": (lambda v: torch.stack([v.a, v.b])[0], "a"),
    "row of a product": (lambda v: (_into_zeros(v) @ torch.ones(3, 2))[0], ""),
    "column of a product": (lambda v: (torch.ones(2, 3) @ _into_zeros(v))[:, 0], "a"),
    "row of a linear map": (lambda v: F.linear(_into_zeros(v), torch.ones(2, 3))[2], ""),
    "row of an affine map": (
        lambda v: F.linear(_into_zeros(v), torch.ones(2, 3), torch.ones(2))[2],
        "",
    ),
    "element of a sum": (lambda v: (_into_zeros(v) + torch.ones(3))[0], ""),
}


@pytest.mark.parametrize("name", FLOWS)
def test_labels(name: str) -> None:
    program, expected = FLOWS[name]
    found, _ = follow(program)
    assert found == frozenset(expected.split())


def _as_index(v: Values) -> float:
    return [1.0, 2.0, 3.0][v.z]


ESCAPES: dict[str, tuple[Callable[[Values], Any], str]] = {
    "item": (lambda v: v.a[0, 0].item(), "a"),
    "float": (lambda v: float(v.a.sum()), "a"),
    "int": (lambda v: int(v.z), "z"),
    "bool": (lambda v: bool((v.a > 0).all()), "a"),
    "if": (lambda v: 1 if v.b[0, 0] > 0 else 2, "b"),
    "index of a list": (_as_index, "z"),
    "range": (lambda v: list(range(v.z)), "z"),
    "numpy": (lambda v: v.a.numpy(), "a"),
    "detached numpy": (lambda v: v.a.detach().numpy(), "a"),
    "tolist": (lambda v: v.a.tolist(), "a"),
    "torch.tensor": (lambda v: torch.tensor(v.a[0, 0]), "a"),
    "equal": (lambda v: torch.equal(v.a, v.b), "a b"),
    "allclose": (lambda v: torch.allclose(v.a, v.b), "a b"),
    "nothing": (lambda v: v.a + v.b, ""),
    "shape": (lambda v: v.a.shape[0] + len(v.b), ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(name: str) -> None:
    program, expected = ESCAPES[name]
    _, escaped = follow(program)
    assert escaped == frozenset(expected.split())


def test_nonzero_has_the_labels_it_depends_on() -> None:
    found, escaped = follow(lambda v: (v.a > 0).nonzero())
    assert "a" in found | escaped


def test_checks_of_factorizations_are_no_escapes() -> None:
    """They end the program or do nothing; the values of the factor are followed."""

    def spread(v: Any) -> Tensor:
        return v.a.square().sum().exp() * torch.eye(3)

    for factor in (torch.linalg.cholesky, torch.linalg.inv):
        found, escaped = follow(lambda v, factor=factor: factor(spread(v)))
        assert "a" in found and not escaped
    # Negative control: what a program reads itself may decide on anything.
    _, escaped = follow(lambda v: torch.linalg.cholesky_ex(spread(v)).info.item())
    assert escaped == {"a"}


def test_sparse_tensors_escape() -> None:
    found, escaped = follow(lambda v: torch.sparse.mm(v.a.to_sparse(), v.b))
    assert {"a", "b"} <= found | escaped


# --- random programs against finite changes ----------------------------------------------------

Op = Callable[[Tensor, Tensor], Tensor]
OPS: tuple[Op, ...] = (
    lambda x, y: x + y,
    lambda x, y: x * y.detach(),
    lambda x, y: x @ y,
    lambda x, y: torch.stack([x, y])[1],
    lambda x, y: torch.cat([x[:1], y[1:]]),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x.T.contiguous(),
    lambda x, y: x.flip(0),
    lambda x, y: x.cumsum(1),
    lambda x, y: x[y.argmax(-1)],
    lambda x, y: x.softmax(-1),
    lambda x, y: x.clone().index_put_((torch.tensor([0]),), y[2]),
    lambda x, y: torch.zeros(3, 3).copy_(x),
    lambda x, y: torch.zeros(3, 3).fill_diagonal_(1.0) * x,
    lambda x, y: x[:, :1].expand(3, 3) - y,
    lambda x, y: x.round().long().double(),
    lambda x, y: torch.ones_like(x),
    lambda x, y: F.linear(x, torch.ones(3, 3), y[0]),
)


def run_program(number: int, inputs: list[Tensor]) -> list[Tensor]:
    chooser = random.Random(number)
    made = list(inputs)
    for _ in range(8):
        op = chooser.choice(OPS)
        made.append(op(chooser.choice(made), chooser.choice(made)))
    return made


def test_no_label_is_missed_in_random_programs() -> None:
    names = ("a", "b", "c")
    dependent = extra = 0
    for number in range(150):
        inputs = [torch.randn(3, 3) for _ in names]
        flow = Dataflow(names)
        with flow.active():
            for name, value in zip(names, inputs, strict=True):
                flow.mark(value, name)
            results = run_program(number, inputs)
        for index, name in enumerate(names):
            changed = [value.clone() for value in inputs]
            changed[index] += 3 * torch.randn(3, 3)
            again = run_program(number, changed)
            for result, other in zip(results, again, strict=True):
                differs = not torch.equal(result, other)
                dependent += differs
                if differs:
                    assert name in flow.labels(result), f"program {number}"
                extra += not differs and name in flow.labels(result)
    assert dependent > 1000
    assert extra < 0.5 * dependent


# --- the object --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 62, 63, 130])
def test_many_labels(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    flow = Dataflow(names)
    tensors = [torch.randn(2) for _ in names]
    with flow.active():
        for name, tensor in zip(names, tensors, strict=True):
            flow.mark(tensor, name)
        last = tensors[-1] * 2
        total = torch.stack(tensors).sum()
        halves = tensors[0] @ tensors[count // 2]
    assert flow.labels(last) == {names[-1]}
    assert flow.labels(total) == set(names)
    assert flow.labels(halves) == {names[0], names[count // 2]}


def test_marks_replace_labels() -> None:
    flow = Dataflow(["a", "b"])
    x = torch.zeros(2)
    with flow.active():
        flow.mark(x, "a")
        flow.mark(x, "b")
        y = x + 1
    assert flow.labels(y) == {"b"} == flow.labels(x)
    assert flow.labels() == frozenset() == flow.labels(torch.ones(2))


def test_marks_of_a_part() -> None:
    flow = Dataflow(["a", "b"])
    x = torch.zeros(4)
    with flow.active():
        flow.mark(x[:2], "a")
        flow.mark(x[3:], "b")
        y = x * 2
    assert flow.labels(y[:2]) == {"a"}
    assert flow.labels(y[2:3]) == frozenset()
    assert flow.labels(y[3:]) == {"b"} and flow.labels(y) == {"a", "b"}


def test_nothing_is_seen_outside_or_while_paused() -> None:
    flow = Dataflow(["a"])
    x = torch.zeros(2)
    flow.mark(x, "a")
    assert flow.labels(x + 1) == frozenset()
    with flow.active():
        with flow.paused():
            hidden = x + 1
            assert not float(x.sum())
        seen = x + 1
    assert flow.labels(hidden) == frozenset() and flow.labels(seen) == {"a"}
    assert flow.escaped_labels == frozenset() and not flow.watching


def test_watching_ends_after_an_error() -> None:
    flow = Dataflow(["a"])
    with pytest.raises(ZeroDivisionError), flow.active():
        raise ZeroDivisionError
    assert not flow.watching


def test_gradients_are_unharmed() -> None:
    flow = Dataflow(["a"])
    weight, a = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    (expected,) = torch.autograd.grad((a @ weight).tanh()[torch.tensor(1)].sum(), weight)
    with flow.active():
        flow.mark(a, "a")
        theta = (a @ weight).tanh()[torch.tensor(1)].sum()
    (found,) = torch.autograd.grad(theta, weight)
    assert torch.equal(found, expected) and flow.labels(theta) == {"a"}


def test_memory_that_is_used_again_has_no_old_labels() -> None:
    flow = Dataflow(["a"])
    with flow.active():
        for _ in range(200):
            x = torch.randn(50)
            flow.mark(x, "a")
            del x
            y = torch.randn(50)
            assert flow.labels(y) == frozenset()
            del y


def test_empty_tensors() -> None:
    flow = Dataflow(["a"])
    with flow.active():
        x = torch.zeros(0, 3)
        flow.mark(x, "a")
        y = torch.cat([x, torch.ones(1, 3)])
        x.sum()
        x @ torch.ones(3, 2)
    assert flow.labels(y) <= {"a"}
