"""A network from a BIF file, whose rain is hidden."""

from pathlib import Path

from models import bayes_net

NET = bayes_net.load(Path(__file__).with_name("sprinkler.bif"))
HIDDEN = ("rain",)
model = bayes_net.make_model(NET, HIDDEN)


def make_data(seed):
    return bayes_net.make_data(NET, seed, 150, HIDDEN)
