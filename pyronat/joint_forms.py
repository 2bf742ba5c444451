"""Closed forms of the Fisher information of families of vectors, matrices and trees."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyronat.closed_forms import (
    LOGIT_WEIGHT,
    Group,
    Scores,
    df_weight,
    precisely,
    scalar,
    trigamma,
)

# --- choices of several ------------------------------------------------------------------------


def _spread(probs: Tensor) -> Tensor:
    """Covariance diag(p) − p pᵀ of a one-hot choice."""
    return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)


def categorical(d: Any) -> tuple[Group, ...]:
    """F = diag(p) − p pᵀ of the logits."""
    return (Group("logits", (d.logits,), lambda: _spread(d.probs), 1, LOGIT_WEIGHT),)


def multinomial(d: Any) -> tuple[Group, ...]:
    """F = n [diag(p) − p pᵀ] of the logits, n being the number of draws."""
    count = d.total_count
    bound = LOGIT_WEIGHT * count

    def closed_score(x: Tensor) -> Scores:
        return (x - count * d.probs,)

    return (Group("logits", (d.logits,), lambda: count * _spread(d.probs), 1, bound, closed_score),)


def relaxed_categorical(d: Any) -> tuple[Group, ...]:
    """F = K/(K+1) (I − 11ᵀ/K) of the K logits, the temperature being fixed.

    The score is 1 − K w, where w is uniform on the simplex.
    """
    size = d.event_shape[-1]

    def fisher() -> Tensor:
        uniform: Tensor = torch.full_like(d.logits, 1 / size)
        factor: float = size * size / (size + 1)
        return factor * _spread(uniform)

    return (Group("logits", (d.logits,), fisher, 1, (size - 1) / (size + 1)),)


def dirichlet(d: Any) -> tuple[Group, ...]:
    """F = diag(ψ_1(a)) − ψ_1(Σ a) of the concentrations a."""

    def fisher() -> Tensor:
        total = trigamma(d.concentration.sum(-1))
        return torch.diag_embed(trigamma(d.concentration)) - total[..., None, None]

    return (Group("concentration", (d.concentration,), fisher, 1),)


# --- normal vectors ----------------------------------------------------------------------------


def _inverse(factor: Tensor) -> Tensor:
    """Inverse of lower triangular matrices, detached."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    found: Tensor = torch.linalg.solve_triangular(
        factor.detach(), eye.expand_as(factor), upper=False
    )
    return found


