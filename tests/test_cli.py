"""The command line as people use it: programs outside the zoo, resume, errors, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

import pyronat
from models.registry import programs
from pyronat.cli import INTERRUPTED, main
from pyronat.graph import BayesNet
from pyronat.loading import importable, load, target_of
from pyronat.training import Batches, start

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "command_line"

COUNTS, LAYERS, REGRESSION = (
    str(HERE / name) for name in ("counts.py", "layers.py:Layers", "regression.py")
)
CHAIN, SPRINKLER = str(HERE / "chain.py"), str(HERE / "sprinkler.py")
PROGRAMS = {
    COUNTS: ("TraceEnum_ELBO", {"kind", "x"}, {"rate", "share"}),
    LAYERS: ("ReweightedWakeSleep", {"h", "x"}, {"decoder$$$weight", "decoder$$$bias"}),
    REGRESSION: ("Trace_ELBO", {"weight", "noise", "y"}, set()),
    CHAIN: ("TraceEnum_ELBO", {f"{v}{t}" for v in "zx" for t in range(4)}, {"move", "emit"}),
    SPRINKLER: (
        "TraceEnum_ELBO",
        {"rain", "sprinkler", "grass"},
        {"rain.cpt", "sprinkler.cpt", "grass.cpt"},
    ),
}
"""Its loss, sites and parameters of the model, by program."""


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def losses(out: str) -> tuple[float, float]:
    """Loss at the start and at the end."""
    found = re.search(r"^loss: (\S+) at the start, (\S+) now", out, re.MULTILINE)
    assert found is not None, out
    return float(found[1]), float(found[2])


def parameters(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return {name: saved["value"] for name, saved in state["parameters"].items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def write(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text("import pyro, torch, pyro.distributions as dist\n" + text)
    return path


# --- programs that are not in the zoo ----------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_inspect(program, capsys):
    _, sites, params = PROGRAMS[program]
    code, out, _ = run(capsys, "inspect", program)
    assert code == 0
    assert f"Sites ({len(sites)})" in out and "Blocks of the full-system" in out
    assert all(re.search(rf"^  {re.escape(name)} ", out, re.MULTILINE) for name in sites)
    code, out, _ = run(capsys, "inspect", program, "--json")
    assert code == 0
    net = BayesNet.from_json(out)
    assert {site.name for site in net.sites} == sites
    assert {name for name in net.params if "guide" not in name.lower()} >= params
    code, out, _ = run(capsys, "inspect", program, "--dot")
    assert code == 0 and out.startswith("digraph") and f'"{min(sites)}"' in out


@pytest.mark.parametrize("program", PROGRAMS)
def test_train(program, capsys, tmp_path):
    loss = PROGRAMS[program][0]
    log = tmp_path / "log.jsonl"
    options = ("--steps", 12, "--metrics", log)
    code, out, err = run(capsys, "train", program, *options)
    assert code == 0
    before, after = losses(out)
    assert after < before
    assert loss in out.splitlines()[0] and f"metrics: {log}" in out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert "step 12 of 12" in err and "KL" in err
    assert ("ESS" in err) == (loss == "ReweightedWakeSleep")


def test_an_average_is_kept_judged_and_resumed(capsys, tmp_path):
    checkpoint = tmp_path / "run.pt"
    options = ("train", COUNTS, "--steps", 12, "--average", "--quiet", "--checkpoint", checkpoint)
    code, out, _ = run(capsys, *options, "--samples", tmp_path / "samples.png")
    assert code == 0 and (tmp_path / "samples.png").stat().st_size > 5000
    _, last = losses(out)
    (line,) = [line for line in out.splitlines() if line.startswith("averaged: ")]
    averaged = float(line.removeprefix("averaged: "))
    assert averaged != last, "it lags behind"
    _, again, _ = run(capsys, *options, "--resume")
    assert line in again and losses(again)[1] == last, "without a step"
    _, plain, _ = run(capsys, "train", COUNTS, "--steps", 12, "--quiet")
    assert losses(plain)[1] == last and "averaged" not in plain
    code, _, err = run(capsys, "train", COUNTS, "--average", "--compare", "full")
    assert code == 2 and "no average" in err


def test_what_is_chosen_is_said(capsys):
    _, _, err = run(capsys, "train", COUNTS, "--steps", 1)
    assert "empty one" in err and "not marked to be: kind" in err
    _, _, err = run(capsys, "train", CHAIN, "--steps", 1)
    assert "empty one" in err and "marked" not in err
    _, _, err = run(capsys, "train", REGRESSION, "--steps", 1, "--quiet")
    assert err == ""


def test_a_missing_guide_is_an_autonormal(capsys, tmp_path):
    text = """
