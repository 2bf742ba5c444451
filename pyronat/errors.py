"""What pyronat raises and warns of on purpose: each names the culprit and the way out."""

from __future__ import annotations


class PyronatError(Exception):
    """Base of every error raised on purpose."""


class UnsupportedDistribution(PyronatError):
    """A site's distribution has no closed-form Fisher information here."""


class NoFisher(UnsupportedDistribution):
    """A site's distribution has no Fisher information, or no density to compute it from."""


class UnsupportedProgram(PyronatError):
    """A program uses a construct whose structure or Fisher cannot be computed soundly."""


class UnsupportedStructure(PyronatError):
    """A block cannot be held in the structure that was asked for."""


class NotEnumerable(PyronatError):
    """An exact expectation was asked for, but the parents cannot be enumerated."""


class BlockTooLarge(PyronatError):
    """A dense block would exceed the size that can be formed and factored."""


class NotPositiveDefinite(PyronatError):
    """A block cannot be factored even with jitter."""


class StructureChanged(PyronatError):
    """Sites, families or parameters differ from those the plan was made for."""


class StockSVI(PyronatError):
    """A `NaturalGradient` was given to the stock `pyro.infer.SVI`."""


class InvalidData(PyronatError):
    """Observed data or an argument is not finite, or a batch is empty."""


class NonFiniteStep(PyronatError):
    """Several steps in a row were rejected because a loss or a step was not finite."""


class Diverged(PyronatError):
    """Several steps in a row were taken back because the loss was worse after them."""


class UnassignedParameter(PyronatError):
    """A parameter belongs to no geometry and no `others` optimizer."""


class UnknownName(PyronatError):
    """A pattern of names matches no parameter that it could be for."""


class CheckpointMismatch(PyronatError):
    """An optimizer state does not fit the optimizer or the program it is loaded into."""


class NoAverage(PyronatError):
    """Averages of the iterates were asked for, but there are none that could be shown."""


class AveragesInPlace(PyronatError):
    """Parameters were to be moved, or exchanged again, while averages stand in their place."""


class NoGuideOnDreams(PyronatError):
    """The guide cannot be run on simulated data."""


class InvalidProgramFile(PyronatError):
    """A file does not give the command line a program that it could run."""


class MissingPackage(PyronatError):
    """What was asked for needs a package that is not installed."""


class PyronatWarning(UserWarning):
    """Base of every warning: training goes on, but perhaps not as it was meant to."""


class WithoutFisher(PyronatWarning):
    """Parameters without a Fisher information are left to an optimizer that nobody has set."""
