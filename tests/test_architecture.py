"""The house rules: who imports whom, how large modules are, and that importing changes nothing."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"rates", "rejection", "drawing"}),
    frozenset({"blocks", "lattices", "autograd", "operators", "steps", "guards", "buffers"})
    | {"closed_forms", "wrappers"},
    frozenset({"eigenvectors", "jacobians"}),
    frozenset({"unit_rows", "kronecker"}),
    frozenset({"shared"}),
    frozenset({"conjugate_gradients"}),
    frozenset({"graph", "operations", "entries", "records", "geometry", "spectrum"})
    | {"joint_forms", "layers", "factored", "weights", "tables", "averaging"},
    frozenset({"index_rules", "families"}),
    frozenset({"flow_rules", "simulated", "datum_rows", "curvature"}),
    frozenset({"dataflow", "partition", "fingerprint", "districts"})
    | {"network_factors", "elements"},
    frozenset({"tracing", "importance", "testing"}),
    frozenset({"flows", "enumeration", "loss_traces", "checkpoints"}),
    frozenset({"analysis", "dreams"}),
    frozenset({"programs", "rws"}),
    frozenset({"plans", "scores"}),
    frozenset({"sides", "observation", "proposals", "others"}),
    frozenset({"validation"}),
    frozenset({"expectation", "planning", "shaping", "adaptation"}),
    frozenset({"visible"}),
    frozenset({"visible_exact"}),
    frozenset({"motion"}),
    frozenset({"optim", "study", "refresh"}),
    frozenset({"trials", "resume", "presets", "telling"}),
    frozenset({"reports"}),
    frozenset({"infer"}),
    frozenset({"loading", "progress"}),
    frozenset({"recipes"}),
    frozenset({"training", "inspection", "predictive"}),
    frozenset({"comparison"}),
    frozenset({"plot", "arguments"}),
    frozenset({"cli"}),
    frozenset({"__init__", "__main__"}),
)
"""Every module by its floor; imports only point down. A new module takes its place here."""

CAUGHT = frozenset({"UnknownStructure", "Suspect", "argparse.ArgumentTypeError"})
"""Raised to be caught: a user never sees it."""
WITHOUT_TORCH = frozenset({"errors", "blocks", "graph", "districts", "drawing"})
WITH_PYRO = frozenset({
    "tracing",
    "checkpoints",
    "loss_traces",
    "dreams",
    "rws",
    "infer",
    "optim",
    "others",
    "refresh",
    "trials",
    "testing",
    "predictive",
    "recipes",
    "training",
    "comparison",
})
RUNTIME = frozenset({"torch", "pyro", "networkx"})
LAZY = frozenset({"matplotlib", "tqdm"})
MAX_CODE_LINES = 330
"""Lines that are neither blank, comment nor docstring."""
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 7
"""Without self."""
MORE_PARAMETERS = {"optim.__init__": 15}
"""The one place where a user says everything."""


def modules(package: str = "pyronat") -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / package).glob("*.py"))}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join(part for part in (package, base) if part)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[str]:
    package = path.parent.name
    return {name for node in ast.walk(tree_of(path)) for name in imported(node, package)}


def top_level_imports(path: Path) -> set[str]:
    """Imports that run when the module is imported."""
    names: set[str] = set()
    stack: list[ast.AST] = [tree_of(path)]
    while stack:
        node = stack.pop()
        names |= set(imported(node, path.parent.name))
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def internal(path: Path) -> set[str]:
    """Modules of the package that a module imports."""
    parts = [name.split(".") for name in imports(path)]
    return {part[1] for part in parts if part[0] == "pyronat" and len(part) > 1} & set(modules())


MODULES = modules()
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}


def test_every_module_has_its_floor() -> None:
    assert set(FLOOR) == set(MODULES), "give a new module its place in LAYERS"
    assert sum(map(len, LAYERS)) == len(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    for other in internal(MODULES[name]):
        assert FLOOR[other] < FLOOR[name] or (FLOOR[other] == FLOOR[name] and other == name), (
            f"{name} imports {other}, which is not below it"
        )


def test_imports_are_acyclic() -> None:
    graph = nx.DiGraph((name, other) for name, path in MODULES.items() for other in internal(path))
    assert nx.is_directed_acyclic_graph(graph)
    assert len(graph.edges) > 20, "the imports were not read"


@pytest.mark.parametrize("name", MODULES)
def test_who_imports_torch_and_pyro(name: str) -> None:
    found = roots(imports(MODULES[name]))
    assert name not in WITHOUT_TORCH or not found & {"torch", "pyro"}
    assert ("pyro" in found) == (name in WITH_PYRO)


@pytest.mark.parametrize("name", MODULES)
def test_only_runtime_dependencies(name: str) -> None:
    path = MODULES[name]
    known = RUNTIME | {"pyronat"} | sys.stdlib_module_names
    assert roots(top_level_imports(path)) <= known
    assert roots(imports(path)) <= known | LAZY


def test_declared_dependencies_are_the_imported_ones() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("dependencies = ")]
    declared = {
        spec.split(">")[0] for spec in ast.literal_eval(line.removeprefix("dependencies = "))
    }
    assert {name.replace("pyro-ppl", "pyro") for name in declared} == RUNTIME


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("**/*.py")), ids=lambda p: p.stem)
def test_models_are_plain_pyro(path: Path) -> None:
    assert not roots(imports(path)) & {"pyronat", "examples", "tests"}


@pytest.mark.parametrize("name", MODULES)
def test_the_package_knows_no_models(name: str) -> None:
    assert not roots(imports(MODULES[name])) & {"models", "examples", "tests"}


# --- sizes -------------------------------------------------------------------------------------


def docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone: docstrings of modules, classes, functions, attributes."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def code_lines(source: str) -> set[int]:
    """Lines with code, without comments and docstrings."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    return lines - docstring_lines(ast.parse(source))