def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    side = pyro.sample("side", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean + side, 1.0), obs=x)

def make_data(seed):
    return torch.zeros(20) + 3
"""
    path = write(tmp_path, text)
    code, out, err = run(capsys, "train", path, "--steps", 150)
    assert code == 0 and "AutoNormal for mean" in err and "TraceEnum_ELBO" in out
    assert abs(pyro.param("AutoNormal.locs.mean").item() - 2.5) < 0.6


def test_sites_that_the_guide_enumerates_are_summed_out(capsys, tmp_path):
    text = (HERE / "counts.py").read_text()
    text += """
def guide(x):
    share = pyro.param("q", torch.full((len(x), 2), 0.5), constraint=dist.constraints.simplex)
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(share), infer={"enumerate": "parallel"})
"""
    _, out, err = run(capsys, "train", write(tmp_path, text), "--steps", 2, "--quiet")
    assert "TraceEnum_ELBO" in out and err == ""
    drawn = write(tmp_path, text.replace(', infer={"enumerate": "parallel"}', ""))
    assert "ReweightedWakeSleep" in run(capsys, "train", drawn, "--steps", 2)[1]


def test_seed_decides(capsys):
    found = [
        losses(run(capsys, "train", LAYERS, "--steps", 5, "--seed", seed)[1]) for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_options_reach_the_training(capsys):
    def final(*options: object) -> float:
        return losses(run(capsys, "train", COUNTS, "--steps", 4, *options)[1])[1]

    usual = final()
    for options in (
        ("--lr", 0.01),
        ("--schedule", "constant"),
        ("--geometry", "visible"),
        ("--geometry", "euclidean"),
        ("--batch-size", 50),
        ("--size", 100),
    ):
        assert final(*options) != usual, options
    few, many = (final("--geometry", "visible", "--mixing", share) for share in (0.1, 1.0))
    assert few != many


def test_epochs_are_counted_in_data(capsys):
    _, out, _ = run(capsys, "train", LAYERS, "--epochs", 2, "--batch-size", 50)
    assert "steps: 6" in out  # 50, 50, 20
    code, _, err = run(capsys, "train", LAYERS, "--epochs", 2, "--steps", 3)
    assert code == 2 and "not allowed" in err


def test_every_datum_is_used_once_in_an_epoch():
    target = target_of(LAYERS)
    with importable(target.path):
        program = start(target, 0).program
    program = program.rows(torch.arange(23))
    batches = Batches(program, 5, seed=3)
    orders = [
        torch.cat([batches(5 * epoch + step).args[0] for step in range(batches.per_epoch)])
        for epoch in range(2)
    ]
    for order in orders:
        assert torch.equal(order.sort(0).values, program.args[0].sort(0).values)
    assert not torch.equal(*orders)
    assert torch.equal(Batches(program, 5, seed=3)(7).args[0], batches(7).args[0])


# --- the zoo -----------------------------------------------------------------------------------


def test_losses_of_the_zoo(monkeypatch):
    """What is chosen for a program is what its registry says that it needs."""
    monkeypatch.chdir(ROOT)
    kinds = {"enumeration": "enum", "elbo": "trace", "wake-sleep": "wake-sleep"}
    for name, program in programs().items():
        target = target_of(name)
        with importable(target.path):
            recipe = start(target, 0, size=20 if program.size > 20 else None)
        assert recipe.loss_name == kinds[program.objective], name
        assert recipe.hidden.nesting == program.plates, name
        assert recipe.notes == (), name


@pytest.mark.parametrize(
    "text",
    [
        "latent class",
        "latent_class",
        "dmm",
        "models/registry.py:latent class",
        "models/mixture.py",
        "models/vae.py",
        "models/vae.py:VAE",
        "models/bayesian_regression.py:linear regression",
    ],
)
def test_programs_of_the_zoo(text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, _ = run(capsys, "inspect", text, "--size", 20)
    assert code == 0 and out.startswith("Sites")


def test_names_of_the_zoo_are_listed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = run(capsys, "inspect", "models/bayesian_regression.py")
    assert code == 1 and err.rstrip().endswith("linear regression, logistic regression")
    code, _, err = run(capsys, "inspect", "nothing")
    assert code == 1 and "eight schools" in err
    monkeypatch.chdir(HERE)
    code, _, err = run(capsys, "inspect", "mixture")
    assert code == 2 and "models/registry.py" in err


# --- missing information -----------------------------------------------------------------------


def test_spectrum(capsys):
    code, out, _ = run(capsys, "inspect", SPRINKLER, "--spectrum", "--json")
    assert code == 0
    found = json.loads(out)["missing_information"]
    shares = [entry["missing"] for entry in found]
    target = target_of(SPRINKLER)
    with importable(target.path):
        program = start(target, 0).program
    exact = pyronat.Visible(mixing=0, posterior="exact")
    fisher = pyronat.fisher(program.model, *program.args, geometry=exact)
    expected = [direction.missing for direction in fisher.missing_information()]
    assert shares == pytest.approx(expected) and max(shares) > 0.99
    assert all(sum(entry["params"].values()) == pytest.approx(1) for entry in found)
    code, out, _ = run(capsys, "inspect", SPRINKLER, "--spectrum")
    assert "Missing information (exact" in out and "rain.cpt" in out.split("Missing")[1]


def test_spectrum_by_enumeration_and_by_guide(capsys, monkeypatch):
    code, out, _ = run(capsys, "inspect", COUNTS, "--spectrum", "--dreams", 400)
    assert code == 0 and "(posteriors exact, 400 dreams)" in out
    monkeypatch.chdir(ROOT)
    options = ("--size", 50, "--spectrum", "--dreams", 400)
    code, out, _ = run(capsys, "inspect", "factor analysis", *options)
    assert code == 0 and "(posteriors by the guide, 400 dreams" in out
    _, out, _ = run(capsys, "inspect", REGRESSION, "--spectrum")
    assert "none: nothing is hidden from a parameter of the model" in out


def test_spectrum_at_trained_parameters(capsys, tmp_path):
    path = tmp_path / "run.pt"
    assert run(capsys, "train", COUNTS, "--steps", 20, "--checkpoint", path)[0] == 0
    asked = ("--spectrum", "--json", "--dreams", 500)
    spectra = [
        run(capsys, "inspect", COUNTS, *asked, *options)[1]
        for options in ((), ("--checkpoint", path))
    ]
    start_, trained = (
        [entry["missing"] for entry in json.loads(text)["missing_information"]] for text in spectra
    )
    assert start_ != pytest.approx(trained, abs=1e-6)
    code, _, err = run(capsys, "inspect", SPRINKLER, "--checkpoint", path)
    assert code == 1 and "CheckpointMismatch" in err and "share" in err
    assert run(capsys, "inspect", COUNTS, "--checkpoint", tmp_path / "no.pt")[0] == 2


# --- checkpoints -------------------------------------------------------------------------------

STOPS = """
import os, signal
count = 0
def after_step():
    global count
    count += 1
    if count == {stop}:
        os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("program", [LAYERS, REGRESSION])
