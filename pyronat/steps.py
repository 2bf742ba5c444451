"""Step rules as small objects: schedules, damping, trust region, averaging, and scaled Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pyronat.rates import Clip as Clip
from pyronat.rates import FromTorch as FromTorch
from pyronat.rates import PerName as PerName
from pyronat.rates import Schedule as Schedule
from pyronat.rejection import Rejection as Rejection


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """The rate."""
        return self.value


@dataclass(frozen=True)
class LinearDecay:
    """lr_t = initial · max(floor, 1 − t / num_steps): for training whose length is known.

    Attributes:
        initial: rate of the first step.
        num_steps: steps until the floor is reached.
        floor: smallest rate, as a share of the initial one.
    """

    initial: float
    num_steps: int
    floor: float = 0.02

    def __call__(self, step: int) -> float:
        """The rate at a step."""
        return self.initial * max(self.floor, 1 - step / self.num_steps)


@dataclass(frozen=True)
class InverseTime:
    """lr_t = max(floor, initial / (1 + t / timescale)), Fisher efficient on streams (Amari 1998).

    Attributes:
        initial: rate of the first step.
        timescale: steps after which the rate is halved.
        floor: smallest rate.
    """

    initial: float
    timescale: float
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate at a step."""
        return max(self.floor, self.initial / (1 + step / self.timescale))


class Damping(Protocol):
    """λ of each unit's system (G_u + λ_u I) x_u = g_u."""

    def __call__(self, mean_diagonal: Tensor, leverage: Tensor, lr: float) -> Tensor:
        """Damping of a block.

        Args:
            mean_diagonal: mean diagonal of each G_u `[count]`.
            leverage: w_ref E‖a‖² × scale of each unit `[count]`.
            lr: current learning rate.

        Returns:
            λ `[count]`, not negative.
        """


@dataclass(frozen=True)
class LeverageDamping:
    """λ_u = relative · mean diag G_u + 4 lr · leverage_u / surprise.

    The second term bounds what one surprising datum does: where a Bernoulli unit is saturated,
    its Fisher information vanishes, but a datum on the unlikely side still has gradient ‖a‖. A
    step then moves that datum's own logit by at most about `surprise`. The term shrinks with the
    learning rate and with the share of one datum in the batch.

    Attributes:
        relative: share of the mean diagonal.
        surprise: bound on the logit's move, in nats.
    """

    relative: float = 0.05
    surprise: float = 3.0

    def __call__(self, mean_diagonal: Tensor, leverage: Tensor, lr: float) -> Tensor:
        """λ `[count]`."""
        return self.relative * mean_diagonal + 4 * lr * leverage / self.surprise


@dataclass(frozen=True)
class ConstantDamping:
    """λ_u = absolute + relative · mean diag G_u.

    Attributes:
        absolute: in the units of the loss.
        relative: share of the mean diagonal.
    """

    absolute: float
    relative: float = 0.0

    def __call__(self, mean_diagonal: Tensor, leverage: Tensor, lr: float) -> Tensor:
        """λ `[count]`."""
        return self.absolute + self.relative * mean_diagonal


