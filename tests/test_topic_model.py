"""Tests of latent Dirichlet allocation: its corpus, its program and its exact referee."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor
from torch.distributions import transform_to

from models import lda
from models.lda import TopicModel

Params = Mapping[str, Tensor]
Documents = tuple[Tensor, Tensor]

SMALL = [TopicModel(2, 4, 0.5), TopicModel(3, 5, 0.3), TopicModel(3, 3, 2.0), TopicModel(4, 3, 1.0)]
CORPUS = Path(lda.__file__).with_name("corpus.txt")


@pytest.fixture(autouse=True)
def _fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def _name(machine: Any) -> str:
    return "-".join(str(value) for value in vars(machine).values())


def _random(machine: TopicModel, lengths: list[int], seed: int = 0) -> Documents:
    """Documents of random words, with random words beyond their ends too."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (len(lengths), max(lengths))
    words = torch.randint(machine.num_words, shape, generator=generator, device="cpu")
    return words.to(torch.get_default_device()), torch.tensor(lengths)


def _rows(documents: Documents) -> list[list[int]]:
    """The words of each document without padding."""
    return [row[:length].tolist() for row, length in zip(*documents, strict=True)]


def _put(machine: TopicModel, params: Params) -> None:
    """Makes these the values in the parameter store."""
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=machine.constraints[name])


def _topics_gradient(machine: TopicModel, params: Params, documents: Documents) -> Tensor:
    """Gradient of the exact log likelihood in Pyro's unconstrained coordinates of the topics."""
    to_simplex = transform_to(machine.constraints["topics"])
    free = to_simplex.inv(params["topics"]).clone().requires_grad_()
    total = machine.log_likelihood({"topics": to_simplex(free)}, *documents)
    (gradient,) = torch.autograd.grad(total, [free])
    return gradient


def _paths(machine: TopicModel, topics: Tensor, row: list[int]) -> Iterator[tuple[Any, float]]:
    """All topics of the words of a document with their joint probability, θ integrated out."""
    alpha, count = machine.concentration, machine.num_topics
    constant = math.lgamma(count * alpha) - math.lgamma(count * alpha + len(row))
    for path in itertools.product(range(count), repeat=len(row)):
        log_prior = constant + sum(
            math.lgamma(alpha + path.count(topic)) - math.lgamma(alpha) for topic in range(count)
        )
        words = [float(topics[topic, word]) for topic, word in zip(path, row, strict=True)]
        yield path, math.exp(log_prior) * math.prod(words)


def _by_enumeration(machine: TopicModel, topics: Tensor, documents: Documents) -> float:
    return sum(
        math.log(sum(prob for _, prob in _paths(machine, topics, row))) for row in _rows(documents)
    )


def _by_quadrature(
    alpha: float, topics: Tensor, row: list[int], points: int = 4000
) -> tuple[float, float]:
    """Log likelihood of a document of two topics and posterior mean of the first one's share.

    With θ = sin² φ the integrand is a trigonometric polynomial if 2 α is odd, for which the
    midpoint rule is exact.
    """
    angle = (torch.arange(points) + 0.5) * (math.pi / 2 / points)
    share = torch.stack([angle.sin() ** 2, angle.cos() ** 2], -1)
    log_prior = (2 * alpha - 1) * (angle.sin() * angle.cos()).log() + math.log(math.pi / points)
    log_prior = log_prior + math.lgamma(2 * alpha) - 2 * math.lgamma(alpha)
    log_joint = log_prior + (share @ topics[:, row]).log().sum(-1)
    return float(log_joint.logsumexp(0)), float(log_joint.softmax(0) @ share[:, 0])


def _by_polynomial(alpha: float, topics: Tensor, row: list[int]) -> float:
    """Log likelihood of a document of three topics: E of Π_i Σ_k topics[k, w_i] θ_k, expanded."""
    size = len(row) + 1
    coefficients = torch.zeros(size, size)
    coefficients[0, 0] = 1.0
    for word in row:
        first, second, third = topics[:, word]
        new = third * coefficients
        new[1:] += first * coefficients[:-1]
        new[:, 1:] += second * coefficients[:, :-1]
        coefficients = new
    powers = torch.arange(size, dtype=torch.float64)
    third_power = (len(row) - powers[:, None] - powers).clamp(min=0)
    log_moment = (
        torch.lgamma(alpha + powers[:, None])
        + torch.lgamma(alpha + powers)
        + torch.lgamma(alpha + third_power)
        - 3 * math.lgamma(alpha)
        + math.lgamma(3 * alpha)
        - math.lgamma(3 * alpha + len(row))
    )
    return float((coefficients.log() + log_moment).flatten().logsumexp(0))