def test_interrupted_and_resumed(program, capsys, tmp_path):
    """An interrupt ends a training after a whole step; resumed, it ends as if there were none."""
    path, _, member = program.partition(".py:")
    source = Path(path if path.endswith(".py") else f"{path}.py").read_text()
    stops = write(tmp_path, source + STOPS.format(stop=7))
    named = f"{stops}:{member}" if member else str(stops)
    options = ("--steps", 16, "--batch-size", 30, "--save-every", 5)
    whole, parts, log = (tmp_path / name for name in ("whole.pt", "parts.pt", "log.jsonl"))
    assert run(capsys, "train", program, *options, "--checkpoint", whole)[0] == 0
    keep = ("--checkpoint", parts, "--metrics", log)
    code, out, err = run(capsys, "train", named, *options, *keep)
    assert code == INTERRUPTED and "steps: 7\n" in out and "--resume" in err
    assert not equal(parameters(parts), parameters(whole))
    code, out, _ = run(capsys, "train", program, *options, *keep, "--resume")
    assert code == 0 and "steps: 16, 7 before" in out
    assert equal(parameters(parts), parameters(whole))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(16))


def test_resume_goes_on(capsys, tmp_path):
    path = tmp_path / "run.pt"
    options = ("--batch-size", 40, "--checkpoint", path, "--resume")
    code, out, err = run(capsys, "train", LAYERS, "--steps", 4, *options)
    assert code == 0 and "from the beginning" in err and "before" not in out
    before = parameters(path)
    code, out, err = run(capsys, "train", LAYERS, "--steps", 9, *options)
    assert code == 0 and re.search(r"steps: [89], [34] before", out) and "beginning" not in err
    assert not equal(before, parameters(path))


