"""The tutorial runs from its first cell to its last, and shows what it says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    plt.close("all")
    matplotlib.use(backend)


def test_tutorial() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "it is kept without outputs"
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    slowest = names["directions"][0]
    assert slowest.missing == pytest.approx(names["rate"], abs=0.01), "EM's rate, foretold"
    assert names["rate"] > 0.95
    assert torch.sign(slowest.vector["loc"]).sum().abs() == 2, "both means move the same way"
    best = names["losses"][-1]
    assert names["visible"][11] - best < 1e-9 < names["losses"][200] - best
    assert len(plt.gcf().axes) == 1 and len(plt.gca().lines) == 2
