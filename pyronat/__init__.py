"""pyronat: natural gradients for probabilistic programs in Pyro."""

from pyronat import steps, testing
from pyronat.analysis import analyze
from pyronat.blocks import ParamBlock
from pyronat.errors import PyronatError
from pyronat.geometry import Euclidean, Full, Visible
from pyronat.graph import BayesNet, District, Site
from pyronat.infer import NaturalSVI, StepInfo
from pyronat.optim import NaturalGradient
from pyronat.rws import ReweightedWakeSleep
from pyronat.study import Fisher, VisibleFisher, fisher

__all__ = [
    "BayesNet",
    "District",
    "Euclidean",
    "Fisher",
    "Full",
    "NaturalGradient",
    "NaturalSVI",
    "ParamBlock",
    "PyronatError",
    "ReweightedWakeSleep",
    "Site",
    "StepInfo",
    "Visible",
    "VisibleFisher",
    "analyze",
    "fisher",
    "steps",
    "testing",
]