def test_all_data_judge_the_last_step(capsys, monkeypatch, tmp_path):
    sizes = []

    def settle(svi, x):
        sizes.append(len(x))
        return True

    monkeypatch.setattr(pyronat.NaturalSVI, "settle", settle)
    _, out, _ = run(capsys, "train", LAYERS, "--steps", 4, "--batch-size", 40)
    assert sizes == [120] and "taken back" in out
    source = (HERE / "counts.py").read_text()
    stops = write(tmp_path, source + STOPS.format(stop=2))
    code, out, _ = run(capsys, "train", stops, "--steps", 4)
    assert code == INTERRUPTED and sizes == [120] and "taken back" not in out


def test_files_are_not_overwritten(capsys, tmp_path):
    path, log = tmp_path / "run.pt", tmp_path / "log.jsonl"
    options = ("--steps", 2, "--checkpoint", path, "--metrics", log)
    assert run(capsys, "train", COUNTS, *options)[0] == 0
    before = path.read_bytes()
    code, _, err = run(capsys, "train", COUNTS, *options)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    assert path.read_bytes() == before
    assert run(capsys, "train", COUNTS, *options, "--overwrite")[0] == 0
    assert len(log.read_text().splitlines()) == 2


def test_a_broken_program_costs_no_files(capsys, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"precious")
    broken = write(tmp_path, "1 / 0\n")
    assert run(capsys, "train", broken, "--checkpoint", path, "--overwrite")[0] == 1
    assert path.read_bytes() == b"precious"


def test_checkpoints_that_do_not_fit(capsys, tmp_path):
    path = tmp_path / "run.pt"
    assert run(capsys, "train", COUNTS, "--steps", 2, "--checkpoint", path)[0] == 0
    resume = ("--checkpoint", path, "--resume", "--steps", 4)
    code, _, err = run(capsys, "train", SPRINKLER, *resume)
    assert code == 1 and err.splitlines()[-1].startswith("pyronat: CheckpointMismatch")
    path.write_bytes(b"no checkpoint")
    code, _, err = run(capsys, "train", COUNTS, *resume)
    assert code == 1 and "cannot be read" in err


# --- wrong usage and bad files -----------------------------------------------------------------

