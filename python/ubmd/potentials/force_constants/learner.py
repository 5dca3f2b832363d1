"""Force constants as the dynamic schedule sees them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from ase import Atoms

from ubmd.data.labelled_range import LabelledRange
from ubmd.data.labels import dataset_hash
from ubmd.data.structures import read_structures
from ubmd.potentials.interface import Signal
from ubmd.potentials.learner import Array, Judgement, Learner, Progress, _relative, _rms
from ubmd.settings import CrystalSettings
from ubmd.settings.dynamic import ConvergenceSettings, DynamicRunSettings
from ubmd.settings.marks import key_values

if TYPE_CHECKING:
    from ubmd.potentials.force_constants.seen import Seen


class ForceConstants(Learner):
    """Force constants of a crystal by Bayesian regression: a refit adds to sums over the data, and takes seconds."""

    lattice = True
    least_labels = 1
    scale_in_errors = True
    files = ("model.pt", "posterior.npz")

    @classmethod
    def make(cls, settings: DynamicRunSettings, base: Path, box: Atoms, folder: Path, threads: int) -> Self:
        """See `Learner`."""
        return cls(settings, box, folder / "basis.npz", _ideal_crystal(settings, base))

    @classmethod
    def inputs(cls, settings: DynamicRunSettings, base: Path) -> dict[str, Path]:
        """The ideal crystal."""
        return {"crystal.structure": _settings_of(settings).structure_file(base)}

    @classmethod
    def ideal(cls, structure: Atoms, settings: DynamicRunSettings) -> Atoms:
        """The crystal with its symmetry exact."""
        from ubmd.potentials.force_constants.symmetry import symmetrised

        return symmetrised(structure, _settings_of(settings).tolerance)

    @classmethod
    def plan(cls, settings: DynamicRunSettings, base: Path, box: Atoms) -> Iterator[str]:
        """Symmetry, and parameters by order."""
        from ubmd.potentials.force_constants.basis import ClusterBasis
        from ubmd.potentials.force_constants.ideal import describe_symmetry
        from ubmd.potentials.force_constants.pairs import PAIRS

        crystal, wanted = _ideal_crystal(settings, base), _settings_of(settings)
        basis = ClusterBasis.build(crystal, wanted.cutoffs, wanted.decay, wanted.tolerance, wanted.pairs)
        yield from describe_symmetry(crystal, basis.lattice, wanted.tolerance)
        basis.supercell(box)
        orders = basis.parameter_orders
        counts = " + ".join(f"{int((orders == order).sum())}" for order in basis.orders)
        known = int((orders != PAIRS).sum())
        yield f"Force constants of orders {', '.join(map(str, basis.orders))}: {counts} = {known}."
        if basis.pairs is not None:
            yield f"Pair functions up to {basis.pairs.cutoff:g} Å: {basis.pairs.n_parameters}."

    def describe(self) -> dict[str, Any]:
        """Parameters and symmetry of the basis."""
        from ubmd.potentials.force_constants.ideal import describe_symmetry

        symmetry = list(describe_symmetry(self._crystal, self.basis.lattice, self.settings.tolerance))
        return {"parameters": self.basis.n_parameters, "symmetry": symmetry}

    def __init__(self, settings: DynamicRunSettings, box: Atoms, basis_file: Path, crystal: Atoms) -> None:
        """Build the cluster basis, or read it if it was built before.

        Args:
            settings: of the run.
            box: the ideal box of the dynamics.
            basis_file: where the basis is kept.
            crystal: the ideal crystal.
        """
        from ubmd.potentials.force_constants.fit import cached_basis
        from ubmd.potentials.force_constants.regression import NormalEquations

        self.settings = wanted = _settings_of(settings)
        self._crystal = crystal
        self.basis = cached_basis(crystal, wanted.cutoffs, basis_file, wanted.decay, wanted.tolerance, wanted.pairs)
        self.box = self.basis.supercell(box)
        self._ideal_positions: Array = box.positions.copy()
        self._equations = NormalEquations(self.basis.parameter_orders)
        self._learnt: list[str] = []  # hashes of the labels in the sums
        self._first: tuple[Array, float] | None = None  # features and energy of the first label
        self._posterior: Any = None
        self._scale = 1.0

    def key(self) -> Any:
        """Cutoffs and options."""
        return key_values(self.settings)

    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Add new labels to the sums, maximise the evidence, export."""
        from ubmd.potentials.force_constants.export import export_crystal
        from ubmd.potentials.force_constants.regression import Posterior, fit

        begin = time.monotonic()
        self._add(labels)
        start = (
            Posterior.load(previous / "posterior.npz") if previous and (previous / "posterior.npz").exists() else None
        )
        posterior = fit(self._equations, start, caution=self.settings.caution)
        posterior, constraint = self._stable(self._seen(labels).bounded(posterior, self.settings.stable))
        energy = self._ideal_energy(labels, posterior)
        provenance = {"training_set_hash": dataset_hash(labels), "n_training": len(labels)}
        folder.mkdir(parents=True, exist_ok=True)
        posterior.save(folder / "posterior.npz")
        export_crystal(
            self.basis,
            posterior,
            folder / "model.pt",
            energy_scale=1.0,
            force_scale=scale,
            max_displacement=self.settings.max_displacement,
            energy=energy or 0.0,
            provenance=provenance,
        )
        self._posterior, self._scale = posterior, scale
        return {
            "noise": posterior.noise,
            "alpha": _by_order(posterior.alpha),
            "beta": posterior.beta,
            "gamma": _by_order(posterior.gamma),
            "parameters": _by_order(posterior.counts),
            "log_evidence": posterior.log_evidence,
            "converged": posterior.converged,
            "iterations": posterior.iterations,
            "noise_limited": list(posterior.noise_limited),
            "energy": energy,
            "force_scale": scale,
            **constraint,
            "fit_seconds": round(time.monotonic() - begin, 3),
        }

    def load(self, folder: Path, summary: dict[str, Any], labels: Sequence[Atoms]) -> None:
        """The posterior; the sums are computed again when they are needed."""
        from ubmd.potentials.force_constants.regression import Posterior

        self._posterior = Posterior.load(folder / "posterior.npz")
        self._scale = float(summary["force_scale"])

    @property
    def noise(self) -> float:
        """1/sqrt(β), eV/Å."""
        return float(self._posterior.noise)

    def judge(self, labels: Sequence[Atoms]) -> list[Judgement]:
        """Bayesian error against the largest true error of a component."""
        found = []
        for atoms in labels:
            matrix = self._matrix(atoms)
            difference = np.asarray(atoms.get_forces()).ravel() - self._posterior.forces(matrix)
            difference -= self._repulsion(atoms).ravel()
            error = self._scale * self._posterior.bayesian_error(matrix)
            found.append(Judgement(error, float(np.abs(difference).max()), _rms(difference)))
        return found

    def errors_on(self, labels: Sequence[Atoms]) -> dict[str, Any]:
        """Forces only."""
        forces = [np.asarray(atoms.get_forces()) for atoms in labels]
        mean = self._posterior.mean
        differences = [
            f - self.basis.forces(mean, a, self.box) - self._repulsion(a) for f, a in zip(forces, labels, strict=True)
        ]
        return _relative(np.concatenate(differences), np.concatenate(forces), len(labels))

    def signals(self, frames: Sequence[Atoms], limits: ConvergenceSettings) -> list[Signal]:
        """All three (`ubmd.potentials.force_constants.convergence`)."""
        from ubmd.potentials.force_constants.convergence import below_noise, determined, little_to_gain
        from ubmd.potentials.force_constants.regression import predicted_drops

        posterior = self._posterior
        found = [determined(posterior.gamma, posterior.counts, limits.determined)]
        if frames:
            matrices = [self._matrix(atoms) for atoms in frames]
            deviations = [self._scale * posterior.force_deviations(matrix) for matrix in matrices]
            found.append(below_noise(deviations, posterior.noise, limits.noise))
            found.append(little_to_gain(predicted_drops(posterior, matrices, matrices), limits.gain))
        return found

    def drops(self, candidates: Sequence[Atoms], frames: Sequence[Atoms]) -> list[float] | None:
        """By a rank update."""
        from ubmd.potentials.force_constants.regression import predicted_drops

        matrices = [self._matrix(atoms) for atoms in candidates]
        probes = [*matrices, *(self._matrix(atoms) for atoms in frames)]
        return [float(drop) for drop in predicted_drops(self._posterior, matrices, probes)]

    def choose(self, candidates: Sequence[Atoms], count: int, rng: np.random.Generator) -> list[int]:
        """Those that lower the mean error over all of them most."""
        from ubmd.potentials.force_constants.regression import select_batch

        return select_batch(self._posterior, [self._matrix(atoms) for atoms in candidates], count)

    def labelled_range(self, labels: Sequence[Atoms]) -> LabelledRange:
        """From the shells of the cluster basis."""
        pairs = self.basis.shells.pairs(self.box)
        limit = self._seen(labels).largest[pairs.shell]
        return LabelledRange(self._ideal_positions, pairs.first, pairs.second, limit)

    def _matrix(self, atoms: Atoms) -> Array:
        return self.basis.force_matrix(atoms, self.box)

    def _stable(self, posterior: Any) -> tuple[Any, dict[str, Any]]:
        """With crystal.stable, the fit without negative curvature, and what it cost."""
        from ubmd.potentials.force_constants.curvature import stabilised, wave_vectors

        if not self.settings.stable:
            return posterior, {}
        found = stabilised(self.basis, posterior, wave_vectors(self.basis.lattice, [self.box.matrix]))
        sums = self._equations.sums["forces"]
        before, after = (math.sqrt(sums.residual(p.mean) / sums.rows) for p in (posterior, found.posterior))
        cost = {"rows": found.rows, "lowest": found.lowest_before, "rmse_without": before, "rmse_with": after}
        return found.posterior, {"constraint": cost}

    def _seen(self, labels: Sequence[Atoms]) -> Seen:
        """How far the displacements of labels reach."""
        from ubmd.potentials.force_constants.seen import Seen

        seen = Seen(self.basis)
        for atoms in labels:
            seen.add(self.box.displacements(atoms), self.box)
        return seen

    def _repulsion(self, atoms: Atoms) -> Array:
        """Forces [n, 3] of core and wall, eV/Å."""
        return self.basis.fixed(self._posterior.core, self._posterior.limits, atoms, self.box)[1]

    def _add(self, labels: Sequence[Atoms]) -> None:
        """Bring the sums to these labels."""
        from ubmd.potentials.force_constants.regression import NormalEquations

        hashes = [dataset_hash([atoms]) for atoms in labels]
        if hashes[: len(self._learnt)] != self._learnt:
            self._equations, self._learnt, self._first = NormalEquations(self.basis.parameter_orders), [], None
        for atoms, label in list(zip(labels, hashes, strict=True))[len(self._learnt) :]:
            self._equations.add(self._matrix(atoms), atoms.get_forces(), energy=self._energy_row(atoms))
            self._learnt.append(label)

    def _energy_row(self, atoms: Atoms) -> tuple[Array, float] | None:
        """Features and energy relative to the first label (None for itself): the ideal crystal's is not needed."""
        if not self.settings.energies:
            return None
        features, energy = self.basis.energy_features(atoms, self.box), float(atoms.get_potential_energy())
        if self._first is None:
            self._first = features, energy
            return None
        return features - self._first[0], energy - self._first[1]

    def _ideal_energy(self, labels: Sequence[Atoms], posterior: Any) -> float | None:
        """Energy of the ideal crystal, eV per primitive cell, as the labels have it on average."""
        energies = [
            (float(atoms.get_potential_energy()) - float(posterior.energy(self.basis.energy_features(atoms, self.box))))
            / self.box.determinant
            for atoms in labels
            if "energy" in atoms.calc.results
        ]
        return math.fsum(energies) / len(energies) if energies else None


def _settings_of(settings: DynamicRunSettings) -> CrystalSettings:
    assert settings.crystal is not None
    return settings.crystal


def _ideal_crystal(settings: DynamicRunSettings, base: Path) -> Atoms:
    """The ideal crystal that the settings name."""
    return read_structures(_settings_of(settings).structure_file(base), compare=False)[0]


def _by_order(values: Any) -> dict[str, Any]:
    return {str(order): value for order, value in values.items()}
