"""When a step is taken back: the rule, and what it remembers of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Watch:
    """What is remembered of the losses.

    Attributes:
        mean: running mean of the loss, in nats per datum.
        previous: the last loss.
        variance: running mean of half the squared differences of losses in a row, which a trend
            does not inflate.
        best: lowest mean so far.
        count: losses since the start, or since the statistics began anew.
        factor: on all steps; less than 1 after steps were taken back.
        undone: steps in a row that were taken back.
        kept: steps in a row that were kept, since the factor last changed.
    """

    mean: float = 0.0
    previous: float = 0.0
    variance: float = 0.0
    best: float = math.inf
    count: int = 0
    factor: float = 1.0
    undone: int = 0
    kept: int = 0

    def excess(self, value: float) -> float:
        """How much a loss is above the best mean, in nats per datum; 0 where nothing is known."""
        return value - self.best if self.count else 0.0


@dataclass(frozen=True)
class Rejection:
    """Takes back a step whose loss at the next call is not finite, or worse beyond noise.

    At each call the loss is compared with the running mean of the losses before. Where it is not
    finite, cannot be computed, or is above the lowest mean by more than `rise` nats per datum and
    by more than `deviations` running standard deviations, the last step is suspected: the loss of
    the same batch is evaluated once more, on the same random numbers, at the parameters before the
    step. If it is lower there by at least `share` of the excess, the step was to blame, and not the
    batch: parameters and optimizer go back to where they were before it, all further steps are
    halved, and the call goes on from there. After `patience` steps that were kept the factor
    doubles, up to 1. Steps that would move a parameter out of its support, as where exp overflows
    or a probability becomes exactly 0, are halved before they are taken.

    Costs a copy of the parameters at each step, and one evaluation of the loss at each suspicion.

    Attributes:
        rise: nats per datum, the unit of the loss: data count as often as the loss counts them.
        deviations: running standard deviations, once there are `warm_up` losses.
        share: of the excess that the step must be to blame for.
        max_undone: steps in a row that are taken back; one more raises `Diverged`.
        patience: kept steps until the factor on steps doubles.
        decay: weight of the past in running means.
        warm_up: losses until a standard deviation is known.
    """

    rise: float = 1.0
    deviations: float = 6.0
    share: float = 0.5
    max_undone: int = 6
    patience: int = 5
    decay: float = 0.9
    warm_up: int = 5

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: naming the options.
        """
        positive = self.rise > 0 and self.deviations >= 0 and 0 < self.share <= 1
        counts = min(self.max_undone, self.patience) >= 1 and self.warm_up >= 2
        if not (positive and counts and 0 < self.decay < 1):
            raise ValueError(f"an option of {self} is out of its range")

    def suspects(self, watch: Watch, value: float) -> bool:
        """Whether a loss in nats per datum is worse than noise explains."""
        if not math.isfinite(value):
            return True
        excess = watch.excess(value)
        known = watch.count >= self.warm_up
        return excess > self.rise and (
            not known or excess > self.deviations * math.sqrt(watch.variance)
        )

    def blames(self, watch: Watch, after: float, before: float) -> bool:
        """Whether the last step is to blame for a loss that is suspected.

        Args:
            watch: what is remembered.
            after: loss of the batch after the step, in nats per datum; NaN where there is none.
            before: its loss at the parameters before the step.

        Returns:
            Whether the step has to be taken back.
        """
        if not math.isfinite(before):
            return False
        if not math.isfinite(after):
            return True
        return after - before > max(self.rise / 2, self.share * watch.excess(after))

    def seen(self, watch: Watch, value: float) -> Watch:
        """What is remembered after a loss without suspicion."""
        count = watch.count + 1
        mean = watch.mean + max(1 - self.decay, 1 / count) * (value - watch.mean)
        square = (value - watch.previous) ** 2 / 2 if watch.count else 0.0
        share = max(1 - self.decay, 1 / max(1, watch.count))
        variance = watch.variance + share * (square - watch.variance)
        best = min(watch.best, mean)
        return replace(watch, mean=mean, previous=value, variance=variance, best=best, count=count)

    def anew(self, watch: Watch, value: float) -> Watch:
        """What is remembered where the step was not to blame: the losses have another level now."""
        return replace(watch, mean=value, previous=value, variance=0.0, best=value, count=1)

    def kept(self, watch: Watch) -> Watch:
        """What is remembered after a step was kept."""
        if watch.factor < 1 and watch.kept + 1 >= self.patience:
            return replace(watch, factor=min(1.0, 2 * watch.factor), undone=0, kept=0)
        return replace(watch, undone=0, kept=watch.kept + 1)

    def shorter(self, watch: Watch) -> Watch:
        """What is remembered after a step was taken back, or could not be taken."""
        return replace(watch, factor=watch.factor / 2, undone=watch.undone + 1, kept=0)


DEFAULT = Rejection()