def test_code_lines_are_counted() -> None:
    source = '"""Doc."""\n\n# comment\nX = 1\n"""About\nX."""\n'
    source += 'def f():\n    """Doc."""\n    return (\n        1\n    )\n'
    assert code_lines(source) == {4, 7, 9, 10, 11}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_small(name: str) -> None:
    assert len(code_lines(MODULES[name].read_text())) <= MAX_CODE_LINES


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_small(name: str) -> None:
    source = MODULES[name].read_text()
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            assert size <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {size} lines"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_have_few_parameters(name: str) -> None:
    for node in ast.walk(tree_of(MODULES[name])):
        public = isinstance(node, ast.FunctionDef) and not (
            node.name.startswith("_") and node.name != "__init__"
        )
        if isinstance(node, ast.FunctionDef) and public:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in arguments if argument.arg != "self"])
            allowed = MORE_PARAMETERS.get(f"{name}.{node.name}", MAX_PARAMETERS)
            assert count <= allowed, f"{name}.{node.name} takes {count} parameters"


@pytest.mark.parametrize("name", MODULES)
def test_one_level_of_inheritance(name: str) -> None:
    """Classes of the package do not inherit from classes that inherit, errors apart."""
    bases = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for path in MODULES.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }
    for node in ast.walk(tree_of(MODULES[name])):
        if isinstance(node, ast.ClassDef) and name != "errors":
            for base in bases[node.name]:
                above = [b for b in bases.get(base, []) if b in bases]
                assert not above, f"{node.name} ← {base} ← {above[0]}"


# --- importing ---------------------------------------------------------------------------------

PROBE = """
import json, logging, sys, warnings
import torch, pyro, networkx
import pyro.infer, pyro.optim, pyro.poutine

OWN_LOGGERS = set()

def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "rng": torch.random.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": [str(entry) for entry in warnings.filters],
        "validation": pyro.infer.util.is_validation_enabled(),
        "checks": torch.distributions.Distribution._validate_args,
        "stack": len(pyro.poutine.runtime._PYRO_STACK),
        "params": sorted(pyro.get_param_store()),
        "loggers": sorted(set(logging.root.manager.loggerDict) - OWN_LOGGERS),
        "handlers": len(logging.root.handlers),
        "patched": [
            id(getattr(owner, name))
            for owner in (torch.Tensor, torch.nn.Module, torch.autograd, pyro, pyro.infer.SVI)
            for name in sorted(vars(owner))
            if callable(getattr(owner, name, None)) and name != "__class__"
            and not isinstance(vars(owner)[name], (classmethod, staticmethod))
        ],
    }

before, loaded = state(), set(sys.modules)
import pyronat
OWN_LOGGERS |= {n for n in logging.root.manager.loggerDict if n.split(".")[0] == "pyronat"}
after = state()
new = sorted({name.split(".")[0] for name in set(sys.modules) - loaded})
torch.set_default_dtype(torch.float64)
torch.Tensor.relu = len
mutant = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "new": new,
    "mutant": [key for key in before if before[key] != mutant[key]],
}))
"""


def test_importing_changes_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, list[str]] = json.loads(run.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert not set(found["new"]) & {"matplotlib", "sklearn", "tqdm", "models", "examples"}
    assert "pyronat" in found["new"]
    # The probe sees changes where there are some.
    assert found["mutant"] == ["dtype", "patched"]


def test_types_are_shipped() -> None:
    """The marker of PEP 561, without which type checkers ignore the annotations."""
    assert (ROOT / "pyronat" / "py.typed").is_file()
    assert 'pyronat = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


def test_public_names() -> None:
    import pyronat

    assert len(pyronat.__all__) == len(set(pyronat.__all__))
    for name in pyronat.__all__:
        assert getattr(pyronat, name).__doc__, f"{name} has no docstring"


def test_every_error_has_one_base() -> None:
    from pyronat import errors

    for name, kind in vars(errors).items():
        if isinstance(kind, type) and kind.__module__ == errors.__name__:
            bases = (errors.PyronatError, errors.PyronatWarning)
            assert issubclass(kind, bases) and kind.__doc__, name


@pytest.mark.parametrize("name", MODULES)
def test_only_errors_of_the_tree_are_raised(name: str) -> None:
    """Errors raised on purpose are of the tree, a few built-in ones, or those that were caught."""
    tree = set(
        node.name for node in ast.walk(tree_of(MODULES["errors"])) if isinstance(node, ast.ClassDef)
    )
    for node in ast.walk(tree_of(MODULES[name])):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            function = node.exc.func
            raised = function.id if isinstance(function, ast.Name) else ast.unparse(function)
            assert raised in tree | {"ValueError", "TypeError", "type(error)"} | CAUGHT, raised