BAD = {
    "syntax": ("def model(:\n    pass\n", "line 2: SyntaxError"),
    "import": ("import no_such_module\n", "line 2: ModuleNotFoundError"),
    "exit": ("import sys\nsys.exit(3)\n", "line 3: SystemExit"),
    "no model": ("def net(x):\n    pass\n", "has no 'model'.*: net"),
    "empty": ("", "nothing that can be called"),
    "no data": ("def model(x, y=None):\n    pass\n", "takes x, but .* make_data"),
    "no function": ("model = 3\n", "model is a int"),
    "data fail": (
        "def model(x):\n    pass\ndef make_data(seed):\n    return 1 / 0\n",
        "line 5: make_data: ZeroDivisionError",
    ),
    "counts hidden": (
        "def model():\n    pyro.sample('n', dist.Poisson(3.0))\n",
        "n cannot be summed out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, capsys, tmp_path):
    text, message = BAD[name]
    path = write(tmp_path, text)
    for command in ("inspect", "train"):
        code, out, err = run(capsys, command, path)
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith("pyronat: InvalidProgramFile: ")
        assert re.search(message, err) and "Traceback" not in err
    with pytest.raises(pyronat.PyronatError, match=message):
        main(["inspect", str(path), "--traceback"])


def test_bad_names(capsys):
    code, _, err = run(capsys, "inspect", str(HERE / "counts.py:nothing"))
    assert code == 1 and "has no 'nothing'; it has: model, make_data" in err
    code, _, err = run(capsys, "inspect", COUNTS, "--guide", "nobody")
    assert code == 1 and "has no 'nobody'" in err
    code, _, err = run(capsys, "inspect", HERE / "layers.py")
    assert code == 1 and "it is, as layers.py:NAME: Layers" in err


def test_errors_of_the_library_have_their_exit_code(capsys, tmp_path):
    text = """
def model(x):
    end = pyro.param("end", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(0.0, end), obs=x)

def make_data(seed):
    return torch.ones(3)
"""
    code, _, err = run(capsys, "inspect", write(tmp_path, text), "--heatmap", tmp_path / "a.png")
    assert code == 1 and "pyronat: " in err.splitlines()[-1]


def test_local_parameters_of_an_autoguide_are_not_batched(capsys, tmp_path):
    text = """
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(1.0)) * z, 1.0), obs=x)

def make_data(seed):
    return torch.ones(30)
"""
    path = write(tmp_path, text)
    assert run(capsys, "train", path, "--steps", 2, "--quiet")[0] == 0
    code, _, err = run(capsys, "train", path, "--steps", 2, "--batch-size", 10)
    assert code == 1 and "each datum of z" in err and "subsample" in err


def test_global_sites_in_batches_are_spoken_of(capsys):
    _, _, err = run(capsys, "train", REGRESSION, "--steps", 1, "--batch-size", 10)
    assert "weight, noise lie outside of all plates" in err
    _, _, err = run(capsys, "train", LAYERS, "--steps", 1, "--batch-size", 10)
    assert "outside" not in err


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("fly", COUNTS),
        ("train",),
        ("train", "no_such_file.py"),
        ("train", COUNTS, "--geometry", "round"),
        ("train", COUNTS, "--steps", "0"),
        ("train", COUNTS, "--lr", "-1"),
        ("train", COUNTS, "--mixing", "2"),
        ("train", COUNTS, "--compare", "adam,best"),
        ("train", COUNTS, "--compare", "adam", "--checkpoint", "run.pt"),
        ("train", COUNTS, "--resume"),
        ("train", COUNTS, "--metrics", "no_such_folder/log.jsonl"),
        ("train", COUNTS, "--device", "abacus"),
        ("train", COUNTS, "--plot", "curve.txt"),
        ("train", COUNTS, "--steps", "many"),
        ("train", COUNTS, "--lr", "fast"),
        ("inspect", COUNTS, "--json", "--dot"),
        ("inspect", COUNTS, "--blanket", "x"),
        ("inspect", COUNTS, "--heatmap", "fisher"),
        ("inspect", COUNTS, "--plot", "no_such_folder/net.png"),
    ],
)
def test_wrong_usage(argv, capsys):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pyronat")
    assert "invalid _" not in err  # a name of ours


