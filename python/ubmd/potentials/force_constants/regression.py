"""Bayesian linear regression of potentials that are linear in their parameters, one prior width per order.

Model: y_c = A_c θ + noise of precision β_c for the channels c (forces; optionally energies, stresses), and a prior
θ ~ N(0, Λ^-1), Λ = diag(α of the parameter's order). Then S^-1 = Λ + Σ_c β_c A_cᵀA_c and θ = S Σ_c β_c A_cᵀy_c. All α
and β maximise the evidence (MacKay, Neural Comput. 4, 415 (1992); Bishop, Pattern Recognition and Machine Learning,
section 3.5). Only sums over the data are kept (`NormalEquations`): adding a structure never reads old ones again.

In the coordinates w = Λ^(1/2) θ the matrix to factorise is B = 1 + Σ_c β_c D A_cᵀA_c D, D = Λ^(-1/2): no eigenvalue is
below 1 however few data there are, and orders whose columns differ by many powers of ten are on one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import scipy.linalg as sl  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray

from ubmd.errors import DataError, ModelError
from ubmd.files import replacing

Array = NDArray[np.float64]
CHANNELS = ("forces", "energies", "stresses")
FORMAT = 1
RELATIVE_NOISE = 1e-6  # lower bound of noise sd over rms label: residuals from Gram matrices resolve no less
ALPHA_RANGE = (1e-10, 1e14)  # of α, in units of the α whose prior explains all labels by this order alone
ROUNDING = 1e-4  # largest rounding error of B (its smallest eigenvalue is 1) that Cholesky may see


@dataclass
class Sums:
    """The sums over a channel's data: AᵀA [P, P], Aᵀy [P], yᵀy, number of rows, number of structures."""

    gram: Array
    moment: Array
    square: float = 0.0
    rows: int = 0
    structures: int = 0

    def add(self, matrix: Array, labels: Array) -> None:
        """Add the rows of one structure: matrix [M, P], labels [M]."""
        self.gram += matrix.T @ matrix
        self.moment += matrix.T @ labels
        self.square += float(labels @ labels)
        self.rows += len(labels)
        self.structures += 1

    def residual(self, mean: Array) -> float:
        """|y - Aθ|^2 from the sums, not below zero (good to about 1e-13 of yᵀy)."""
        return max(self.square - float(mean @ (2.0 * self.moment - self.gram @ mean)), 0.0)