@dataclass(frozen=True)
class Searched:
    """State of `LevenbergMarquardt`.

    Attributes:
        value: ρ of a visible geometry, or the relative damping of a full one.
        scale: length of natural steps.
    """

    value: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts a number and the length of steps to how well gains are predicted.

    As `Visible(mixing=LevenbergMarquardt())` the number is ρ, as
    `NaturalGradient(damping=LevenbergMarquardt())` it is the damping relative to the mean diagonal
    of a unit. A step of length η is predicted to gain (η − η²/2) gᵀA⁻¹g nats. The ratio r of actual
    to predicted gain moves the number, and it tells the curvature of the loss along the step in
    units of the metric, h = (2 − r (2 − η)) / η; the next step has length 1/h. Steps without gain
    are undone.

    It judges a step by the loss that made it, on common random numbers: right for whole data sets
    and exact losses, too optimistic for minibatches.

    Attributes:
        initial: the number at the start.
        smallest: its lower bound.
        poor: ratios below this make the number grow by 2.5.
        good: ratios above this make it shrink by 5.
        rejected: ratios up to this undo the step, and the number grows by 4; at 1, the step is
            halved instead.
        shortest: lower bound on η after a step that was kept.
        longest: upper bound on η.
        max_tries: steps that are tried with one gradient.
    """

    initial: float = 1.0
    smallest: float = 1e-12
    poor: float = 0.25
    good: float = 0.6
    rejected: float = 0.05
    shortest: float = 0.4
    longest: float = 1.6
    max_tries: int = 25

    def start(self) -> Searched:
        """The state at the start."""
        return Searched(self.initial)

    def accepts(self, ratio: float) -> bool:
        """Whether a step is kept."""
        return ratio > self.rejected

    def judged(self, now: Searched, ratio: float, length: float | None = None) -> Searched:
        """The state after a step.

        Args:
            now: state of the step.
            ratio: its actual gain over the predicted one; −inf where it was not finite.
            length: η, where a trust region has cut it; else that of the state.

        Returns:
            The state for the next one.
        """
        if not self.accepts(ratio):
            if now.value < 1:
                return Searched(min(1.0, 4 * now.value), now.scale)
            return Searched(1.0, now.scale / 2)
        length = now.scale if length is None else length
        curvature = (2 - ratio * (2 - length)) / length
        best = 1 / curvature if curvature > 0 else self.longest
        scale = min(max(best, self.shortest), self.longest)
        if ratio > self.good:
            return Searched(max(now.value / 5, self.smallest), scale)
        return Searched(min(1.0, 2.5 * now.value) if ratio < self.poor else now.value, scale)


@dataclass(frozen=True)
class Tally:
    """State of `HeldOut`.

    Attributes:
        value: ρ.
        gain: actual gain since ρ was last set, in nats.
        predicted: predicted gain since then, in nats.
        count: steps since then.
        before: parameters before a step that waits for the next batch, by name, or none.
        promised: the gain that its own batch predicted, in nats.
    """

    value: float
    gain: float = 0.0
    predicted: float = 0.0
    count: int = 0
    before: Mapping[str, Tensor] = field(default_factory=dict)
    promised: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Adapts ρ to gains on the next minibatch, which had no part in the step.

    A step is predicted by its own batch to gain (η − η²/2) gᵀA⁻¹g nats. On a fresh batch it gains
    less, the more of the gradient was noise. The ratio of both sums over a number of steps moves ρ:
    where noise rules it goes to 1, the full geometry; where steps hold what they promise it falls.
    Costs one more evaluation of the loss at each step, on the random numbers of the next one.

    Attributes:
        initial: ρ at the start.
        smallest: its lower bound.
        poor: ratios below this double ρ.
        good: ratios above this halve it.
        window: steps that are judged together.
    """

    initial: float = 0.3
    smallest: float = 0.01
    poor: float = 0.25
    good: float = 0.6
    window: int = 10

    def start(self) -> Tally:
        """The state at the start."""
        return Tally(self.initial)

    def judged(self, now: Tally, gain: float) -> Tally:
        """The state after the step that waited has been tried on the next batch.

        Args:
            now: state before.
            gain: gain of the model's step on that batch, in nats.

        Returns:
            The state for the next step.
        """
        gain, predicted = now.gain + gain, now.predicted + now.promised
        count = now.count + 1
        if count < self.window:
            return Tally(now.value, gain, predicted, count)
        ratio = gain / predicted if predicted > 0 else 0.0
        if ratio < self.poor:
            return Tally(min(1.0, 2 * now.value))
        return Tally(max(now.value / 2, self.smallest) if ratio > self.good else now.value)


