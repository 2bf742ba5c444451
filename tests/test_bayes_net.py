"""Tests of networks from files: reading, programs, the referee and the way back, against pgmpy."""

import ast
import gzip
import itertools
import math
import re
import socket
from functools import cache
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

import pyronat
from models import bayes_net
from models.bayes_net import DiscreteNet

SMALL = tuple(
    "asia cancer earthquake sachs survey alarm child insurance water hailfinder hepar2 win95pts"
    " munin1 andes".split()
)
"""Networks of at most 223 nodes that pgmpy's own reader reads fast."""
LARGE_TABLES = ("barley", "mildew", "pathfinder")
"""Networks of at most 223 nodes with large tables, of which pgmpy only reads the structure."""
LARGER = tuple("diabetes link munin munin2 munin3 munin4 pigs".split())
FORMATS = ("bif", "net", "xdsl", "xmlbif")
SPRINKLER = """
network "lawn" { property author "unknown"; }
// rain, then the sprinkler; the lawn is wet by either
variable "rain (mm)" { type discrete [ 3 ] { none, 0-5, >5 }; property position = (1, 2); }
variable sprinkler-on { type discrete [2] { yes, no }; }
/* the states of a node vary
   slowest in a table */
variable wet.lawn { type discrete [ 2 ] { "yes" "no" }; }
probability ( sprinkler-on | "rain (mm)" ) {
  (>5) 0.1, 0.9;
  (none) 0.667, 0.332;
  (0-5) 0.499, 0.499;
}
probability ( wet.lawn | Rain (mm), SPRINKLER-ON ) { default 1, 0; (none, no) 0.25, 0.75; }
probability ( "rain (mm)" ) { table 5e-1, .25, 0.25; }
"""


@cache
def grammar(which):
    """pgmpy makes a grammar anew for each file, which takes longer than most files."""
    from pgmpy.readwrite import BIFReader

    return getattr(BIFReader, which)(None)


def pgmpy_network(text):
    from pgmpy.readwrite import BIFReader

    class Reader(BIFReader):
        def get_variable_grammar(self):
            return grammar("get_variable_grammar")

        def get_probability_grammar(self):
            return grammar("get_probability_grammar")

    return Reader(string=text).get_model()


def bundled_text(name):
    import pgmpy

    path = Path(pgmpy.__file__).parent / "utils" / "example_models" / f"{name}.bif.gz"
    return gzip.decompress(path.read_bytes()).decode()


@cache
def referee(name):
    """A bundled network as pgmpy reads it, with zeros for tables if these are large."""
    text = bundled_text(name)
    if name not in SMALL:
        text = re.sub(r"\n *(\([^\n]*\)|table)[^\n]*;(?=\n)", "", text)
    return pgmpy_network(text)


@cache
def load(name):
    return bayes_net.load(name)


def equal_for_pgmpy(net, other, atol=1e-9):
    """Whether a network has pgmpy's nodes, edges, states and probabilities."""
    network = bayes_net.to_pgmpy(net)
    assert set(network.nodes) == set(other.nodes)
    assert set(network.edges) == set(other.edges)
    for node in net.nodes:
        table, expected = network.get_cpds(node), other.get_cpds(node)
        assert table.state_names[node] == expected.state_names[node]
        order = [table.variables.index(member) for member in expected.variables]
        assert table.values.transpose(order) == pytest.approx(expected.values, abs=atol)


def tiny(tables, parents=None, states=None):
    """A network of binary nodes."""
    return DiscreteNet(
        states or {node: ("no", "yes") for node in tables},
        {node: tuple((parents or {}).get(node, "")) for node in tables},
        {node: torch.tensor(table, dtype=torch.float64) for node, table in tables.items()},
    )


def chain():
    return tiny({"a": [0.3, 0.7], "b": [[0.9, 0.1], [0.2, 0.8]]}, {"b": "a"})


# --- reading -----------------------------------------------------------------------------------