# --- corpus ------------------------------------------------------------------------------------


def test_documents_are_the_lines_of_the_corpus() -> None:
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 60
    assert all(25 <= len(line.split()) <= 40 for line in lines)
    tokens = [re.sub(r"[^a-z]", " ", line.lower()).split() for line in lines]
    known = lda.vocabulary()
    expected = [[word for word in line if word in known] for line in tokens]
    found = [[known[place] for place in row] for row in _rows(lda.make_data(0))]
    assert sorted(found) == sorted(expected)
    occurrences = Counter(itertools.chain(*tokens))
    frequent = {word for word, count in occurrences.items() if count >= 4}
    assert known == tuple(sorted(frequent - lda.STOP_WORDS))
    assert 80 <= len(known) <= 150 and lda.STOP_WORDS & frequent


def test_data_are_drawn_without_replacement_and_padded_with_zeros() -> None:
    words, lengths = lda.make_data(3)
    assert words.dtype == lengths.dtype == torch.long
    assert words.shape == (60, int(lengths.max())) and int(lengths.min()) >= 5
    beyond = torch.arange(words.shape[1]) >= lengths[:, None]
    assert bool(beyond.any()) and int(words[beyond].abs().sum()) == 0
    rows = {tuple(row) for row in _rows((words, lengths))}
    assert len(rows) == 60
    few = lda.make_data(3, 7)
    assert torch.equal(few[0], words[:7]) and torch.equal(few[1], lengths[:7])
    other = lda.make_data(4)
    assert not torch.equal(other[0], words) and {tuple(row) for row in _rows(other)} == rows


def test_data_are_the_callers_own() -> None:
    first = lda.make_data(0)
    first[0].zero_()
    assert int(lda.make_data(0)[0].sum()) > 0


# --- both --------------------------------------------------------------------------------------


