"""Every program of the zoo trains with the defaults, agrees with its referee, keeps its structure.

Each program of `models/registry.py` has a row in `TABLE`: how it is trained here and where it must
end, by geometry, in nats per datum. Only the learning rate and the geometry are given; without a
metric, neither model nor guide has one. The structure that pyronat finds in each is pinned as text
in `tests/reports/`. After a change that is meant, rewrite them and read the difference:

    PYRONAT_REWRITE_REPORTS=1 python -m pytest tests/test_zoo.py -k report
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

import pyronat
from models.registry import Data, Program, Trainable, programs
from models.values import as_default, normal
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, Visible
from pyronat.errors import BlockTooLarge, NoGuideOnDreams, PyronatError
from pyronat.geometry import Geometry
from pyronat.steps import LinearDecay

ROOT = Path(__file__).parents[1]
REPORTS = Path(__file__).with_name("reports")
PROGRAMS = programs()
HELPERS = {"__init__", "values", "softmax", "registry", "bayes_net"}
"""Files of models/ that are no programs; those of bayes_net are made by hidden_nodes."""
ENUMERATED = [name for name, program in PROGRAMS.items() if program.objective == "enumeration"]
EXACT = [name for name in ENUMERATED if name != "lda"]
EXACT += ["factor analysis", "ppca", "linear Gaussian", "state space", "fvsbn"]
"""Programs whose loss is the exact negative log likelihood, whatever their guide draws."""
MACHINES = [name for name, program in PROGRAMS.items() if program.objective == "wake-sleep"]
EVIDENCES = ["linear regression", "logistic regression", "eight schools"]
"""Programs whose evidence is known."""
NO_REFEREE = ["sparse gamma def", "vae", "dmm"]
LEARNERS = [*ENUMERATED, "factor analysis", "ppca", "linear Gaussian", "state space"]
"""Programs with an exact step of EM."""


# --- the table ---------------------------------------------------------------------------------


Window = tuple[float, float]
"""Smallest loss that is believed and largest one that passes, in nats per datum."""


@dataclass(frozen=True)
class Refusal:
    """An error that is expected in place of a training.

    Attributes:
        error: Its class.
        word: What its message says.
    """

    error: type[PyronatError]
    word: str


@dataclass(frozen=True)
class Row:
    """How a program is trained here, and where it must end.

    Attributes:
        size: Number of data.
        steps: Number of steps.
        euclidean: End of a training without a metric, of model and guide.
        full: End of a training in the default geometry.
        visible: End of a training in the visible geometry, where something is hidden.
        particles: Samples of the guide at each step.
        batch: Number of data per step, or None for all.
        judges: Samples of the guide for the final loss, where no likelihood is known.
        adam: Rate of Adam where there is no metric, in place of the default.
    """

    size: int
    steps: int
    euclidean: Window
    full: Window
    visible: Window | Refusal | None = None
    particles: int = 1
    batch: int | None = None
    judges: int = 0
    adam: float | None = None


BLOCK = Refusal(BlockTooLarge, "dense")  # networks of more than 2048 entries are held in factors
READS_DATA = Refusal(NoGuideOnDreams, "observations")  # the guide takes all notes as one tensor
TABLE: dict[str, Row] = {
    # Mixtures and chains, summed out. Low ends: EM from four starts, and a little less.
    "mixture": Row(200, 60, (3.055, 3.098), (3.055, 3.080), (3.055, 3.066)),
    "latent class": Row(200, 60, (5.427, 5.460), (5.427, 5.453), (5.427, 5.443)),
    "noisy-or": Row(200, 60, (6.523, 6.534), (6.523, 6.540), (6.523, 6.535)),
    "hmm": Row(200, 60, (6.518, 6.590), (6.518, 6.565), (6.518, 6.540)),
    # The visible geometry stays on a plateau for half of the seeds.
    "experts": Row(442, 150, (0.988, 1.015), (0.988, 0.990), (0.988, 1.120)),
    "lda": Row(10, 20, (30.5, 34.5), (30.5, 35.5), Refusal(NoGuideOnDreams, "topic")),
    # Exact posteriors as guides, or nothing hidden. Low ends: EM, or the known optimum.
    "factor analysis": Row(200, 60, (15.773, 16.20), (15.773, 15.785), (15.773, 15.780)),
    "ppca": Row(200, 50, (17.4076, 17.54), (17.4076, 17.4085)),
    "linear Gaussian": Row(200, 60, (11.589, 11.80), (11.589, 11.65), (11.589, 11.64)),
    "state space": Row(100, 40, (84.95, 87.2), (84.95, 85.3), (84.95, 85.04)),
    "fvsbn": Row(200, 50, (9.0773, 9.12), (9.0773, 9.078)),
    # Wake–sleep on minibatches. Low ends: some seeds, and less; the entropy of the data is far.
    "helmholtz": Row(200, 80, (9.3, 10.6), (9.2, 9.55), (9.0, 9.40), batch=100),
    "bars": Row(200, 80, (4.6, 6.8), (2.7, 4.0), (2.7, 3.55), batch=100),
    "kirby bars": Row(200, 80, (3.1, 4.0), (2.45, 3.2), (2.45, 3.25), batch=100),
    "shifter": Row(200, 80, (3.7, 4.25), (2.85, 3.45), (2.85, 3.45), batch=100),
    # Guides. Low ends: the evidence, or some seeds, and less.
    "linear regression": Row(442, 60, (1.129, 1.75), (1.1295, 1.137), particles=20, judges=1000),
    # The default without a metric stands still from step 5 on, as the guide's scale has shrunk.
    "logistic regression": Row(
        200, 60, (0.1475, 0.30), (0.1475, 0.17), particles=20, judges=1000, adam=0.03
    ),
    "eight schools": Row(8, 100, (3.912, 3.99), (3.912, 3.97), particles=20, judges=1000),
    "sparse gamma def": Row(50, 150, (175.0, 193.0), (165.0, 196.0), judges=10),
    "vae": Row(200, 150, (24.0, 26.4), (17.0, 20.0), BLOCK, batch=100, judges=50),
    # So few steps reach the plateau of notes that do not depend on the code.
    "dmm": Row(60, 40, (60.0, 67.0), (50.0, 68.5), READS_DATA, batch=30, judges=20),
    # Discrete networks with hidden nodes. Low ends: EM from four starts, and a little less.
    "earthquake": Row(200, 60, (0.542, 0.590), (0.542, 0.575), (0.542, 0.544)),
    "cancer": Row(200, 60, (2.0095, 2.0140), (2.0095, 2.0106), (2.0095, 2.0100)),
    "survey": Row(200, 60, (3.444, 3.465), (3.444, 3.452), (3.444, 3.447)),
    "asia": Row(200, 60, (2.028, 2.080), (2.028, 2.160), (2.028, 2.035)),
    "sachs": Row(200, 60, (7.69, 7.80), (7.69, 7.85), (7.69, 7.97)),
    "child": Row(200, 30, (11.66, 11.95), (11.66, 11.84), (11.66, 11.80)),
    "alarm": Row(200, 20, (13.67, 15.2), (13.67, 14.1), (13.67, 14.1)),
    "insurance": Row(200, 20, (17.88, 18.75), (17.88, 18.35), (17.88, 18.35)),
}
CASES = [
    (name, geometry)
    for name, row in TABLE.items()
    for geometry in ("euclidean", "full", "visible")
    if getattr(row, geometry) is not None
]


def test_every_model_file_is_in_the_registry() -> None:
    files = {path.stem for path in (ROOT / "models").glob("*.py")}
    assert files - HELPERS == {program.module for program in PROGRAMS.values()}
    assert HELPERS <= files


def test_every_program_has_a_row() -> None:
    assert set(TABLE) == set(PROGRAMS)
    for name, row in TABLE.items():
        assert (row.visible is not None) == PROGRAMS[name].hidden, name


def test_reports_are_those_of_the_programs() -> None:
    assert {path.name for path in REPORTS.iterdir()} == {report_path(n).name for n in PROGRAMS}


# --- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a training did, in nats per datum.

    Attributes:
        start: Loss before it.
        end: Loss after it.
        trainable: What was trained.
        data: On which data.
    """

    start: float
    end: float
    trainable: Trainable
    data: Data


