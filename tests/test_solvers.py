"""`examples.benchmarks.solvers`: errors are against exact solutions, found in another way here."""

import json
from pathlib import Path

import pytest
import torch

from examples.benchmarks import solvers
from examples.benchmarks.solvers import KINDS, QUICK, SPREAD, make_layer

EXACT = {"units": {"unit"}, "joint": {"dense", "dual", "cg"}}
NEARLY = {"units": {"cg"}, "joint": set()}

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", SPREAD)
def test_solutions_and_products(kind: str, phase: str) -> None:
    layer = make_layer(QUICK[kind][0], phase)
    system = KINDS[kind](layer)
    a, w = layer.inputs.double(), layer.weights.double()
    if kind == "units":
        matrices = torch.einsum("nu,ni,nj->uij", w, a, a)
    else:
        rows = torch.einsum("nu,ni->nui", layer.flowing.double(), a).flatten(1)
        matrices = (rows.mT @ rows).unsqueeze(0)
    matrices = matrices + torch.diag_embed(
        system.damping.double().unsqueeze(1).expand(matrices.shape[:2])
    )
    right = system.gradient.double()
    expected = torch.linalg.solve(matrices, right.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(system.exact, expected)
    torch.testing.assert_close(system.product(expected), right)
    assert system.naive is not None and system.error(system.naive()) < 1e-5
    assert system.error(torch.zeros_like(right)) == pytest.approx(1)
    assert system.error(1.1 * expected) == pytest.approx(0.1)
    found = {name: system.error(system.factored(name)()) for name in system.held}
    exact, nearly = EXACT[kind], NEARLY[kind]
    assert all(found[name] < 1e-4 for name in exact)
    assert all(found[name] < 0.1 for name in nearly)
    assert all(found[name] > 1e-3 for name in found.keys() - exact - nearly), "an error is seen"


def test_late_layers_are_saturated() -> None:
    early, late = (make_layer((200, 33, 50), phase).weights for phase in SPREAD)
    assert early.min() > 0.1
    assert late.median() < 0.1 and late.quantile(0.1) < 0.01 and late.max() > 0.2


def test_the_quick_version_measures_every_solver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "solvers.json"
    solvers.main(["--quick", "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    assert len(results) == 2 * (4 + 6)
    for result in results:
        assert min(result["pairs"], result["solve"], result["relative"]) > 0
        if result["structure"] not in NEARLY[result["kind"]]:
            assert (result["error"] < 1e-4) == (result["structure"] in EXACT[result["kind"]])
    assert capsys.readouterr().out.count("\n| ") == 1 + len(results)


def test_large_joint_blocks_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "LARGEST", 35)
    results = solvers.measure("joint", (20, 9, 4), "early", 1)
    assert "dense" not in {result.structure for result in results}
    assert all(result.relative is None for result in results)
    assert "| – |" in solvers.table(results)