def test_start_and_data_have_their_own_randomness() -> None:
    state = torch.get_rng_state()
    for machine in [*SMALL, TopicModel(seed=5)]:
        params = machine.start(3)
        assert set(params) == set(machine.constraints)
        assert params["topics"].shape == (machine.num_topics, machine.num_words)
        assert params["votes"].shape == (machine.num_words, machine.num_topics)
        for name, value in params.items():
            assert torch.equal(value, machine.start(3)[name])
            assert not torch.equal(value, machine.start(4)[name])
            assert value.dtype == torch.float64 and value.is_contiguous()
            assert bool(machine.constraints[name].check(value).all())
            assert torch.equal(machine.initial[name], machine.start(machine.seed)[name])
        torch.testing.assert_close(params["votes"].sum(-1), torch.ones(machine.num_words))
    assert all(map(torch.equal, lda.make_data(3, 20), lda.make_data(3, 20)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


# --- likelihood --------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", SMALL, ids=_name)
def test_likelihood_by_enumeration_of_the_topics(machine: TopicModel) -> None:
    documents = _random(machine, [1, 5, 3, 4])
    params = machine.start(5)
    expected = _by_enumeration(machine, params["topics"], documents)
    assert float(machine.log_likelihood(params, *documents)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.5])
@pytest.mark.parametrize("length", [3, 40, 600])
def test_likelihood_and_shares_by_quadrature(alpha: float, length: int) -> None:
    machine = TopicModel(2, 6, alpha)
    documents = _random(machine, [length, length // 2])
    params = machine.start(1)
    pairs = [_by_quadrature(alpha, params["topics"], row) for row in _rows(documents)]
    found = machine.log_likelihood(params, *documents)
    assert float(found) == pytest.approx(sum(value for value, _ in pairs), rel=1e-11)
    shares = machine.mean_shares(params, *documents)
    assert shares[:, 0].tolist() == pytest.approx([mean for _, mean in pairs], rel=1e-9)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_likelihood_by_the_expanded_polynomial(alpha: float) -> None:
    machine = TopicModel(3, 30, alpha)
    documents = _random(machine, [40, 33])
    params = machine.start(1)
    expected = sum(_by_polynomial(alpha, params["topics"], row) for row in _rows(documents))
    assert float(machine.log_likelihood(params, *documents)) == pytest.approx(expected, rel=1e-12)


def test_likelihoods_of_all_documents_sum_to_one() -> None:
    machine = TopicModel(3, 4, 0.7)
    params = machine.start(0)
    everything = torch.tensor(list(itertools.product(range(4), repeat=3)))
    three = torch.tensor([3])
    total = sum(float(machine.log_likelihood(params, row[None], three).exp()) for row in everything)
    assert total == pytest.approx(1, abs=1e-12)


def test_gradient_of_the_likelihood() -> None:
    machine = TopicModel(3, 4, 0.7)
    documents = _random(machine, [5, 2, 7])
    topics = machine.start(0)["topics"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: machine.log_likelihood({"topics": value}, *documents), topics
    )


def test_documents_are_independent_and_exchangeable() -> None:
    machine = TopicModel(3, 5)
    words, lengths = _random(machine, [6, 2, 4])
    params = machine.start(2)
    total = machine.log_likelihood(params, words, lengths)
    single = [machine.log_likelihood(params, words[i, None], lengths[i, None]) for i in range(3)]
    torch.testing.assert_close(total, torch.stack(single).sum())
    words[0] = words[0].flip(0)
    words[2, :4] = words[2, :4].roll(1)
    torch.testing.assert_close(machine.log_likelihood(params, words, lengths), total)
    reordered = {"topics": params["topics"].flip(0)}
    torch.testing.assert_close(machine.log_likelihood(reordered, words, lengths), total)


def test_impossible_words() -> None:
    """Entries of the topics may be zero, as after EM on a minibatch."""
    machine = TopicModel(2, 3)
    params = {"topics": torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])}
    documents = _random(machine, [4])[0].fill_(0), torch.tensor([3])
    documents[0][0, 3] = 2  # beyond the end
    documents[0][0, 1] = 1
    expected = _by_enumeration(machine, params["topics"], documents)
    assert float(machine.log_likelihood(params, *documents)) == pytest.approx(expected)
    new = machine.em_step(params, *documents)["topics"]
    assert bool(new.isfinite().all()) and new[:, 2].tolist() == [0, 0]
    documents[0][0, 1] = 2
    assert float(machine.log_likelihood(params, *documents)) == -math.inf


# --- program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [*SMALL, TopicModel()], ids=_name)
def test_the_posterior_makes_the_bound_tight(machine: TopicModel) -> None:
    """With an exact guide every sample's weight is the likelihood, whatever was sampled."""
    documents = _random(machine, [6, 2, 4])
    params = machine.start(2)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, *documents))
    for kind, program in ((TraceEnum_ELBO, machine.model), (Trace_ELBO, machine.collapsed)):
        one = kind(max_plate_nesting=2)
        losses = [-one.loss(program, machine.recognize, *documents) for _ in range(3)]
        assert losses == pytest.approx([exact] * 3, rel=1e-9)
        many = kind(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
        assert -many.loss(program, machine.recognize, *documents) == pytest.approx(exact, rel=1e-9)


def test_recognition_makes_no_parameters_and_follows_them() -> None:
    machine = TopicModel()
    documents = lda.make_data(0, 6)
    first = poutine.trace(machine.recognize).get_trace(*documents)
    assert not list(pyro.get_param_store()) and not first.param_nodes
    _put(machine, machine.start(7))
    second = poutine.trace(machine.recognize).get_trace(*documents)
    assert not second.param_nodes
    value = first.nodes["share"]["value"]
    log_prob = [guide.nodes["share"]["fn"].log_prob(value) for guide in (first, second)]
    assert not log_prob[1].requires_grad
    assert not torch.allclose(*log_prob)
    mean = second.nodes["share"]["fn"].mean[:, 0]
    torch.testing.assert_close(mean, machine.mean_shares(machine.start(7), *documents))


@pytest.mark.parametrize("machine", [*SMALL, TopicModel()], ids=_name)
def test_both_programs_have_the_same_loss(machine: TopicModel) -> None:
    documents = _random(machine, [6, 2, 4])
    _put(machine, machine.start(2))
    losses = []
    for kind, program in ((TraceEnum_ELBO, machine.model), (Trace_ELBO, machine.collapsed)):
        pyro.set_rng_seed(1)
        losses.append(kind(max_plate_nesting=2).loss(program, machine.guide, *documents))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("steps", [0, 10])
def test_likelihood_by_importance_sampling(steps: int) -> None:
    """The mean weight of draws from the guide is the likelihood of each document."""
    machine, many = TopicModel(), 4000
    words, lengths = lda.make_data(0, 12)
    params = machine.start(1)
    for _ in range(steps):
        params = machine.em_step(params, *lda.make_data(0))
    topics = params["topics"]
    few = (0.1 * topics / topics.sum(0)).T.clamp(min=1e-6)  # few votes: a wide proposal
    _put(machine, {"topics": topics, "votes": few})
    with torch.no_grad(), pyro.plate("many", many, dim=-3):
        guide = poutine.trace(machine.guide).get_trace(words, lengths)
        model = poutine.trace(poutine.replay(machine.collapsed, guide)).get_trace(words, lengths)
    guide.compute_log_prob()
    model.compute_log_prob()
    log_weight = (
        model.nodes["share"]["log_prob"][:, :, 0]
        + model.nodes["word"]["log_prob"].sum(-1)
        - guide.nodes["share"]["log_prob"][:, :, 0]
    )
    assert log_weight.shape == (many, 12)
    single = [machine.log_likelihood(params, words[i, None], lengths[i, None]) for i in range(12)]
    ratio = (log_weight - torch.stack(single)).exp()
    error = ratio.std(0) / math.sqrt(many)
    assert 1e-4 < float(error.min()) and float(error.max()) < 0.05
    assert float(((ratio.mean(0) - 1) / error).abs().max()) < 4


@pytest.mark.parametrize("collapsed", [False, True])
def test_gradient_through_the_program_on_average(collapsed: bool) -> None:
    """Draws from the exact posterior give an unbiased gradient of the likelihood."""
    machine = TopicModel(2, 4, 0.5)
    documents = _random(machine, [6, 2, 4])
    params = machine.start(2)
    _put(machine, params)
    kind = Trace_ELBO if collapsed else TraceEnum_ELBO
    elbo = kind(num_particles=50, vectorize_particles=True, max_plate_nesting=2)
    gradients = []
    for _ in range(60):
        program = machine.collapsed if collapsed else machine.model
        elbo.loss_and_grads(program, machine.recognize, *documents)
        leaf = pyro.param("topics").unconstrained()
        gradients.append(-leaf.grad.clone())
        leaf.grad = None
    drawn = torch.stack(gradients)
    error = drawn.std(0) / math.sqrt(len(drawn))
    exact = _topics_gradient(machine, params, documents)
    assert float(error.max()) < 0.05 * float(exact.abs().max())
    assert float(((drawn.mean(0) - exact) / error).abs().max()) < 4


def test_guide_counts_the_votes() -> None:
    machine = TopicModel(3, 5, 0.3)
    documents = _random(machine, [6, 2, 4])
    params = machine.start(2)
    _put(machine, params)
    concentration = torch.full((3, 3), 0.3)
    for document, row in zip(concentration, _rows(documents), strict=True):
        for word in row:
            document += params["votes"][word]
    guide = poutine.trace(machine.guide).get_trace(*documents)
    torch.testing.assert_close(guide.nodes["share"]["fn"].concentration[:, 0], concentration)
    assert list(guide.param_nodes) == ["votes"]


@pytest.mark.parametrize("columns", [0, 3])
def test_padding_has_no_influence(columns: int) -> None:
    machine = TopicModel(3, 5)
    words, lengths = _random(machine, [6, 2, 4])
    beyond = torch.arange(6) >= lengths[:, None]
    other = torch.where(beyond, (words + 1) % 5, words)
    other = torch.cat([other, other[:, :columns]], 1)
    params = machine.start(2)
    _put(machine, params)

    def results(words: Tensor) -> list[Tensor]:
        found = [
            machine.log_likelihood(params, words, lengths),
            machine.mean_shares(params, words, lengths),
            machine.em_step(params, words, lengths)["topics"],
        ]
        for kind, program in ((TraceEnum_ELBO, machine.model), (Trace_ELBO, machine.collapsed)):
            elbo = kind(max_plate_nesting=2)
            found.append(torch.tensor(elbo.loss(program, machine.recognize, words, lengths)))
            pyro.set_rng_seed(1)
            loss = elbo.loss_and_grads(program, machine.guide, words, lengths)
            found.append(torch.tensor(loss))
            for name in ("topics", "votes"):
                leaf = pyro.param(name).unconstrained()
                found.append(leaf.grad.clone())
                leaf.grad = None
        return found

    for before, after in zip(results(words), results(other), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


def test_shapes() -> None:
    machine = TopicModel()
    documents = lda.make_data(0, 7)
    length = documents[0].shape[1]
    guide = poutine.trace(machine.guide).get_trace(*documents)
    for program in (machine.model, machine.collapsed):
        model = poutine.trace(poutine.replay(program, guide)).get_trace(*documents)
        model.compute_log_prob()
        assert model.nodes["share"]["value"].shape == (7, 1, 3)
        assert model.nodes["share"]["log_prob"].shape == (7, 1)
        assert model.nodes["word"]["log_prob"].shape == (7, length)
        assert set(model.param_nodes) == {"topics"}
    sites = [name for name in model.stochastic_nodes if name not in {"documents", "words"}]
    assert sites == ["share"] and model.observation_nodes == ["word"]
    full = poutine.trace(machine.model).get_trace(*documents)
    assert full.nodes["topic"]["value"].shape == (7, length)
    sizes = {name: value.numel() for name, value in pyro.get_param_store().named_parameters()}
    assert sizes == {"topics": 3 * machine.num_words, "votes": 3 * machine.num_words}
    for name, value in machine.initial.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)


def test_training_with_minibatches() -> None:
    machine = TopicModel()
    documents = lda.make_data(0)
    before = float(machine.log_likelihood(machine.initial, *documents))
    svi = SVI(
        machine.model,
        machine.guide,
        pyro.optim.Adam({"lr": 0.1}),
        TraceEnum_ELBO(max_plate_nesting=2),
    )
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(40):
        for some in torch.randperm(60, generator=generator, device="cpu").split(25):
            svi.step(documents[0][some], documents[1][some])
    params = {name: pyro.param(name).detach() for name in machine.constraints}
    for name, value in params.items():
        assert bool(machine.constraints[name].check(value).all())
    after = float(machine.log_likelihood(params, *documents))
    assert after - before > 250
    elbo = TraceEnum_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=2)
    assert 0 < after + elbo.loss(machine.model, machine.guide, *documents) < 60