def loss_of(program: Program, particles: int = 1) -> ELBO:
    """The loss that a program is trained by."""
    if program.objective == "wake-sleep":
        return pyronat.ReweightedWakeSleep(num_particles=10)
    if program.objective == "enumeration":
        return TraceEnum_ELBO(max_plate_nesting=program.plates)
    return Trace_ELBO(
        num_particles=particles,
        vectorize_particles=particles > 1,
        max_plate_nesting=program.plates,
    )


def judged(program: Program, trainable: Trainable, data: Data, judges: int) -> float:
    """Exact negative log likelihood per datum, or else the negative ELBO of many samples."""
    if trainable.log_likelihood is not None:
        return -float(trainable.log_likelihood(*data)) / len(data[0])
    with torch.no_grad():
        loss = loss_of(program, judges).loss(trainable.model, trainable.guide, *data)
    return loss / len(data[0])


def geometry_of(program: Program, name: str) -> Geometry:
    """A geometry with its defaults; the posterior is enumerated where there is no guide."""
    if name == "euclidean":
        return Euclidean()
    if name == "full":
        return Full()
    enumerated = program.objective == "enumeration" and program.name != "lda"
    return Visible(posterior="enumerate") if enumerated else Visible()


def batches(row: Row, data: Data, seed: int) -> Iterator[Data]:
    """The data of each step."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(row.steps):
        if row.batch is None:
            yield data
        else:
            chosen = torch.randperm(len(data[0]), generator=generator, device="cpu")
            yield tuple(value[chosen[: row.batch].to(value.device)] for value in data)


def train(name: str, geometry: str, seed: int = 0) -> Training:
    """Trains a program as its row says.

    Args:
        name: Its name.
        geometry: "euclidean", "full" or "visible".
        seed: Of what happens in training; data and initial values stay the same, where they are
            not drawn by Pyro.

    Returns:
        What it did.
    """
    program, row = PROGRAMS[name], TABLE[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    trainable, data = program.make(0), program.make_data(0, row.size)
    start = judged(program, trainable, data, row.judges)
    plain = geometry == "euclidean"
    optim = NaturalGradient(
        lr=LinearDecay(0.5, row.steps),
        geometry=geometry_of(program, geometry),
        guide_geometry=Euclidean() if plain else None,
        others=pyro.optim.Adam({"lr": row.adam}) if plain and row.adam else None,
        seed=seed,
    )
    svi = NaturalSVI(trainable.model, trainable.guide, optim, loss_of(program, row.particles))
    for batch in batches(row, data, seed):
        svi.step(*batch)
        trainable.after_step()
    return Training(start, judged(program, trainable, data, row.judges), trainable, data)


@pytest.mark.filterwarnings("ignore::pyronat.errors.WithoutFisher")
@pytest.mark.parametrize(("name", "geometry"), CASES)
def test_training_ends_in_its_window(name: str, geometry: str) -> None:
    expected = getattr(TABLE[name], geometry)
    if isinstance(expected, Refusal):
        with pytest.raises(expected.error, match=expected.word):
            train(name, geometry)
        return
    training, (low, high) = train(name, geometry), expected
    if SAME_DATA:
        assert low <= training.end <= high
    # The window tells a training from none, and from a bad one.
    for end in (training.end, high):
        assert (training.start - end) / (training.start - low) >= LEAST_WAY
    noise = 0.01 if TABLE[name].judges else 1e-9
    for known in (training.trainable.optimum, training.trainable.bound):
        if known is not None:
            assert training.end >= -float(known(*training.data)) / len(training.data[0]) - noise


LEAST_WAY = 0.3
"""Share of the way from the start to the low end that every training makes."""
_EQUAL = torch.ones(100, 3, dtype=torch.float64, device="cpu")
_DRAWN = torch.multinomial(_EQUAL, 1, generator=torch.Generator("cpu").manual_seed(0))
SAME_DATA = int(_DRAWN.sum()) == 110
"""Whether torch draws the data that the windows are of: early releases draw other ones."""


# --- referees ----------------------------------------------------------------------------------


def prepared(name: str, size: int, spread: float = 0.0) -> tuple[Trainable, Data]:
    """A program whose parameters are in the store, and data.

    Args:
        name: Its name.
        size: Number of data.
        spread: Standard deviation of what is added to each free parameter.

    Returns:
        The program, and data.
    """
    program = PROGRAMS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trainable, data = program.make(0), program.make_data(0, size)
    loss_of(program).loss(trainable.model, trainable.guide, *data)
    with torch.no_grad():
        for _, value in pyro.get_param_store().named_parameters():
            value += spread * torch.randn(value.shape)
    return trainable, data


def exact(trainable: Trainable, data: Data) -> float:
    """The exact log likelihood in nats."""
    assert trainable.log_likelihood is not None
    return float(trainable.log_likelihood(*data))


def test_every_program_has_a_referee_or_is_said_to_have_none() -> None:
    judged = [*EXACT, *MACHINES, *EVIDENCES, "lda", *NO_REFEREE]
    assert sorted(judged) == sorted(PROGRAMS)
    for name in NO_REFEREE:
        trainable = PROGRAMS[name].make(0)
        assert trainable.log_likelihood is trainable.optimum is trainable.bound is None


def test_every_step_of_em_is_tested() -> None:
    steps = [name for name, program in PROGRAMS.items() if program.make(0).em_step is not None]
    assert sorted(LEARNERS) == sorted(steps)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("name", EXACT)
def test_the_loss_is_the_exact_likelihood(name: str, spread: float) -> None:
    """For every sample of a guide, as the guides are exact posteriors."""
    trainable, data = prepared(name, 30, spread)
    optim = NaturalGradient()
    svi = NaturalSVI(trainable.model, trainable.guide, optim, loss_of(PROGRAMS[name]))
    expected = -exact(trainable, data)
    for _ in range(2):
        assert svi.evaluate_loss(*data) == pytest.approx(expected, rel=1e-8)
    # The referee follows the parameters.
    start, _ = prepared(name, 30)
    assert (spread == 0.0) == (-exact(start, data) == pytest.approx(expected, rel=1e-8))


def z_score(estimates: Tensor, expected: float) -> float:
    """How many standard errors the mean of estimates is off."""
    error = estimates.std() / len(estimates) ** 0.5
    return float((estimates.mean() - expected) / error)


@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("name", MACHINES)
def test_importance_weights_average_to_the_likelihood(name: str, spread: float) -> None:
    trainable, (x,) = prepared(name, 3, spread)
    loss = pyronat.ReweightedWakeSleep(200, vectorize_particles=True, max_plate_nesting=1)
    for datum in x.split(1):
        losses = [loss.loss(trainable.model, trainable.guide, datum) for _ in range(100)]
        ratios = (-torch.tensor(losses) - exact(trainable, (datum,))).exp()
        assert abs(z_score(ratios, 1.0)) < 4
        assert abs(z_score(ratios, 1.2)) > 4  # it can tell a wrong one


@pytest.mark.parametrize("document", [0, 1])
def test_weights_of_documents_average_to_the_likelihood(document: int) -> None:
    """Shares are drawn, the topics of the words are summed out by Pyro.

    From the prior: weights of draws from the guide have no variance, as in the corners it may have
    less mass than the posterior.
    """
    trainable, data = prepared("lda", 2, 0.3)
    one = tuple(value[document : document + 1] for value in data)
    prior = poutine.block(trainable.model, expose=["share"])
    loss = TraceEnum_ELBO(max_plate_nesting=2)
    losses = [loss.loss(trainable.model, prior, *one) for _ in range(400)]
    ratios = (-torch.tensor(losses) - exact(trainable, one)).exp()
    assert abs(z_score(ratios, 1.0)) < 4
    assert abs(z_score(ratios, 1.5)) > 4


@pytest.mark.parametrize("name", LEARNERS)
def test_em_never_lowers_the_likelihood(name: str) -> None:
    row = TABLE[name]
    trainable, data = prepared(name, row.size, 0.3)
    assert trainable.params is not None and trainable.em_step is not None
    before = exact(trainable, data)
    for step in range(5):
        put(trainable.em_step(trainable.params(), *data))
        after = exact(trainable, data)
        assert after >= before - 1e-9 * abs(before)
        assert step or after > before + 1e-3 * len(data[0])
        before = after


def put(values: dict[str, Tensor]) -> None:
    """Makes these the values in the parameter store."""
    store = pyro.get_param_store()
    for name, value in values.items():
        store[name] = value.clone()  # Pyro's store may keep the tensor itself


def slope(trainable: Trainable, data: Data, values: dict[str, Tensor]) -> float:
    """Derivative of the log likelihood per datum along random directions of the free parameters.

    Args:
        trainable: A program.
        data: Its data.
        values: Where, by name of the parameter.

    Returns:
        The largest of three, in size, by central differences.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    found = []
    for _ in range(3):
        ends = []
        put(values)
        store = dict(pyro.get_param_store().named_parameters())
        ways = {name: as_default(normal(value.shape, generator)) for name, value in store.items()}
        for side in (1, -1):
            put(values)
            with torch.no_grad():
                for parameter, value in pyro.get_param_store().named_parameters():
                    value += side * 1e-4 * ways[parameter]
            ends.append(exact(trainable, data))
        found.append(abs(ends[0] - ends[1]) / 2e-4 / len(data[0]))
    put(values)
    return max(found)