@dataclass(frozen=True)
class Evidence:
    """State of `CrossValidated`.

    Attributes:
        value: ρ.
        count: batches that were compared.
        sums: of the scores of each candidate, earlier batches counting less.
        squares: the same of the squares of the scores.
        trend: mean gradient of earlier batches by block `[count, size]`, at the parameters before
            the last step; none at the start.
        batches: batches in it.
        changes: the last step by block `[count, size]`; none where it was not taken.
    """

    value: float = 1.0
    count: int = 0
    sums: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    trend: Mapping[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    changes: Mapping[str, Tensor] = field(default_factory=dict)


Caution: TypeAlias = Searched | Tally | Evidence
"""State of an adaptive rule; its `value` is the number that the rule sets."""


@dataclass(frozen=True)
class CrossValidated:
    """Lowers ρ only where batches agree that this gains: `Visible(mixing="auto")`.

    Each batch is new to the mean gradient of those before it. Where their product, summed over the
    directions that the full geometry would not settle in the steps to come, is more than noise
    explains, ρ falls to the first candidate; to the next one, if there is more to gain by that; and
    so on. Else it is 1. Gains are predicted by the metric, and `validation` has the equations. The
    scores of a step are gains over their standard deviation under noise alone, those of earlier
    steps count less and less; a mean counts that exceeds some standard errors. Costs two products
    with the metric at each step, and no evaluation of the loss.

    It asks whether slow directions hold more than noise, not whether a step is good for the next
    batch: noise that a step lets in goes away with the rate, what it leaves behind does not.

    Attributes:
        candidates: values of ρ in falling order, below 1. More of them, as (0.3, 0.1), are faster
            off the plateaus of sigmoid belief networks, and lead mixtures into worse optima.
        errors: standard errors that a mean score has to exceed.
        decay: weight of the past in the mean of scores.
        memory: weight of the past in the mean gradient.
        largest: bound on the size of one score.
    """

    candidates: tuple[float, ...] = (0.3,)
    errors: float = 2.0
    decay: float = 0.95
    memory: float = 0.8
    largest: float = 3.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: naming the option.
        """
        falling = (1.0, *self.candidates, 0.0)
        if not self.candidates or any(a <= b for a, b in pairwise(falling)):
            raise ValueError(f"candidates fall between 1 and 0, not {self.candidates}")
        if not self.errors > 0 or not self.largest > 0:
            raise ValueError(f"errors and largest must be positive, not {self}")
        if not 0 <= self.decay < 1 or not 0 <= self.memory < 1:
            raise ValueError(f"decay and memory must be in [0, 1), not {self}")

    def start(self) -> Evidence:
        """The state at the start: the full geometry."""
        return Evidence()

    def share(self, count: int) -> float:
        """Weight of a new gradient after `count` earlier ones."""
        return max(1 - self.memory, 1 / (count + 1))

    def judged(self, now: Evidence, scores: Sequence[float]) -> Evidence:
        """The state after a batch; what earlier ones have left is as it was.

        Args:
            now: state before.
            scores: of each candidate over the one before it, of variance 1 where noise rules.

        Returns:
            The state for the next step.
        """
        keep, count = self.decay, now.count + 1
        none = (0.0,) * len(self.candidates)
        new = [min(max(score, -self.largest), self.largest) for score in scores]
        sums = tuple(keep * a + b for a, b in zip(now.sums or none, new, strict=True))
        squares = tuple(keep * a + b**2 for a, b in zip(now.squares or none, new, strict=True))
        weight = (1 - keep**count) / (1 - keep)
        number = weight**2 * (1 - keep**2) / (1 - keep ** (2 * count))
        value = 1.0
        for candidate, total, square in zip(self.candidates, sums, squares, strict=True):
            mean = total / weight
            variance = max(square / weight - mean**2, 1.0)
            if mean <= self.errors * math.sqrt(variance / number):
                break
            value = candidate
        return replace(now, value=value, count=count, sums=sums, squares=squares)


@dataclass(frozen=True)
class RetainedShare:
    """ρ = half the smallest share of information that is retained, as the dreams have it.

    In a direction that retains a share λ, a step 1/t with A_ρ is a = λ / (λ + ρ (1 − λ)) of the
    efficient one. It is efficient in the end while a > ½, with a² / (2a − 1) times the smallest
    variance; else it forgets the start as t^−a only. With ρ = ½ min λ no direction has a < ⅔. A
    smaller ρ gains little, and lets the noise of the metric rule: ρ is at least a share of the
    number of parameters of a district over that of the dreams behind its average, so that the first
    steps are cautious. Directions that the damping rules do not count, as those that no
    distribution depends on.

    Attributes:
        factor: times the smallest share.
        noise: times parameters over dreams.
        smallest: lower bound on ρ.
    """

    factor: float = 0.5
    noise: float = 0.3
    smallest: float = 1e-4

    def of(self, share: float, noise: float) -> float:
        """ρ of a district.

        Args:
            share: smallest share of information that is retained in any direction.
            noise: parameters over dreams.

        Returns:
            ρ, at most 1.
        """
        return min(1.0, max(self.factor * share, self.noise * noise, self.smallest))


BOUNDED_TOGETHER = 64
"""Elements of a datum up to which `KLTrustRegion.network` is for all of them together."""


@dataclass(frozen=True)
class KLTrustRegion:
    """Shrinks a step whose KL divergence ½ lr² dᵀGd exceeds the radius.

    Attributes:
        radius: largest divergence of a step in nats, in the units of the loss: summed over all
            data that the loss counts, subsampling included.
        network: largest divergence per datum, in nats, of what a step does to the deep networks of
            a program, together. Their distributions are not linear in the parameters, and one
            batch is a weak witness of what a long step does to other data. It is for data of up to
            `BOUNDED_TOGETHER` elements (pixels, items, words) and grows with their number beyond.
        guide: the same, per datum, of what a step does to the rest of a guide. A guide of global
            variables is one datum: its gradient comes from a few draws, of which a long step makes
            too much.
        model: the same of what a step does to the rest of a model, per element of a datum: pixel,
            item or word. Far from the data, dreams say little about what data reach.

    All but the radius bound the new part of a step, before momentum.
    """

    radius: float = math.inf
    network: float = 0.003
    guide: float = 1.0
    model: float = 0.03

    def factor(self, divergence: Tensor) -> Tensor:
        """Factor on the step, at most 1."""
        return _shrinking(self.radius, divergence)

    def factor_per_datum(
        self, kind: Literal["network", "guide", "model"], divergence: Tensor
    ) -> Tensor:
        """Factor on the step of networks, or of the rest, from its divergence per datum.

        For the rest of a model it is the divergence per element.
        """
        bounds = {"network": self.network, "guide": self.guide, "model": self.model}
        return _shrinking(bounds[kind], divergence)


def _shrinking(radius: float, divergence: Tensor) -> Tensor:
    if math.isinf(radius):
        return torch.ones_like(divergence)
    tiny = torch.finfo(divergence.dtype).tiny
    return (radius / divergence.clamp_min(tiny)).sqrt().clamp_max(1.0)


@dataclass(frozen=True)
class Momentum:
    """Heavy ball that restarts: Δ_t = β Δ_{t−1} − η d_t with β = min(decay, k / (k + 3)).

    k counts the steps since momentum was last restarted, which happens where the gradient says that
    the last step leads uphill, gᵀΔ_{t−1} > 0. So it builds up along a slope that lasts, as in
    directions that hidden variables make slow, and stays small where noise rules, since there every
    other gradient turns it back. (B. T. Polyak 1964; B. O'Donoghue and E. Candès, "Adaptive restart
    for accelerated gradient schemes", Foundations of Computational Mathematics 15, 2015.)

    Attributes:
        decay: largest β; 0 is no momentum.
        restarts: whether momentum restarts; if not, β is `decay` from the second step on.
    """

    decay: float = 0.95
    restarts: bool = True

    def __post_init__(self) -> None:
        """Checks the range.

        Raises:
            ValueError: if decay is not in [0, 1).
        """
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")

    def age(self, age: Tensor, slope: Tensor) -> Tensor:
        """Steps since the last restart, from those before and the slope gᵀΔ_{t−1} of this step."""
        return torch.where(slope > 0, 0.0, age) if self.restarts else age

    def decay_at(self, age: Tensor) -> Tensor:
        """β after `age` steps since the last restart."""
        if not self.restarts:
            return torch.full_like(age, self.decay)
        return (age / (age + 3)).clamp_max(self.decay)


@dataclass(frozen=True)
class Shrinkage:
    """Shorter steps of a guide where its gradient is noise: f = √min(max(gain · s, least), 1).

    s is the share of signal in the gradients, gᵀ_t d_{t−1} over gᵀ_t d_t in running means: 0 in
    expectation where the gradients of two steps have nothing in common, 1 where they are the same.
    It is pooled over all blocks: what single blocks say of themselves is noise in turn.

    Attributes:
        gain: shares above 1 / gain leave steps as they are.
        least: bound on f².
        decay: weight of the past in the running means.
    """

    gain: float = 10.0
    least: float = 0.1
    decay: float = 0.9

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: naming the option.
        """
        if not self.gain > 0 or not 0 < self.least <= 1 or not 0 <= self.decay < 1:
            raise ValueError(
                f"gain must be positive, least in (0, 1] and decay in [0, 1), not {self}"
            )

    @property
    def active(self) -> bool:
        """Whether it ever shortens a step; with `least=1` it does not."""
        return self.least < 1

    def factor(self, share: Tensor) -> Tensor:
        """F for a share of signal."""
        return (self.gain * share).clamp(self.least, 1).sqrt()


@dataclass(frozen=True)
class RunningAverage:
    """Exponential average of curvature over refreshes, unbiased from the first one.

    A unit that a refresh has not reached, as a local variable outside of the batch or the row of a
    table that nothing has picked, keeps its average: it is one over the refreshes that reach it.

    What is old misleads more than a single refresh is noisy: of four belief networks of the zoo all
    end lower with a decay of 0.6 than of 0.8, and no program ends higher by more than 0.1 % of its
    way; on digits a network of 64, 32 and 16 units is 0.12 nats lower after 25 epochs.

    The longer training lasts, the less a step changes curvature. With `longest`, the number of
    steps between refreshes doubles after `patience` of them, and again whenever the number of all
    steps has doubled since. On digits (24 seeds) a patience of 10 in place of 20 costs 0.1 epochs
    of the 18 to the final value of Adam, and saves a third of the measurements until then.

    Attributes:
        decay: weight of the past at a refresh, once enough refreshes are past.
        refresh: steps between refreshes, at first.
        longest: steps between refreshes beyond which they do not double, or None.
        patience: refreshes before they get rarer.
        alternating: whether a guide with a metric is measured halfway between two refreshes of the
            model, so that no step but the first has to wait for both.
    """

    decay: float = 0.6
    refresh: int = 5
    longest: int | None = None
    patience: int = 10
    alternating: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: naming the option.
        """
        if not 0 <= self.decay < 1 or self.refresh < 1:
            raise ValueError(f"decay must be in [0, 1) and refresh at least 1, not {self}")
        if self.longest is not None and self.longest < self.refresh:
            raise ValueError(f"longest must not be below refresh: {self}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self}")

    def is_due(self, step: int, halfway: bool = False) -> bool:
        """Whether a step measures curvature.

        Args:
            step: counted from 0.
            halfway: whether refreshes are half a period later than those from step 0 on.
        """
        period, longest = self.refresh, self.longest or self.refresh
        while step >= self.patience * period and 2 * period <= longest:
            period *= 2
        return step % period == (period // 2 if halfway else 0)

    def share(self, count: int) -> float:
        """Weight of a new estimate after `count` earlier ones."""
        return max(1 - self.decay, 1 / (count + 1))


@dataclass(frozen=True)
class PolyakRuppert:
    """Averages iterates, of which early ones count ever less, without knowing when training ends.

    After k iterates θ₁ … θ_k the average is θ̄_k = θ̄_{k−1} + m / (k + m − 1) (θ_k − θ̄_{k−1}): θ_j
    has a weight of about j^(m − 1), with m = (1 + √(1 − share)) / share. The average of independent
    iterates then has the variance of the plain mean of the last share · k ones. A step of constant
    length makes iterates wander around the optimum; their average is asymptotically as accurate as
    the best estimate from all data seen (Polyak & Juditsky 1992). The first tenth of all iterates
    has a weight of 10^−m, 2 % by default.

    Polynomial decay: Shamir & Zhang 2013, Sec. 5, with η = m − 1 there.

    Attributes:
        share: of the iterates that the average is worth, above 0, at most 1; 1 is the plain mean.
        start: steps before the first one whose result counts. Until then there is no average, and
            parameters stand for themselves.
    """

    share: float = 0.85
    start: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: naming the option.
        """
        if not 0 < self.share <= 1 or self.start < 0:
            raise ValueError(f"share must be in (0, 1] and start not negative, not {self}")

    def weight(self, count: int) -> float:
        """Weight of a new iterate after `count` earlier ones."""
        power = (1 + math.sqrt(1 - self.share)) / self.share
        return power / (count + power)


@dataclass(frozen=True)
class Moments:
    """Moments of one parameter's gradient.

    Attributes:
        first: running mean, of the parameter's shape.
        second: running mean of the square.
        steps: number of steps averaged over.
    """

    first: Tensor
    second: Tensor
    steps: int


@dataclass(frozen=True)
class ReachScaledAdam:
    """Adam whose step moves a unit's logit by about `logits_per_lr` × lr, whatever its fan-in.

    An Adam step of size α moves a preactivation by at most α‖a‖₁, so α = logits_per_lr · lr /
    reach, with reach = 2 √w_ref E‖a‖₁ as measured with the curvature.

    Attributes:
        logits_per_lr: move of a logit per unit of learning rate.
        betas: decays of the first and second moments.
        eps: added to the root of the second moment.
    """

    logits_per_lr: float = 3.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def step(
        self, gradient: Tensor, inverse_reach: Tensor, lr: float, state: Moments | None
    ) -> tuple[Tensor, Moments]:
        """The change of a parameter and the new state.

        Args:
            gradient: of any shape.
            inverse_reach: 1 / reach, of a shape that broadcasts; entries with 0 do not move.
            lr: current learning rate.
            state: moments, or None at the start.

        Returns:
            Change to add, and new state; the old state is not written to.
        """
        first_decay, second_decay = self.betas
        if state is None:
            zero = torch.zeros_like(gradient)
            state = Moments(zero, zero, 0)
        steps = state.steps + 1
        first = torch.lerp(state.first, gradient, 1 - first_decay)
        second = state.second * second_decay
        second.addcmul_(gradient, gradient, value=1 - second_decay)
        # Both biases in one factor, for fewer passes through memory.
        bias = math.sqrt(1 - second_decay**steps)
        root = second.sqrt().add_(self.eps * bias)
        rate = -self.logits_per_lr * lr * bias / (1 - first_decay**steps)
        change = torch.addcdiv(first.new_zeros(()), first, root, value=rate)
        return change.mul_(inverse_reach), Moments(first, second, steps)