def test_ends_that_a_program_brings_about(capsys, tmp_path):
    end = "def model():\n    raise "
    for number, (text, code) in enumerate(
        {
            "SystemExit('enough')": 1,
            "SystemExit(5)": 5,
            "KeyboardInterrupt": INTERRUPTED,
        }.items()
    ):
        assert run(capsys, "inspect", write(tmp_path, end + text, f"e{number}.py"))[0] == code


def test_nothing_is_left_behind():
    before = torch.get_default_dtype(), torch.get_num_threads(), list(sys.path)
    assert main(["inspect", COUNTS, "--double", "--threads", "2", "--dot"]) == 0
    assert (torch.get_default_dtype(), torch.get_num_threads(), list(sys.path)) == before


@pytest.mark.parametrize("command", [(), ("inspect",), ("train",)])
def test_help(command, capsys):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "make_data(seed)" in out and "AutoNormal" in out
    if command == ("train",):
        for option in ("--geometry", "--resume", "--compare", "--metrics", "--batch-size"):
            assert option in out


def test_the_command_is_installed():
    assert (
        '[project.scripts]\npyronat = "pyronat.cli:run"\n' in (ROOT / "pyproject.toml").read_text()
    )
    argv = [sys.executable, "-m", "pyronat", "inspect", SPRINKLER, "--dot"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("digraph")


# --- progress ----------------------------------------------------------------------------------


class Terminal:
    """Standard error as a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", LAYERS, "--steps", "3"]) == 0
    last = terminal.text.rstrip().rpartition("\r")[2]
    assert "3/3" in last
    for name in ("loss=", "KL=", "ESS="):
        assert name in last


def test_lines_without_tqdm(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["train", LAYERS, "--steps", "3"]) == 0
    assert "step 3 of 3  loss" in terminal.text


# --- loading -----------------------------------------------------------------------------------


def test_data_may_be_named_sized_or_missing(tmp_path):
    body = "def model(*args, **kwargs):\n    pass\n"
    cases = {
        "def make_data(seed):\n    return torch.arange(5)\n": (1, {}, 5),
        "def make_data():\n    return torch.arange(5), 'word'\n": (2, {}, 5),
        "def make_data(seed, size=5):\n    return {'x': torch.zeros(size)}\n": (0, {"x"}, 5),
        "": (0, {}, 1),
    }
    for number, (text, (args, kwargs, size)) in enumerate(cases.items()):
        target = target_of(str(write(tmp_path, body + text, f"p{number}.py")))
        program = load(target, seed=1)
        assert (len(program.args), set(program.kwargs), program.size) == (args, set(kwargs), size)
        assert load(target, seed=1, size=3).size == (3 if text else 1)


def test_guides_go_by_the_name_of_the_model(tmp_path):
    names = ("model", "guide", "model_2", "guide_2", "other")
    text = "".join(f"def {name}(): pass\n" for name in names)
    path = write(tmp_path, text)
    for member, guide, expected in (
        ("", "", "guide"),
        ("model_2", "", "guide_2"),
        ("other", "", None),
        ("other", "guide_2", "guide_2"),
    ):
        target = target_of(f"{path}:{member}" if member else str(path), guide)
        program = load(target, seed=0)
        assert program.model.__name__ == (member or "model")
        assert (program.guide and program.guide.__name__) == expected


def test_files_import_their_neighbors(tmp_path):
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("RATE = 2.0\n")
    path = write(package, "from .parts import RATE\ndef model():\n    return RATE\n")
    (tmp_path / "beside.py").write_text("RATE = 3.0\n")
    script = write(tmp_path, "from beside import RATE\ndef model():\n    return RATE\n", "own.py")
    for file, expected in ((path, 2.0), (script, 3.0)):
        target = target_of(str(file))
        with importable(target.path):
            assert load(target, seed=0).model() == expected
        with pytest.raises(pyronat.PyronatError, match="No module"):
            for name in ("house", "house.parts", "beside"):
                sys.modules.pop(name, None)
            load(target, seed=0)
