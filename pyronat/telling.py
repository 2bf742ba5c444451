"""What is told of programs once they are known: their structure, and who moves what has no metric.

The package logs under the name "pyronat", as `logging` has it, and prints nothing by itself:

* INFO: structure when it is found or grows, checkpoints that are written and read;
* WARNING: steps that are not taken or taken back;
* DEBUG: every measurement of curvature.
"""

from __future__ import annotations

import logging
import warnings

from pyronat.errors import WithoutFisher
from pyronat.optim import NaturalGradient
from pyronat.partition import IRREGULAR, UNREACHED

SHOWN = 5
"""Names that are listed."""

logging.getLogger("pyronat").addHandler(logging.NullHandler())

log = logging.getLogger(__name__)


def tell(optim: NaturalGradient, stacklevel: int) -> None:
    """Logs the structure that an optimizer is bound to, and warns of what it has no metric for.

    Args:
        optim: the optimizer.
        stacklevel: frames between this function and the line of the user.
    """
    for role, side in optim.sides.items():
        net, metric = side.net, type(side.geometry).__name__
        counts = len(net.sites), len(net.blocks), len(net.districts)
        log.info("%s: %d sites, %d blocks, %d districts, %s geometry", role, *counts, metric)
    owned = {name for s in optim.sides.values() for b in s.net.blocks for name in b.params}
    left = {
        name: reason
        for role, side in optim.sides.items()
        for name, reason in side.net.without_fisher
        if (reason.endswith(IRREGULAR) or (role == "guide" and reason == UNREACHED))
        and name not in owned
        and not optim.planner.excludes(name)
    }
    for side in optim.sides.values():
        left.update(side.plan.unmeasured)
    if left and optim.others is None:
        names = ", ".join(sorted(left)[:SHOWN]) + (", …" if len(left) > SHOWN else "")
        warnings.warn(
            f"{names} have no metric ({next(iter(left.values()))}) and take steps of "
            "Adam with rate 1e-3, which may be far from the right one; give "
            'NaturalGradient(others=pyro.optim.Adam({"lr": ...})), or exclude=[...] to keep it so',
            WithoutFisher,
            stacklevel=stacklevel + 1,
        )