def _factor_fisher(factor: Tensor) -> Tensor:
    """F_(ij)(kl) = L⁻¹_li L⁻¹_jk + P_ik δ_jl of the Cholesky factor of a normal's covariance."""
    inverse = _inverse(factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    found = torch.einsum("...li,...jk->...ijkl", inverse, inverse)
    found = found + torch.einsum("...ik,jl->...ijkl", inverse.mT @ inverse, eye)
    found = found.flatten(-4, -3).flatten(-2, -1)
    lower = torch.ones_like(eye).tril().flatten()
    return found * lower[:, None] * lower


def _distinct(matrices: Tensor) -> Tensor:
    """One of the copies along each batch dimension that matrices are expanded over."""
    for dim in range(matrices.dim() - 2):
        if matrices.stride(dim) == 0 and matrices.shape[dim] > 1:
            matrices = matrices.narrow(dim, 0, 1)
    return matrices


def _factor_of(d: Any) -> Tensor:
    factor: Tensor = d._unbroadcasted_scale_tril
    return factor.expand(*d.batch_shape, *factor.shape[-2:])


def multivariate_normal(d: Any) -> tuple[Group, ...]:
    """Loc with F = P, and the Cholesky factor L of the covariance P⁻¹."""
    factor = _factor_of(d)
    batch, size = factor.shape[:-2], factor.shape[-1]

    def precision() -> Tensor:
        inverse = _inverse(_distinct(factor))
        return (inverse.mT @ inverse).expand(*batch, size, size)

    def fisher() -> Tensor:
        return _factor_fisher(_distinct(factor)).expand(*batch, size**2, size**2)

    def closed_score(x: Tensor) -> Scores:
        inverse = _inverse(factor)
        standard = inverse @ (x - d.loc).unsqueeze(-1)
        return ((inverse.mT @ standard @ standard.mT - torch.diag_embed(_ends(inverse))).tril(),)

    return (
        Group("loc", (d.loc,), precision, 1),
        Group("scale_tril", (factor,), fisher, 2, closed_score=closed_score),
    )


def _ends(matrix: Tensor) -> Tensor:
    """Diagonals of matrices."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def low_rank_multivariate_normal(d: Any) -> tuple[Group, ...]:
    """Loc with F = P, and factor W and diagonal d of the covariance P⁻¹ = W Wᵀ + diag(d) together.

    F_WW(ij,kl) = P_ik (WᵀPW)_jl + (PW)_kj (PW)_il, F_Wd(ij,k) = P_ik (PW)_kj, F_dd = P²/2.
    """
    factor, noise = d.cov_factor, d.cov_diag

    def fisher() -> Tensor:
        w, p = factor.detach(), d.precision_matrix.detach()
        pw = p @ w
        ww = torch.einsum("...ik,...jl->...ijkl", p, w.mT @ pw)
        ww = ww + torch.einsum("...kj,...il->...ijkl", pw, pw)
        ww = ww.flatten(-4, -3).flatten(-2, -1)
        wd = torch.einsum("...ik,...kj->...ijk", p, pw).flatten(-3, -2)
        return torch.cat([torch.cat([ww, wd], -1), torch.cat([wd.mT, p**2 / 2], -1)], -2)

    def closed_score(x: Tensor) -> Scores:
        p = d.precision_matrix
        weighted = p @ (x - d.loc).unsqueeze(-1)
        slope = weighted @ weighted.mT - p
        return (torch.cat([(slope @ factor).flatten(-2), _ends(slope) / 2], -1),)

    joined = torch.cat([factor.flatten(-2), noise], -1)
    return (
        Group("loc", (d.loc,), lambda: d.precision_matrix, 1),
        Group("cov_factor, cov_diag", (joined,), fisher, 1, closed_score=closed_score),
    )


def multivariate_student_t(d: Any) -> tuple[Group, ...]:
    """Loc with F = (ν+p)/(ν+p+2) P, and df ν and the Cholesky factor L of P⁻¹ together.

    With dΣ = L dLᵀ + dL Lᵀ and N the Fisher information of a normal's factor (Lange, Little and
    Taylor 1989): F_LL = (ν+p)/(ν+p+2) N − 2/(ν+p+2) e eᵀ, e = diag(1/L_ii), and
    F_νL = −2 e / ((ν+p) (ν+p+2)).
    """
    factor, df, size = _factor_of(d), d.df, d.event_shape[-1]

    def ends() -> Tensor:
        return torch.diag_embed(1 / _ends(factor)).flatten(-2)

    def loc_fisher() -> Tensor:
        inverse = _inverse(factor)
        share: Tensor = (df + size) / (df + size + 2)
        return share[..., None, None] * (inverse.mT @ inverse)

    def fisher() -> Tensor:
        total = (df + size)[..., None]
        e = ends()
        share = total.unsqueeze(-1) / (total.unsqueeze(-1) + 2)
        block = share * _factor_fisher(factor)
        block = block - (1 - share) * e.unsqueeze(-1) * e.unsqueeze(-2)
        corner = precisely(lambda nu: df_weight(nu, size), df)
        return _bordered(corner, -2 * e / (total * (total + 2)), block)

    def closed_score(x: Tensor) -> Scores:
        inverse = _inverse(factor)
        standard = inverse @ (x - d.loc).unsqueeze(-1)
        length = standard.square().sum((-2, -1))
        weight = (df + size) / (df + length)
        score = weight[..., None, None] * (inverse.mT @ standard @ standard.mT)
        score = (score - torch.diag_embed(_ends(inverse))).tril()
        nu = torch.digamma((df + size) / 2) - torch.digamma(df / 2) - size / df
        nu = (nu - torch.log1p(length / df) + weight * length / df) / 2
        return (torch.cat([nu.unsqueeze(-1), score.flatten(-2)], -1),)

    joined = torch.cat([df.unsqueeze(-1), factor.flatten(-2)], -1)
    return (
        Group("loc", (d.loc,), loc_fisher, 1),
        Group("df, scale_tril", (joined,), fisher, 1, closed_score=closed_score),
    )


def _bordered(corner: Tensor, edge: Tensor, block: Tensor) -> Tensor:
    """[[corner, edgeᵀ], [edge, block]], of `[*batch]`, `[*batch, size]` and `[*batch, size, size]`.

    The batch shapes are those of the block.
    """
    edge = edge.expand(block.shape[:-1])
    first = torch.cat([corner.expand(block.shape[:-2]).unsqueeze(-1), edge], -1)
    return torch.cat([first.unsqueeze(-2), torch.cat([edge.unsqueeze(-1), block], -1)], -2)


# --- matrices ----------------------------------------------------------------------------------


def wishart(d: Any) -> tuple[Group, ...]:
    """Df ν and the Cholesky factor L of the scale matrix V together.

    F_LL = ν times that of a normal's factor, F_νν = Σ_j ψ_1((ν+1−j)/2) / 4, F_ν,L_ii = 1 / L_ii.
    """
    factor, df, size = _factor_of(d), d.df.expand(d.batch_shape), d.event_shape[-1]

    def halves() -> Tensor:
        steps = torch.arange(size, dtype=df.dtype, device=df.device)
        found: Tensor = (df.unsqueeze(-1) - steps) / 2
        return found

    def fisher() -> Tensor:
        edge = torch.diag_embed(1 / _ends(factor)).flatten(-2)
        block = df[..., None, None] * _factor_fisher(factor)
        return _bordered(trigamma(halves()).sum(-1) / 4, edge, block)

    def closed_score(x: Tensor) -> Scores:
        inverse = _inverse(factor)
        inner = inverse @ x @ inverse.mT
        score = inverse.mT @ inner - df[..., None, None] * torch.diag_embed(_ends(inverse))
        nu = torch.linalg.slogdet(inner).logabsdet
        nu = nu - (torch.digamma(halves()) + torch.log(torch.full_like(halves(), 2.0))).sum(-1)
        return (torch.cat([nu.unsqueeze(-1) / 2, score.tril().flatten(-2)], -1),)

    joined = torch.cat([df.unsqueeze(-1), factor.flatten(-2)], -1)
    return (Group("df, scale_tril", (joined,), fisher, 1, closed_score=closed_score),)


def lkj_cholesky(d: Any) -> tuple[Group, ...]:
    """F = Σ_j ψ_1(α − j/2) − (D−1) ψ_1(α), j = 1 … D−1, of the concentration α − (D−1)/2."""

    def weight() -> Tensor:
        last = d.dim - 1
        alpha: Tensor = d.concentration + last / 2
        steps = torch.arange(1, d.dim, dtype=alpha.dtype, device=alpha.device) / 2
        found: Tensor = trigamma(alpha.unsqueeze(-1) - steps).sum(-1) - last * trigamma(alpha)
        return found

    return (scalar("concentration", d.concentration, weight),)


# --- directions, trees, times ------------------------------------------------------------------


def von_mises_3d(d: Any) -> tuple[Group, ...]:
    """F = A′ u uᵀ + (A/κ) (I − u uᵀ) of the vector κ u, with A = coth κ − 1/κ."""

    def radial(k: Tensor) -> Tensor:
        small = k < 0.1
        wide = torch.where(small, torch.ones_like(k), k)
        near = torch.where(small, k, torch.zeros_like(k)) ** 2
        series = 1 / 3 - near * (1 / 15 - near * (2 / 189 - near / 675))
        # 1 / sinh² by the exponential that does not overflow
        sinh = -torch.expm1(-2 * wide) / 2
        return torch.where(small, series, wide**-2 - (-2 * wide).exp() / sinh**2)

    def tangential(k: Tensor) -> Tensor:
        small = k < 0.1
        wide = torch.where(small, torch.ones_like(k), k)
        near = torch.where(small, k, torch.zeros_like(k)) ** 2
        series = 1 / 3 - near * (1 / 45 - near * (2 / 945 - near / 4725))
        return torch.where(small, series, (1 / torch.tanh(wide) - 1 / wide) / wide)

    def fisher() -> Tensor:
        vector = d.concentration
        length = vector.norm(dim=-1)
        unit = vector / length.clamp_min(torch.finfo(vector.dtype).tiny).unsqueeze(-1)
        along: Tensor = unit.unsqueeze(-1) * unit.unsqueeze(-2)
        eye = torch.eye(3, dtype=vector.dtype, device=vector.device)
        parts = precisely(radial, length), precisely(tangential, length)
        return parts[0][..., None, None] * along + parts[1][..., None, None] * (eye - along)

    return (Group("concentration", (d.concentration,), fisher, 1),)


def spanning_tree(d: Any) -> tuple[Group, ...]:
    """F_ef = δ_ef T_ee − T_ef² of the logits of the edges e = (i, j).

    T_ef = √(w_e w_f) b_eᵀ L⁻¹ b_f is the transfer-current matrix (Burton and Pemantle 1993) of
    the graph with weights w = exp(logits), b_e = 1_i − 1_j, and L its Laplacian.
    """

    def fisher() -> Tensor:
        logits, size = d.edge_logits, d.num_vertices
        second, first = torch.ones(size, size, device=logits.device).tril(-1).nonzero().mT
        incidence = logits.new_zeros(len(logits), size)
        incidence[torch.arange(len(logits)), first] = 1
        incidence[torch.arange(len(logits)), second] = -1
        # The last vertex is grounded; a shift of all logits changes nothing.
        rows = ((logits - logits.max()) / 2).exp().unsqueeze(-1) * incidence[:, :-1]
        transfer: Tensor = rows @ torch.linalg.solve(rows.mT @ rows, rows.mT)
        return torch.diag(transfer.diagonal()) - transfer**2

    return (Group("edge_logits", (d.edge_logits,), fisher, 1, LOGIT_WEIGHT),)


def coalescent_times(d: Any) -> tuple[Group, ...]:
    """F = n / rate², n being the number of coalescent events, at fixed times of the leaves."""
    count, rate = d.event_shape[-1], d.rate.expand(d.batch_shape)

    def closed_score(x: Tensor) -> Scores:
        # log p = n log(rate) − rate · t + a constant
        one, two = (type(d)(d.leaf_times, float(k)).log_prob(x) for k in (1, 2))
        return (count / rate - (count * math.log(2) - (two - one)),)

    return (scalar("rate", rate, lambda: count * rate**-2, None, closed_score),)
