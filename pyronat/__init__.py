"""pyronat: natural gradients for probabilistic programs in Pyro."""

from pyronat import steps, testing
from pyronat.analysis import analyze
from pyronat.blocks import ParamBlock
from pyronat.errors import PyronatError, PyronatWarning
from pyronat.geometry import Euclidean, Full, Visible
from pyronat.graph import BayesNet, District, Site
from pyronat.infer import NaturalSVI
from pyronat.optim import NaturalGradient
from pyronat.presets import streaming
from pyronat.reports import JSONLines, StepInfo
from pyronat.rws import ReweightedWakeSleep
from pyronat.study import Fisher, VisibleFisher, fisher

__all__ = [
    "BayesNet",
    "District",
    "Euclidean",
    "Fisher",
    "Full",
    "JSONLines",
    "NaturalGradient",
    "NaturalSVI",
    "ParamBlock",
    "PyronatError",
    "PyronatWarning",
    "ReweightedWakeSleep",
    "Site",
    "StepInfo",
    "Visible",
    "VisibleFisher",
    "analyze",
    "fisher",
    "steps",
    "streaming",
    "testing",
]
