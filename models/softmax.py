"""Regression of classes on features by Newton's method: units of networks, gates of experts."""

import torch
from torch import Tensor

_MAX_STEPS = 100
_LEAST_CURVATURE = 1e-12
_TOLERANCE = 1e-10
_ROUNDING = 1e-12


def softmax_logits(design: Tensor, weights: Tensor) -> Tensor:
    """Logits of classes that are linear in the features, that of the first class being 0.

    Args:
        design: Features, one of which may be constant, shape [batch, features].
        weights: Weights of all classes but the first, shape [classes - 1, features].

    Returns:
        Logits, shape [batch, classes].
    """
    others = design @ weights.T
    return torch.cat([torch.zeros_like(others[:, :1]), others], -1)


def softmax_regression(design: Tensor, shares: Tensor) -> Tensor:
    """Maximizes Σ_n Σ_k shares_nk log softmax_k(logits_n), with the logits of `softmax_logits`.

    With two classes this is logistic regression. The function is concave, so that Newton's method,
    with steps halved until they do not descend, finds the maximum from anywhere if there is one.
    Computed in double precision.

    Args:
        design: Features, one of which may be constant, shape [batch, features].
        shares: Share of each class in each datum, not negative, shape [batch, classes].

    Returns:
        Weights of all classes but the first, shape [classes - 1, features], in the precision of
        the design.

    Raises:
        ValueError: If there is no maximum at finite weights, or more than one.
    """
    features, targets = design.double(), shares.double()
    weights: Tensor = features.new_zeros(targets.shape[1] - 1, features.shape[1])
    value = _log_likelihood(features, targets, weights)
    for _ in range(_MAX_STEPS):
        gradient, curvature = _derivatives(features, targets, weights)
        size = torch.linalg.eigvalsh(curvature)
        # On the way to infinity the curvature vanishes, while the steps do not become short.
        if not size[0] > _LEAST_CURVATURE * size[-1]:
            break
        step: Tensor = torch.linalg.solve(curvature, gradient).reshape(weights.shape)
        if step.abs().max() <= _TOLERANCE * (1 + weights.abs().max()):
            best: Tensor = (weights + step).to(design)
            return best
        floor = value - _ROUNDING * value.abs()
        while _log_likelihood(features, targets, weights + step) < floor:
            step = step / 2
        weights = weights + step
        value = _log_likelihood(features, targets, weights)
    raise ValueError(
        "the likelihood has no unique maximum at finite weights: the features separate the"
        " classes, or depend linearly on one another"
    )


def _derivatives(design: Tensor, shares: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and negative Hessian of a softmax regression, by class, then by feature.

    Args:
        design: Features, shape [batch, features].
        shares: Share of each class in each datum, shape [batch, classes].
        weights: Weights of all classes but the first, shape [classes - 1, features].

    Returns:
        Gradient of shape [entries] and matrix of shape [entries, entries].
    """
    probs = softmax_logits(design, weights).softmax(-1)[:, 1:]
    total = shares.sum(-1, keepdim=True)
    gradient = (shares[:, 1:] - total * probs).T @ design
    covariance = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    curvature = torch.einsum("nab,ni,nj->aibj", total[..., None] * covariance, design, design)
    return gradient.flatten(), curvature.reshape(weights.numel(), weights.numel())


def _log_likelihood(design: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """Log likelihood of a softmax regression in nats, a scalar."""
    total: Tensor = (shares * softmax_logits(design, weights).log_softmax(-1)).sum()
    return total