class NormalEquations:
    """The sums over all training data, by channel.

    Args:
        parameter_orders: order of each parameter, int [P].
    """

    def __init__(self, parameter_orders: ArrayLike) -> None:
        orders = np.asarray(parameter_orders)
        if orders.ndim != 1 or len(orders) == 0 or not np.issubdtype(orders.dtype, np.integer):
            raise DataError(
                f"Parameter orders are one integer per parameter, got an array {orders.dtype} {orders.shape}."
            )
        self.parameter_orders = orders.astype(np.int64)
        self.sums: dict[str, Sums] = {}

    def add(
        self,
        force_matrix: ArrayLike,
        forces: ArrayLike,
        energy: tuple[ArrayLike, float] | None = None,
        stress: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        """Add a labelled structure; nothing is added if any part of it is malformed.

        Args:
            force_matrix: A [3n, P] with F = Aθ.
            forces: F [3n] or [n, 3], eV/Å.
            energy: features φ [P] and E - E0 (eV), E0 the energy of the ideal lattice.
            stress: matrix [6, P] and stress [6], eV/Å^3.

        Raises:
            DataError: shapes don't fit or numbers are not finite.
        """
        parts = {"forces": self._checked("forces", force_matrix, forces)}
        if energy is not None:
            parts["energies"] = self._checked("energies", np.atleast_2d(np.asarray(energy[0], float)), [energy[1]])
        if stress is not None:
            parts["stresses"] = self._checked("stresses", *stress)
        for channel, (matrix, labels) in parts.items():
            self._channel(channel).add(matrix, labels)

    def add_energy(self, features: ArrayLike, energy: float) -> None:
        """Add an energy E - E0 (eV) with its features φ [P] alone; raises as `add`."""
        self._channel("energies").add(*self._checked("energies", np.atleast_2d(np.asarray(features, float)), [energy]))

    def copy(self) -> NormalEquations:
        """Independent sums."""
        other = NormalEquations(self.parameter_orders)
        other.sums = {name: replace(s, gram=s.gram.copy(), moment=s.moment.copy()) for name, s in self.sums.items()}
        return other

    def save(self, path: Path) -> None:
        """Write an npz file through a temporary one beside it."""
        arrays: dict[str, Any] = {"parameter_orders": self.parameter_orders}
        for name, s in self.sums.items():
            arrays |= {f"{name}_gram": s.gram, f"{name}_moment": s.moment}
            arrays[f"{name}_counts"] = np.array([s.square, s.rows, s.structures])
        _write(path, "normal equations", arrays)

    @classmethod
    def load(cls, path: Path) -> NormalEquations:
        """Read what `save` wrote; raises ModelError otherwise."""
        data = _read(path, "normal equations")
        equations = cls(data["parameter_orders"])
        for name in CHANNELS:
            if f"{name}_gram" in data:
                square, rows, structures = data[f"{name}_counts"]
                sums = Sums(data[f"{name}_gram"], data[f"{name}_moment"], float(square), int(rows), int(structures))
                equations.sums[name] = sums
        return equations

    def _channel(self, name: str) -> Sums:
        p = len(self.parameter_orders)
        return self.sums.setdefault(name, Sums(np.zeros((p, p)), np.zeros(p)))

    def _checked(self, channel: str, matrix: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
        a, y = np.asarray(matrix, dtype=float), np.asarray(labels, dtype=float).ravel()
        p = len(self.parameter_orders)
        if a.shape != (len(y), p) or len(y) == 0:
            raise DataError(
                f"{len(y)} labels ({channel}) of {p} parameters need a {len(y)} x {p} matrix, got {a.shape}."
            )
        if not (np.isfinite(a).all() and np.isfinite(y).all()):
            raise DataError(f"The regression got a matrix or labels ({channel}) that are not finite numbers.")
        return a, y


@dataclass(frozen=True)
class Posterior:
    """Fitted parameters and their covariance S = W Wᵀ."""

    parameter_orders: NDArray[np.int64]
    """[P]"""
    mean: Array
    """θ [P]"""
    factor: Array
    """W [P, P]"""
    alpha: dict[int, float]
    """prior precision by order"""
    beta: dict[str, float]
    """noise precision by channel: 1/(eV/Å)^2, 1/eV^2, 1/(eV/Å^3)^2"""
    log_evidence: float
    converged: bool = True
    iterations: int = 0
    noise_limited: tuple[str, ...] = field(default=())
    """channels whose noise is at its lower bound: the data look free of noise"""
    core: Array | None = None
    """radii [T] of the pair functions' core, Å (`ubmd.potentials.force_constants.pairs`); None: there are none"""
    limits: Array | None = None
    """differences of displacements [K] where the wall begins, Å (`ubmd.potentials.force_constants.shells`); None: no
    wall"""

    @property
    def counts(self) -> dict[int, int]:
        """Number of parameters P_o by order."""
        return {order: int((self.parameter_orders == order).sum()) for order in self.alpha}

    @property
    def gamma(self) -> dict[int, float]:
        """Effective numbers of parameters γ_o = P_o - α_o tr S_oo by order: how many the data determine."""
        variances = np.einsum("ij,ij->i", self.factor, self.factor)
        return {
            order: self.counts[order] - alpha * float(variances[self.parameter_orders == order].sum())
            for order, alpha in self.alpha.items()
        }

    @property
    def noise(self) -> float:
        """Noise or truncation floor of the forces 1/sqrt(β), eV/Å: no part of the Bayesian error."""
        noise: float = self.beta["forces"] ** -0.5
        return noise

    def covariance(self) -> Array:
        """S [P, P]."""
        return self.factor @ self.factor.T

    def forces(self, force_matrix: ArrayLike) -> Array:
        """Mean forces [3n], eV/Å."""
        return np.asarray(force_matrix, dtype=float) @ self.mean

    def force_covariance(self, force_matrix: ArrayLike) -> Array:
        """Epistemic covariance A S Aᵀ [3n, 3n] of the forces, (eV/Å)^2."""
        z = self.project(force_matrix)
        return z @ z.T

    def force_deviations(self, force_matrix: ArrayLike) -> Array:
        """Epistemic standard deviations [3n] of the force components, eV/Å; no 3n x 3n matrix is formed."""
        return deviations(self.project(force_matrix))

    def bayesian_error(self, force_matrix: ArrayLike) -> float:
        """Largest standard deviation of a force component, eV/Å.

        (arXiv:2601.21311 uses the variance under this name.)
        """
        return float(self.force_deviations(force_matrix).max())

    def energy(self, features: ArrayLike) -> Array:
        """E - E0 of features [P] or [S, P], eV."""
        return np.asarray(features, dtype=float) @ self.mean

    def energy_deviation(self, features: ArrayLike) -> Array:
        """σ_E = sqrt(φᵀSφ) of features [P] or [S, P], eV."""
        return deviations(self.project(features))

    def project(self, matrix: ArrayLike) -> Array:
        """Z = A W: rows whose scalar products are posterior covariances."""
        return np.asarray(matrix, dtype=float) @ self.factor

    def condition(self, force_matrix: ArrayLike) -> Posterior:
        """The posterior with the covariance after labelling this structure, hyperparameters kept; needs no label.

        Mean and log evidence stay those of the data so far.
        """
        return replace(self, factor=shrink(self.factor, self.project(force_matrix), self.beta["forces"]))

    def save(self, path: Path) -> None:
        """Write an npz file through a temporary one beside it."""
        arrays: dict[str, Any] = {"parameter_orders": self.parameter_orders, "mean": self.mean}
        arrays |= {"factor": self.factor, "orders": list(self.alpha), "alpha": list(self.alpha.values())}
        arrays |= {"channels": list(self.beta), "beta": list(self.beta.values()), "log_evidence": self.log_evidence}
        arrays |= {"converged": self.converged, "iterations": self.iterations}
        arrays["noise_limited"] = np.array(self.noise_limited, dtype=str)
        arrays |= {name: value for name in ("core", "limits") if (value := getattr(self, name)) is not None}
        _write(path, "posterior", arrays)

    @classmethod
    def load(cls, path: Path) -> Posterior:
        """Read what `save` wrote; raises ModelError otherwise."""
        data = _read(path, "posterior")
        return cls(
            parameter_orders=data["parameter_orders"],
            mean=data["mean"],
            factor=data["factor"],
            alpha=dict(zip(data["orders"].tolist(), data["alpha"].tolist(), strict=True)),
            beta=dict(zip(data["channels"].tolist(), data["beta"].tolist(), strict=True)),
            log_evidence=float(data["log_evidence"]),
            converged=bool(data["converged"]),
            iterations=int(data["iterations"]),
            noise_limited=tuple(data["noise_limited"].tolist()),
            core=data.get("core"),
            limits=data.get("limits"),
        )


def fit(
    equations: NormalEquations,
    start: Posterior | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 300,
    caution: float = 0.5,
) -> Posterior:
    """Maximise the evidence by MacKay's fixed point: α_o = γ_o/|θ_o|^2, β_c = (M_c - γ_c)/|y_c - A_c θ|^2.

    γ_c = β_c tr(S A_cᵀA_c), which sum to Σ_o γ_o. The gradient of the log evidence is (γ_o - α_o|θ_o|^2)/2 by ln α_o
    (and alike for β): a hyperparameter is converged when its gradient is below the tolerance, absolutely or relative to
    γ_o. The first kind ends the drift of an order that the data do not determine. Noise never falls below 1e-6 of the
    rms label.

    Args:
        equations: sums of at least one structure with forces.
        start: take its α and β as a start (faster); without, the result depends on the sums alone.
        tolerance: see above.
        max_iterations: at least 1; `Posterior.converged` is False if they don't suffice.
        caution: κ of a hyperprior α_o^-κ on every order; the fixed point is then γ_o = α_o|θ_o|^2 + 2κ. With 0 it is
            the bare evidence, which is flat in α_o when the labels do not determine an order, and then often switches
            that order off: errors at larger displacements are underestimated by a large factor. With κ > 0 such an
            order keeps the width at which the labels would begin to determine it (γ_o about 2κ); well-determined
            orders change by 2κ/γ_o.

    Raises:
        DataError: there are no forces, or all of them are zero.
    """
    sums = _checked_sums(equations)
    limits = {name: 1.0 / (RELATIVE_NOISE**2 * s.square / s.rows) for name, s in sums.items()}
    units = _alpha_units(equations)
    alpha = {order: unit * len(units) for order, unit in units.items()}  # every order may explain its share
    beta = {name: 1e-8 * limit for name, limit in limits.items()}  # noise of 1 % of the rms label
    if start is not None:
        alpha = {order: start.alpha.get(order, value) for order, value in alpha.items()}
        beta = {name: min(start.beta.get(name, value), limits[name]) for name, value in beta.items()}
    for iteration in range(1, max_iterations + 1):
        posterior = replace(posterior_at(equations, alpha, beta), iterations=iteration)
        alpha, alpha_still = _next_alpha(posterior, units, tolerance, caution)
        beta, beta_still = _next_beta(posterior, sums, limits, tolerance)
        if alpha_still and beta_still:
            break
    limited = tuple(name for name, value in posterior.beta.items() if value >= limits[name])
    return replace(posterior, converged=alpha_still and beta_still, noise_limited=limited)


def posterior_at(equations: NormalEquations, alpha: Mapping[int, float], beta: Mapping[str, float]) -> Posterior:
    """The posterior and its log evidence for given α by order and β by channel."""
    orders = equations.parameter_orders
    scale = np.array([alpha[int(order)] for order in orders]) ** -0.5
    precision = sum((beta[name] * s.gram for name, s in equations.sums.items()), np.zeros((len(orders),) * 2))
    moment = sum((beta[name] * s.moment for name, s in equations.sums.items()), np.zeros(len(orders)))
    factor, logdet, known = _factorise(precision * scale * scale[:, None])
    weights = (factor.T @ (scale * moment)) * known
    mean = scale * (factor @ weights)
    misfit = sum(beta[name] * s.residual(mean) for name, s in equations.sums.items())
    prior = float(np.sum((mean / scale) ** 2))
    rows = sum(s.rows for s in equations.sums.values())
    logs = sum(s.rows * np.log(beta[name]) for name, s in equations.sums.items())
    evidence = 0.5 * (logs - misfit - prior - logdet - rows * np.log(2.0 * np.pi))
    return Posterior(
        orders,
        mean,
        scale[:, None] * factor,
        dict(alpha),
        {name: beta[name] for name in equations.sums},
        float(evidence),
    )


def deviations(projected: Array) -> Array:
    """Standard deviations [...] of projected rows Z = A W [..., P]."""
    variances: Array = np.einsum("...i,...i->...", projected, projected)
    return np.sqrt(variances)


def shrink(rows: Array, candidate: Array, beta: float) -> Array:
    """Rows A W [M, P] (or W itself) for the posterior after a label of the candidate Z [m, P] with noise 1/sqrt(β).

    S' = W (1 + βZᵀZ)^-1 Wᵀ, and with the thin singular value decomposition Z = V diag(s) Uᵀ the symmetric root of the
    middle is 1 - U diag(1 - (1 + βs^2)^(-1/2)) Uᵀ: O(M P m), nothing is refitted.
    """
    _, values, right = np.linalg.svd(candidate, full_matrices=False)
    shrunk: Array = rows - ((rows @ right.T) * (1.0 - 1.0 / np.sqrt(1.0 + beta * values**2))) @ right
    return shrunk


def predicted_drops(posterior: Posterior, candidates: Sequence[ArrayLike], probes: Sequence[ArrayLike]) -> Array:
    """Relative drop of the mean Bayesian error over the probes by labelling each candidate, [number of candidates].

    The expected error after a measurement as the criterion: MacKay, Neural Comput. 4, 590 (1992); Cohn, Ghahramani and
    Jordan, J. Artif. Intell. Res. 4, 129 (1996). Here the error of a probe is its largest standard deviation of a force
    component, where they take the variance.

    Args:
        posterior: the current one; its hyperparameters are kept.
        candidates: force matrices [3n, P].
        probes: force matrices whose mean error counts, for instance frames of a trajectory.
    """
    return _drops([posterior.project(a) for a in candidates], _stacked(posterior, probes), posterior.beta["forces"])


def select_batch(
    posterior: Posterior, candidates: Sequence[ArrayLike], count: int, probes: Sequence[ArrayLike] | None = None
) -> list[int]:
    """Greedy batch: each pick lowers the mean Bayesian error over the probes most, given the picks before it.

    Near-duplicates of a pick lose their gain, so they are not picked while anything else is of use. The probes default
    to the candidates. Cost: candidates x probes x (3n)^2 P per pick.

    Raises:
        DataError: fewer candidates than picks.
    """
    if count > len(candidates):
        raise DataError(f"A batch of {count} structures cannot be selected from {len(candidates)} candidates.")
    beta = posterior.beta["forces"]
    rows = [posterior.project(a) for a in candidates]
    stacked = _stacked(posterior, candidates if probes is None else probes)
    picks: list[int] = []
    for _ in range(count):
        free = [k for k in range(len(rows)) if k not in picks]
        best = free[int(np.argmax(_drops([rows[k] for k in free], stacked, beta)))]
        picks.append(best)
        chosen = rows[best]
        rows = [shrink(z, chosen, beta) for z in rows]
        stacked = (shrink(stacked[0], chosen, beta), stacked[1])
    return picks


def _factorise(matrix: Array) -> tuple[Array, float, Array]:
    """Factor V of (1 + K)^-1 = V Vᵀ, ln det(1 + K), and which columns of V the data reach; K [P, P] semidefinite.

    Cholesky while the rounding of K stays far below the 1; else eigenvectors, where eigenvalues that are rounding
    are taken as zero: such directions keep their prior width instead of a spuriously small one.
    """
    p = len(matrix)
    rounding = p * np.finfo(float).eps
    if rounding * float(np.trace(matrix)) < ROUNDING:
        lower = np.linalg.cholesky(matrix + np.eye(p))
        inverse, _ = sl.lapack.dtrtri(lower, lower=1)
        return inverse.T, 2.0 * float(np.log(np.diag(lower)).sum()), np.ones(p)
    values, vectors = np.linalg.eigh(matrix)
    known = values > rounding * values[-1]
    values = np.where(known, values, 0.0)
    return vectors / np.sqrt(1.0 + values), float(np.log1p(values).sum()), known.astype(float)


def _checked_sums(equations: NormalEquations) -> dict[str, Sums]:
    if "forces" not in equations.sums:
        raise DataError("The regression has no data yet: add at least one structure with forces.")
    for name, s in equations.sums.items():
        if not s.square > 0.0 or not np.trace(s.gram) > 0.0:
            raise DataError(f"All {name} of the training structures are zero: add structures with displaced atoms.")
    return equations.sums


def _alpha_units(equations: NormalEquations) -> dict[int, float]:
    """α by order whose prior mean square of the forces of this order is that of the labels."""
    s = equations.sums["forces"]
    orders = equations.parameter_orders
    units = {}
    for order in np.unique(orders).tolist():
        trace = float(np.diag(s.gram)[orders == order].sum())
        units[order] = trace / s.square if trace > 0.0 else 1.0
    return units


def _next_alpha(
    posterior: Posterior, units: Mapping[int, float], tolerance: float, caution: float
) -> tuple[dict[int, float], bool]:
    """The next α by order, and whether all are converged."""
    alpha, still = {}, True
    for order, gamma in posterior.gamma.items():
        gamma = max(gamma, 0.0)
        old, unit = posterior.alpha[order], units[order]
        square = float(np.sum(posterior.mean[posterior.parameter_orders == order] ** 2))
        low, high = (bound * unit for bound in ALPHA_RANGE)
        target = old * square + 2.0 * caution
        alpha[order] = min(max(old * gamma / target if target > 0.0 else old, low), high)
        still &= alpha[order] == old or abs(gamma - target) <= tolerance * max(1.0, gamma)
    return alpha, still


def _next_beta(
    posterior: Posterior, sums: Mapping[str, Sums], limits: Mapping[str, float], tolerance: float
) -> tuple[dict[str, float], bool]:
    """The next β by channel, and whether all are converged."""
    beta, still = {}, True
    for name, s in sums.items():
        old = posterior.beta[name]
        # Only with several channels is the trace needed: O(P^3).
        used = sum(posterior.gamma.values()) if len(sums) == 1 else _trace(posterior, old * s.gram)
        free = max(s.rows - used, 0.0)
        residual = s.residual(posterior.mean)
        beta[name] = limits[name] if free >= residual * limits[name] else free / residual
        beta[name] = max(beta[name], 1e-14 * limits[name])
        still &= beta[name] == old or abs(free - old * residual) <= tolerance * max(1.0, free)
    return beta, still


def _trace(posterior: Posterior, matrix: Array) -> float:
    """tr(S X)."""
    return float(np.vdot(posterior.factor, matrix @ posterior.factor))


def _stacked(posterior: Posterior, matrices: Sequence[ArrayLike]) -> tuple[Array, list[int]]:
    """Projected rows of all structures [ΣM, P], and where each begins."""
    rows = [posterior.project(a) for a in matrices]
    if not rows:
        raise DataError("A predicted drop of the error needs at least one probe structure.")
    return np.concatenate(rows), [0, *np.cumsum([len(z) for z in rows])[:-1].tolist()]


def _drops(candidates: Sequence[Array], probes: tuple[Array, list[int]], beta: float) -> Array:
    """Relative drops for projected candidates; 0 where the error is 0 already."""
    rows, starts = probes
    variances = np.einsum("ij,ij->i", rows, rows)
    before = np.sqrt(np.maximum.reduceat(variances, starts)).mean()
    after = np.empty(len(candidates))
    for k, z in enumerate(candidates):
        _, values, right = np.linalg.svd(z, full_matrices=False)
        gain = beta * values**2 / (1.0 + beta * values**2)
        left = np.maximum(variances - (rows @ right.T) ** 2 @ gain, 0.0)
        after[k] = np.sqrt(np.maximum.reduceat(left, starts)).mean()
    return np.zeros(len(candidates)) if before == 0.0 else 1.0 - after / before


def _write(path: Path, kind: str, arrays: dict[str, Any]) -> None:
    with replacing(path) as handle:
        np.savez(handle, format=FORMAT, kind=kind, **arrays)


def _read(path: Path, kind: str) -> dict[str, Any]:
    """All arrays of a file of ours."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as data:  # a broken file is closed too
            arrays = {key: data[key] for key in data.files}
    except FileNotFoundError:
        raise ModelError(f"The regression file {path} does not exist.") from None
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise ModelError(f"The regression file {path} cannot be read ({error}): fit the data again.") from error
    if str(arrays.get("kind")) != kind:
        raise ModelError(f"{path} does not contain the {kind} of a regression.")
    if int(arrays["format"]) != FORMAT:
        raise ModelError(f"{path} has format {int(arrays['format'])}, this version of ubmd reads {FORMAT}.")
    return arrays