@pytest.mark.parametrize("name", LEARNERS)
def test_em_ends_where_the_gradient_vanishes(name: str) -> None:
    row = TABLE[name]
    trainable, data = prepared(name, row.size)
    assert trainable.params is not None and trainable.em_step is not None
    values = trainable.params()
    start = slope(trainable, data, values)
    for _ in range(EM_STEPS.get(name, 300)):
        values = trainable.em_step(values, *data)
    assert slope(trainable, data, values) < 1e-2 * start


EM_STEPS = {"child": 100, "alarm": 60, "insurance": 100, "experts": 100}
"""Where fewer steps are enough, or 300 take long."""


# --- structure ---------------------------------------------------------------------------------


def report_path(name: str) -> Path:
    """Where the structure of a program is pinned."""
    return REPORTS / f"{name.lower().replace(' ', '-')}.txt"


def report(name: str) -> str:
    """The structure of a program on a few data."""
    program = PROGRAMS[name]
    trainable, data = program.make(0), program.make_data(0, 8)
    net = pyronat.analyze(trainable.model, *data, guide=trainable.guide)
    return f"{name}: {program.summary}\n\n{net}\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_report_is_the_pinned_one(name: str) -> None:
    found, path = report(name), report_path(name)
    if os.environ.get("PYRONAT_REWRITE_REPORTS"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