def test_single_precision() -> None:
    documents = lda.make_data(0)
    exact = float(TopicModel().log_likelihood(TopicModel().initial, *documents))
    torch.set_default_dtype(torch.float32)
    machine = TopicModel()
    params = machine.initial
    assert all(value.dtype == torch.float32 for value in params.values())
    found = machine.log_likelihood(params, *documents)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(exact, rel=1e-6)
    assert machine.mean_shares(params, *documents).dtype == torch.float32
    assert machine.em_step(params, *documents)["topics"].dtype == torch.float32
    for kind, program in ((TraceEnum_ELBO, machine.model), (Trace_ELBO, machine.collapsed)):
        elbo = kind(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
        tight = -elbo.loss(program, machine.recognize, *documents)
        assert tight == pytest.approx(exact, rel=1e-5)
        assert -elbo.loss_and_grads(program, machine.guide, *documents) < exact
    assert pyro.param("topics").dtype == pyro.param("votes").dtype == torch.float32


def test_module_functions() -> None:
    documents = lda.make_data(1, 10)
    machine = TopicModel()
    losses = []
    for model, guide in ((lda.model, lda.guide), (machine.model, machine.guide)):
        pyro.set_rng_seed(3)
        losses.append(TraceEnum_ELBO(max_plate_nesting=2).loss(model, guide, *documents))
    assert losses[0] == losses[1]
    assert machine.num_topics == 3 and machine.num_words == len(lda.vocabulary())


# --- EM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", SMALL, ids=_name)
def test_em_step_by_enumeration(machine: TopicModel) -> None:
    """Expected counts, path by path."""
    documents = _random(machine, [1, 5, 3, 4])
    params = machine.start(1)
    counts = torch.zeros(machine.num_topics, machine.num_words)
    for row in _rows(documents):
        paths = list(_paths(machine, params["topics"], row))
        total = sum(prob for _, prob in paths)
        for path, prob in paths:
            for topic, word in zip(path, row, strict=True):
                counts[topic, word] += prob / total
    new = machine.em_step(params, *documents)
    torch.testing.assert_close(new["topics"], counts / counts.sum(-1, keepdim=True))
    assert torch.equal(new["votes"], params["votes"])
    assert set(machine.em_step({"topics": params["topics"]}, *documents)) == {"topics"}


@pytest.mark.parametrize("seed", range(3))
def test_em_finds_the_subjects(seed: int) -> None:
    """It never decreases the likelihood, and ends where the gradient vanishes, at one optimum."""
    machine = TopicModel()
    documents = lda.make_data(0)
    params = machine.start(seed)
    assert float(_topics_gradient(machine, params, documents).norm()) > 10
    value = float(machine.log_likelihood(params, *documents))
    for _ in range(200):
        params = machine.em_step(params, *documents)
        new = float(machine.log_likelihood(params, *documents))
        assert new >= value - 1e-10 * abs(value)
        value = new
    assert bool(machine.constraints["topics"].check(params["topics"]).all())
    tiny = params["topics"] < 1e-100  # on the edge of the simplex, where logits are infinite
    params["topics"] = torch.where(tiny, 1e-100, params["topics"])
    assert float(_topics_gradient(machine, params, documents).norm()) < 1e-4
    assert value == pytest.approx(OPTIMUM, abs=1e-3)
    topic_of = dict(zip(lda.vocabulary(), params["topics"].argmax(0).tolist(), strict=True))
    subjects = [
        ("bread", "butter", "garlic", "oven"),
        ("boat", "crew", "mast", "tide"),
        ("stars", "orbit", "telescope", "galaxy"),
    ]
    assert all(len({topic_of[word] for word in words}) == 1 for words in subjects)
    assert {topic_of[words[0]] for words in subjects} == {0, 1, 2}
    _check_shares(machine, params, [topic_of[words[0]] for words in subjects])


def _check_shares(machine: TopicModel, params: Params, subjects: list[int]) -> None:
    """Documents about one subject and about two, as the corpus has them in order."""
    _, words, lengths = lda._corpus()
    shares = machine.mean_shares(params, words, lengths)[:, subjects]
    assert shares[:48].argmax(-1).tolist() == [0] * 16 + [1] * 16 + [2] * 16
    pairs = torch.tensor([[0, 1]] * 4 + [[1, 2]] * 4 + [[0, 2]] * 4)
    assert float(shares[:48].amax(-1).mean()) > 0.85
    assert float(shares[48:].gather(1, pairs).amin(-1).mean()) > 0.2


OPTIMUM = -2077.8388
"""Log likelihood of the corpus at the best topics that EM has been seen to find."""


# --- refusals ----------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    for sizes in ((1, 5), (3, 1)):
        with pytest.raises(ValueError, match="at least 2 topics and 2 words"):
            TopicModel(*sizes)
    for concentration in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            TopicModel(concentration=concentration)
    for size in (0, 61):
        with pytest.raises(ValueError, match="between 1 and 60"):
            lda.make_data(0, size)
    machine = TopicModel(2, 4)
    words, lengths = _random(machine, [3, 2])
    functions: list[Callable[..., Any]] = [
        machine.model,
        machine.collapsed,
        machine.guide,
        machine.recognize,
        lambda *documents: machine.log_likelihood(machine.initial, *documents),
    ]
    for bad in ((words.double(), lengths), (words[0], lengths), (words, lengths[:1])):
        for function in functions:
            with pytest.raises(ValueError, match=r"of shape \[documents, length\]"):
                function(*bad)


def test_too_many_states_are_refused() -> None:
    machine = TopicModel(6, 4)
    documents = _random(machine, [40, 3])
    with pytest.raises(ValueError, match=r"2 documents of up to 40 words .* 2443518 counts"):
        machine.log_likelihood(machine.initial, *documents)
    assert math.comb(45, 5) * 2 == 2443518