def test_all_networks_load_without_a_connection(monkeypatch):
    def no_connection(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket, "socket", no_connection)
    monkeypatch.setattr(socket, "create_connection", no_connection)
    assert bayes_net.bundled() == tuple(sorted(SMALL + LARGE_TABLES + LARGER))
    assert len(bayes_net.bundled()) == 24
    for name in bayes_net.bundled():
        net = load(name)
        assert net.name == name
        assert all(
            torch.allclose(table.sum(-1), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
            for table in net.tables.values()
        )
    assert {name: len(load(name).nodes) for name in ("asia", "andes", "munin")} == {
        "asia": 8,
        "andes": 223,
        "munin": 1041,
    }
    assert all(len(load(name).nodes) <= 223 for name in SMALL + LARGE_TABLES)
    assert all(len(load(name).nodes) > 223 for name in LARGER)


@pytest.mark.parametrize("name", SMALL)
def test_reading_agrees_with_pgmpy(name):
    net, other = load(name), bayes_net.from_pgmpy(referee(name))
    assert set(net.nodes) == set(other.nodes)
    for node in net.nodes:
        assert net.states[node] == other.states[node]
        assert net.parents[node] == other.parents[node]
        torch.testing.assert_close(net.tables[node], other.tables[node], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", (*LARGE_TABLES, "diabetes", "link", "munin", "pigs"))
def test_reading_the_structure_agrees_with_pgmpy(name):
    net, network = load(name), referee(name)
    assert set(net.nodes) == set(network.nodes)
    for node in net.nodes:
        cpd = network.get_cpds(node)
        assert list(net.states[node]) == cpd.state_names[node]
        assert list(net.parents[node]) == cpd.variables[1:]


def test_pgmpy_is_imported_only_where_needed():
    tree = ast.parse(Path(bayes_net.__file__).read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("pgmpy" in ast.unparse(node) for node in top)


def test_quirks_of_the_interchange_format(tmp_path):
    path = tmp_path / "lawn.v2.bif"
    path.write_text(SPRINKLER)
    net = bayes_net.load(path)
    assert net.name == "lawn"
    assert net.nodes == ("rain (mm)", "sprinkler-on", "wet.lawn")
    assert net.states["rain (mm)"] == ("none", "0-5", ">5")
    assert net.states["wet.lawn"] == ("yes", "no")
    assert net.parents["wet.lawn"] == ("rain (mm)", "sprinkler-on")
    # Rows whose entries were rounded are normalized.
    expected = torch.tensor(
        [[0.667 / 0.999, 0.332 / 0.999], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64
    )
    torch.testing.assert_close(net.tables["sprinkler-on"].cpu(), expected)
    wet = net.tables["wet.lawn"].tolist()
    assert wet == [[[1, 0], [0.25, 0.75]], [[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    data = bayes_net.make_data(net, 0, 50)
    assert math.isfinite(
        poutine.trace(bayes_net.make_model(net)).get_trace(data).log_prob_sum().detach()
    )
    (tmp_path / "lawn.bif.gz").write_bytes(gzip.compress(SPRINKLER.encode()))
    assert bayes_net.load(tmp_path / "lawn.bif.gz").states == net.states


def test_a_table_with_parents_is_read_as_pgmpy_does(tmp_path):
    text = (
        "network n {\n}\n"
        "variable a {\n type discrete [ 2 ] { x, y };\n}\n"
        "variable b {\n type discrete [ 3 ] { u, v, w };\n}\n"
        "probability ( a ) {\n table 0.4, 0.6;\n}\n"
        "probability ( b | a ) {\n table 0.1, 0.5, 0.2, 0.25, 0.7, 0.25;\n}\n"
    )
    (tmp_path / "n.bif").write_text(text)
    net = bayes_net.load(str(tmp_path / "n.bif"))
    assert net.tables["b"].tolist() == [[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]
    equal_for_pgmpy(net, pgmpy_network(text))


MALFORMED = {
    "row that does not sum to one": ("(>5) 0.1, 0.9", "(>5) 0.1, 0.4", "'sprinkler-on'.*sum"),
    "no number": ("(>5) 0.1", "(>5) x", "'sprinkler-on' has 'x, 0.9'"),
    "negative": ("(>5) 0.1, 0.9", "(>5) -0.1, 1.1", "'sprinkler-on'.*no probabilities"),
    "not a number": ("(>5) 0.1, 0.9", "(>5) nan, 1", "'sprinkler-on'.*no probabilities"),
    "short row": ("(>5) 0.1, 0.9", "(>5) 1", "'sprinkler-on' has a row of 1 numbers"),
    "long table": ("table 5e-1,", "table 0, 5e-1,", "'rain .* has a row of 4 numbers"),
    "unknown state": ("(>5)", "(>6)", "'sprinkler-on' has a row for unknown states .>6"),
    "missing row": ("(>5) 0.1, 0.9;", "", "'sprinkler-on' lacks 1 rows"),
    "missing table": ('probability ( "rain (mm)" )', "other", r"\['rain \(mm\)'\] have no table"),
    "unknown parent": ("Rain (mm), S", "Snow, S", r"\['Snow'\] in the family of node 'wet.lawn'"),
    "cycle": ('( "rain (mm)" ) {', '( "rain (mm)" | wet.lawn ) { default 1,0,0;', "cycle"),
    "no variables": ("variable", "variables", "declares no variables"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    old, new, message = MALFORMED[case]
    assert old in SPRINKLER
    text = SPRINKLER.replace(old, new)
    if case == "cycle":
        text = text.replace("table 5e-1, .25, 0.25;", "")
    (tmp_path / "n.bif").write_text(text)
    with pytest.raises(ValueError, match=message):
        bayes_net.load(tmp_path / "n.bif")


def test_unknown_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no bundled network 'africa'; there are .*'asia'"):
        bayes_net.load("africa")
    with pytest.raises(ValueError, match=r"cannot read 'n.txt'.*\.bif"):
        bayes_net.load(tmp_path / "n.txt")
    with pytest.raises(FileNotFoundError):
        bayes_net.load(tmp_path / "n.bif")


def test_parts_must_fit_together():
    with pytest.raises(ValueError, match="same nodes"):
        DiscreteNet({"a": ("x",)}, {}, {})
    with pytest.raises(ValueError, match="node 'a' has no states"):
        DiscreteNet({"a": ()}, {"a": ()}, {"a": torch.zeros(0)})
    with pytest.raises(ValueError, match="'b' stands before its parents"):
        tiny({"b": [[1.0, 0.0], [0.0, 1.0]], "a": [0.5, 0.5]}, {"b": "a"})
    with pytest.raises(ValueError, match=r"'b' must have shape \[2, 2\], got \[2\]"):
        tiny({"a": [0.5, 0.5], "b": [0.5, 0.5]}, {"b": "a"})


# --- structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL + LARGE_TABLES)
def test_analysis_agrees_with_pgmpy(name):
    net, other = load(name), referee(name)
    found = pyronat.analyze(bayes_net.make_model(net), bayes_net.make_data(net, 0, 2))
    assert {site.name for site in found.sites} == set(other.nodes)
    for node in net.nodes:
        assert found.parents(node) == set(other.get_parents(node))
        assert found.children(node) == set(other.get_children(node))
        assert found.markov_blanket(node) == set(other.get_markov_blanket(node))
        assert net.markov_blanket(node) == tuple(
            n for n in net.nodes if n in found.markov_blanket(node)
        )


@pytest.mark.parametrize("hidden", [(), ("either",), ("smoke", "tub", "dysp")])
def test_hidden_nodes_are_latent(hidden):
    net = load("asia")
    data = bayes_net.make_data(net, 0, 3, hidden)
    assert data.shape == (3, 8 - len(hidden))
    found = pyronat.analyze(
        bayes_net.make_model(net, hidden), data, guide=bayes_net.make_guide(net, hidden)
    )
    assert {site.name for site in found.sites if site.kind == "latent"} == set(hidden)
    assert {site.name for site in found.guide.sites} == set(hidden)
    # What is hidden does not change the structure.
    assert all(found.parents(node) == set(net.parents[node]) for node in net.nodes)
    assert found.params == tuple(sorted(f"{node}.cpt" for node in net.nodes))
    assert not found.without_fisher


# --- programs ----------------------------------------------------------------------------------


def test_parameters_are_the_tables():
    net = load("asia")
    bayes_net.make_model(net)(bayes_net.make_data(net, 0, 3))
    store = pyro.get_param_store()
    assert set(store) == {f"{node}.cpt" for node in net.nodes}
    for node in net.nodes:
        table = store[bayes_net.cpt_name(net, node)]
        assert table.dtype == torch.get_default_dtype()
        torch.testing.assert_close(table.detach().cpu(), net.smooth().tables[node])
        torch.testing.assert_close(table.detach().cpu(), net.tables[node], rtol=0, atol=2e-5)
    # A deterministic table has zeros, which no simplex coordinates reach.
    assert float(net.tables["either"].min()) == 0
    assert float(store["either.cpt"].detach().min()) == pytest.approx(bayes_net.FLOOR, rel=1e-4)
    assert store["either.cpt"].unconstrained().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["andes", "munin1"])
def test_initial_gradients_are_finite(name, dtype):
    torch.set_default_dtype(dtype)
    net = load(name)
    data = bayes_net.make_data(net, 0, 20)
    trace = poutine.trace(bayes_net.make_model(net)).get_trace(data)
    trace.log_prob_sum().backward()
    for node in net.nodes:
        leaf = pyro.get_param_store()[f"{node}.cpt"].unconstrained()
        assert leaf.dtype == dtype and leaf.grad.isfinite().all()


def log_prob(net, data):
    """Log p(data) of complete data by a loop, in nats."""
    total = 0.0
    for case in data.tolist():
        values = dict(zip(net.nodes, case, strict=True))
        for node in net.nodes:
            index = tuple(values[member] for member in (*net.parents[node], node))
            total += math.log(float(net.tables[node][index]))
    return total


def test_the_program_is_the_network():
    net = load("insurance").smooth()
    data = bayes_net.make_data(net, 0, 20)
    trace = poutine.trace(bayes_net.make_model(net)).get_trace(data)
    expected = log_prob(net, data)
    assert float(trace.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-9)
    total = bayes_net.exact_log_likelihood(net, data).sum()
    assert float(total) == pytest.approx(expected, rel=1e-9)


def z_scores(net, values):
    """How far the frequencies of each state given the parents are from the table."""
    scores = []
    for node in net.nodes:
        table = net.tables[node].flatten(0, -2) if net.parents[node] else net.tables[node][None]
        row = torch.zeros_like(values[node])
        for parent in net.parents[node]:
            row = row * net.size(parent) + values[parent]
        flat = row * net.size(node) + values[node]
        counts = torch.bincount(flat, minlength=table.numel()).reshape(table.shape).double()
        rows = counts.sum(-1, keepdim=True)
        certain = (table == 0) | (table == 1)
        assert torch.equal(counts[certain], (table * rows)[certain])
        usable = ~certain & (rows * table * (1 - table) > 10)
        scores.append(((counts - rows * table) / (rows * table * (1 - table)).sqrt())[usable])
    return torch.cat(scores)


@pytest.mark.parametrize("name", ["asia", "insurance"])
def test_data_follow_the_tables(name):
    net = load(name)
    state = torch.get_rng_state()
    data = bayes_net.make_data(net, 1, 20_000)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())
    assert torch.equal(data, bayes_net.make_data(net, 1, 20_000))
    assert not torch.equal(data, bayes_net.make_data(net, 2, 20_000))
    scores = z_scores(net, dict(zip(net.nodes, data.cpu().unbind(-1), strict=True)))
    assert len(scores) >= 14
    assert float(scores.abs().max()) < 4.5
    hidden = net.nodes[::2]
    kept = [i for i, node in enumerate(net.nodes) if node not in hidden]
    assert torch.equal(bayes_net.make_data(net, 1, 20_000, hidden), data[:, kept])


def test_the_program_samples_from_its_tables():
    net = load("survey").smooth()
    pyro.set_rng_seed(3)
    values = bayes_net.make_model(net, hidden=["E"])(None, 20_000)
    assert list(values) == list(net.nodes)
    scores = z_scores(net, {node: value.cpu() for node, value in values.items()})
    assert len(scores) > 25
    assert float(scores.abs().max()) < 4.5
    assert bayes_net.make_model(net)()["E"].shape == (1,)


def test_names_that_collide():
    # A node may have the name of the plate or of another node's parameter.
    states = {node: ("no", "yes") for node in ("data", "data.cpt")}
    tables = {"data": chain().tables["a"], "data.cpt": chain().tables["b"]}
    net = DiscreteNet(states, {"data": (), "data.cpt": ("data",)}, tables)
    model = bayes_net.make_model(net)
    found = pyronat.analyze(model, bayes_net.make_data(net, 0, 3))
    assert found.parents("data.cpt") == {"data"}
    assert set(pyro.get_param_store()) == {"data.cpt_", "data.cpt.cpt"}
    equal_for_pgmpy(bayes_net.read_back(model, net.states), bayes_net.to_pgmpy(net), 1e-12)


def test_a_node_with_one_state():
    net = tiny({"a": [1.0], "b": [[0.25, 0.75]]}, {"b": "a"}, {"a": ("only",), "b": ("no", "yes")})
    data = bayes_net.make_data(net, 0, 4)
    found = pyronat.analyze(bayes_net.make_model(net), data)
    assert found.parents("b") == {"a"} and found.params == ("b.cpt",)
    back = bayes_net.read_back(bayes_net.make_model(net))
    assert back.tables["b"].tolist() == [pytest.approx([0.25, 0.75])]


def test_wrong_data_are_refused():
    net = load("asia")
    hidden = ("smoke",)
    data = bayes_net.make_data(net, 0, 5, hidden)
    above, below = data.clone(), data.clone()
    above[3, net.observed(hidden).index("tub")] = 2
    below[3, net.observed(hidden).index("tub")] = -1
    model, guide = bayes_net.make_model(net, hidden), bayes_net.make_guide(net, hidden)
    for call in (model, guide, lambda x: bayes_net.exact_log_likelihood(net, x, hidden)):
        call(data)
        for wrong in (data[:, 1:], data.double(), data[0]):
            with pytest.raises(ValueError, match=r"integers .* of shape \[cases, 7\], .* got"):
                call(wrong)
        for wrong in (above, below):
            with pytest.raises(ValueError, match=r"data of node 'tub' must lie in 0\.\.1"):
                call(wrong)
    with pytest.raises(ValueError, match="the guide needs data; there are none for"):
        guide()
    with pytest.raises(ValueError, match=r"hidden nodes \['smog'\] are not in the network 'asia'"):
        bayes_net.make_model(net, ["smoke", "smog"])
    with pytest.raises(ValueError, match=r"hidden nodes \['smog'\]"):
        bayes_net.make_guide(net, "smog")


# --- guides ------------------------------------------------------------------------------------


def test_the_guide_reads_observed_blankets():
    net = load("asia")
    hidden = ("lung", "either")
    guide = bayes_net.make_guide(net, hidden)
    data = bayes_net.make_data(net, 0, 6, hidden)
    trace = poutine.trace(guide).get_trace(data)
    assert [n for n in trace.stochastic_nodes if n != "data"] == ["lung", "either"]
    # Of the blanket of lung, smoke and tub are observed; of either's, tub, bronc, xray, dysp.
    shapes = {name: tuple(value.shape) for name, value in pyro.get_param_store().items()}
    assert shapes == {
        "lung.cpt.guide.weight": (2, 4),
        "lung.cpt.guide.bias": (2,),
        "either.cpt.guide.weight": (2, 8),
        "either.cpt.guide.bias": (2,),
    }
    assert trace.nodes["lung"]["value"].shape == (6,)
    observations = dict(zip(net.observed(hidden), data.unbind(-1), strict=True))
    again = poutine.trace(poutine.replay(guide, trace)).get_trace(observations=observations)
    assert float(again.log_prob_sum().detach()) == pytest.approx(
        float(trace.log_prob_sum().detach())
    )


def test_particles_may_be_vectorized():
    net = load("asia")
    hidden = ("lung", "either")
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    data = bayes_net.make_data(net, 0, 6, hidden)
    model, guide = bayes_net.make_model(net, hidden), bayes_net.make_guide(net, hidden)
    assert math.isfinite(elbo.loss(model, guide, data))


def test_a_guide_of_everything():
    net = chain()
    guide = bayes_net.make_guide(net, net.nodes)
    data = bayes_net.make_data(net, 0, 4, net.nodes)
    assert data.shape == (4, 0)
    assert math.isfinite(Trace_ELBO().loss(bayes_net.make_model(net, net.nodes), guide, data, 4))


def test_the_guide_reaches_a_posterior_that_is_linear():
    # Each child of smoke has no other parent, so that its posterior's logits are linear.
    net = load("asia").smooth()
    data = bayes_net.make_data(net, 0, 50, "smoke")
    model = bayes_net.make_model(net, "smoke")
    guide = config_enumerate(bayes_net.make_guide(net, "smoke"), "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    exact = float(bayes_net.exact_log_likelihood(net, data, "smoke").sum())
    before = -elbo.loss(model, guide, data)
    store = pyro.get_param_store()
    params = [store[name].unconstrained() for name in store if ".guide." in name]
    optimizer = torch.optim.LBFGS(params, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, data)
        loss.backward()
        return loss

    optimizer.step(closure)
    after = -elbo.loss(model, guide, data)
    assert before < exact - 1
    assert exact - 1e-4 < after < exact + 1e-9


# --- the referee -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`pgmpy.estimators.StructureScore` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("asia", ("either", "smoke")),
        ("asia", ("lung", "tub", "either", "bronc", "asia")),
        ("cancer", ("Cancer",)),
        ("cancer", ("Pollution", "Smoker", "Xray")),
        ("earthquake", ("Alarm", "Burglary")),
        ("earthquake", ("Burglary", "Earthquake", "Alarm", "JohnCalls")),
    ],
)
def test_the_referee_agrees_with_pgmpy(name, hidden, monkeypatch):
    from pgmpy.inference import VariableElimination

    monkeypatch.setattr(bayes_net, "_CHUNK_ELEMENTS", 64)
    net = load(name)
    observed = net.observed(hidden)
    joint = VariableElimination(referee(name)).query(list(observed), show_progress=False)
    table = torch.tensor(joint.values.tolist(), dtype=torch.float64)
    table = table.permute([joint.variables.index(node) for node in observed])
    cases = torch.tensor(list(itertools.product(*(range(net.size(node)) for node in observed))))
    found = bayes_net.exact_log_likelihood(net, cases, hidden).exp()
    torch.testing.assert_close(found, table.flatten().cpu(), rtol=1e-10, atol=1e-15)


def test_the_referee_agrees_with_pyro():
    net = load("sachs").smooth()
    hidden = ("PKC", "Raf", "Erk")
    data = bayes_net.make_data(net, 0, 10, hidden)
    model = config_enumerate(bayes_net.make_model(net, hidden), "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda data: None, data)
    exact = bayes_net.exact_log_likelihood(net, data, hidden)
    assert exact.shape == (10,)
    assert float(exact.sum()) == pytest.approx(-loss, rel=1e-9)


def test_the_referee_sums_many_hidden_nodes():
    net = load("andes")
    hidden = [node for i, node in enumerate(net.nodes) if i % 3 == 0]
    data = bayes_net.make_data(net, 0, 5, hidden)
    visible = bayes_net.exact_log_likelihood(net, data, hidden)
    complete = bayes_net.exact_log_likelihood(net, bayes_net.make_data(net, 0, 5))
    assert bool((visible > complete).all())
    nothing = data[:, :0]
    leaves_only = bayes_net.exact_log_likelihood(load("alarm"), nothing, load("alarm").nodes)
    torch.testing.assert_close(leaves_only, torch.zeros_like(leaves_only), rtol=0, atol=1e-10)


def test_the_referee_knows_impossible_cases():
    net = tiny({"a": [1.0, 0.0], "b": [[0.5, 0.5], [0.5, 0.5]]}, {"b": "a"})
    cases = torch.tensor([[0, 0], [1, 0]])
    assert bayes_net.exact_log_likelihood(net, cases).tolist() == [math.log(0.5), -math.inf]
    assert bayes_net.exact_log_likelihood(net, cases[:, :1], "b").tolist() == [0, -math.inf]


def test_the_referee_refuses_what_is_too_large(monkeypatch):
    monkeypatch.setattr(bayes_net, "MAX_STATES", 3)
    with pytest.raises(ValueError, match="needs 4 joint states"):
        bayes_net.exact_log_likelihood(chain(), torch.zeros(1, 0, dtype=torch.long), ["a", "b"])


# --- the way back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cancer", "earthquake", "survey", "alarm", "insurance", "water"])
def test_programs_are_read_back(name):
    net = load(name)
    model = bayes_net.make_model(net, net.nodes[1::3])
    back = bayes_net.read_back(model, net.states, name)
    equal_for_pgmpy(back, bayes_net.to_pgmpy(net.smooth()))
    if min(float(table.min()) for table in net.tables.values()) >= bayes_net.FLOOR:
        equal_for_pgmpy(back, referee(name))
    else:
        most = max(map(net.size, net.nodes))
        equal_for_pgmpy(back, referee(name), atol=most * bayes_net.FLOOR)


def test_trained_programs_are_read_back():
    net = load("sachs")
    assert bayes_net.learned(net).tables.keys() == net.tables.keys()
    model = bayes_net.make_model(net)
    model()
    with torch.no_grad():
        for name in pyro.get_param_store():
            leaf = pyro.get_param_store()[name].unconstrained()
            leaf.copy_(torch.randn_like(leaf))
    back, learned = bayes_net.read_back(model, net.states), bayes_net.learned(net)
    equal_for_pgmpy(back, bayes_net.to_pgmpy(learned), atol=1e-12)
    assert float((learned.tables["PKA"] - net.tables["PKA"]).abs().max()) > 0.01


def test_reading_back_finds_what_a_program_does():
    # The program is written by hand, with its parents' axes in another order, and has a bug.
    net = load("cancer")

    def model(data=None, num_cases=1):
        tables = {node: table.to(torch.get_default_device()) for node, table in net.tables.items()}
        with pyro.plate("cases", num_cases):
            smoker = pyro.sample("Smoker", pyro.distributions.Categorical(tables["Smoker"]))
            air = pyro.sample("Pollution", pyro.distributions.Categorical(tables["Pollution"]))
            probs = tables["Cancer"][smoker if mutant else air, air if mutant else smoker]
            cancer = pyro.sample("Cancer", pyro.distributions.Categorical(probs))
            pyro.sample("Dyspnoea", pyro.distributions.Categorical(tables["Dyspnoea"][cancer]))
            pyro.sample("Xray", pyro.distributions.Categorical(tables["Xray"][cancer]))

    mutant = False
    back = bayes_net.read_back(model, net.states)
    assert back.parents["Cancer"] == ("Smoker", "Pollution")
    assert net.parents["Cancer"] == ("Pollution", "Smoker")
    equal_for_pgmpy(back, referee("cancer"))
    mutant = True
    with pytest.raises(AssertionError):
        equal_for_pgmpy(bayes_net.read_back(model, net.states), referee("cancer"))


def test_only_categorical_sites_are_read_back():
    def model(data=None, num_cases=1):
        with pyro.plate("data", num_cases):
            pyro.sample("a", pyro.distributions.Bernoulli(0.5))

    with pytest.raises(ValueError, match="site 'a' is not categorical"):
        bayes_net.read_back(model)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["asia", "cancer"])
def test_written_files_are_read_again(name, file_format, tmp_path):
    net = load(name)
    path = tmp_path / f"{name}.{file_format}"
    bayes_net.to_pgmpy(net).save(str(path), filetype=file_format)
    back = bayes_net.load(path)
    assert back.name == name
    equal_for_pgmpy(back, referee(name), atol=1e-12)
    data = bayes_net.make_data(net, 0, 5)
    columns = [net.nodes.index(node) for node in back.nodes]
    torch.testing.assert_close(
        bayes_net.exact_log_likelihood(back, data[:, columns]),
        bayes_net.exact_log_likelihood(net, data),
    )


@pytest.mark.parametrize("name", ["alarm", "andes", "child", "sachs"])
def test_learned_networks_survive_a_file(name, tmp_path):
    net = load(name).smooth()
    bayes_net.make_model(net)()
    learned = bayes_net.learned(net)
    bayes_net.to_pgmpy(learned).save(str(tmp_path / "n.bif"))
    equal_for_pgmpy(bayes_net.load(tmp_path / "n.bif"), bayes_net.to_pgmpy(learned), atol=1e-12)
