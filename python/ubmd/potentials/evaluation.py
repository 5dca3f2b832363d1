"""Evaluate any module with a model file's interface: energies, gradients, features, uncertainties and their gradients.

Each graph goes through descriptor and network once where the module has the fast interface (`Deployed.evaluate`), and
through its generic part otherwise.
"""

from typing import Any

import torch
from torch import Tensor

from ubmd.data.graph import Batch, Graph, scatter_forces


def evaluation(
    module: Any, pairs: Graph | Batch, edge_vector: Tensor, atom_scale: Tensor | None = None
) -> "Evaluation":
    """Everything about the atoms of one graph or batch.

    Args:
        module: of a model file.
        pairs: the graph or batch.
        edge_vector: [P, 3] in the precision that is wanted.
        atom_scale: [elements] (float64) factors that the file's record has for u_i; None: 1.
    """
    kind = FastEvaluation if hasattr(module, "evaluate") else Evaluation
    return kind(module, pairs, edge_vector, atom_scale)


def is_ensemble(module: Any) -> bool:
    """Whether atomic uncertainties come from the members' forces (see `gmnn.deployed.Deployed`)."""
    return hasattr(module, "force_uncertainties")


def structure_uncertainties(module: Any, means: Tensor) -> Tensor:
    """u [S] (eV/atom) of mean features [S, p]: at once, if the module is one of ours."""
    at_once = getattr(module, "structure_uncertainty", None)
    with torch.no_grad():
        if at_once is not None:
            u: Tensor = at_once(means)
            return u
        return torch.stack([module.uncertainty(mean) for mean in means])


class Evaluation:
    """One evaluation by the generic part of the interface, which any model file has.

    energy [n] eV; gradient dSum(E)/d(edge_vector) [P, 3] eV/Å; phi [n, p] as the module returns it; all detached.
    """

    def __init__(
        self, module: Any, pairs: Graph | Batch, edge_vector: Tensor, atom_scale: Tensor | None = None
    ) -> None:
        self.module, self.pairs = module, pairs
        self._weights = None if atom_scale is None else atom_scale[pairs.species]
        self.edge_vector = edge_vector.detach()
        self.n_atoms = len(pairs.species)
        self._evaluate()

    def _evaluate(self) -> None:
        arguments = self._arguments(self.edge_vector)
        energy, gradient = self.module.forces(*arguments)
        with torch.no_grad():
            self.phi = self.module(*arguments)[1]
        self.energy, self.gradient = energy.double(), gradient.double()

    def _arguments(self, edge: Tensor) -> tuple[Any, ...]:
        return self.pairs.species, self.pairs.edge_index, edge, self.n_atoms

    def feature_gradient(self, w: Tensor) -> Tensor:
        """d(sum_i w·phi_i)/d(edge_vector) [P, 3] (float64) for w [p]."""
        gradient: Tensor = self.module.bias(*self._arguments(self.edge_vector), w)
        return gradient.double()

    def member_gradients(self) -> Tensor:
        """Gradients [M, P, 3] (float64) of the energies of an ensemble's members."""
        edge = self.edge_vector.clone().requires_grad_(True)
        return self._member_gradients(edge, create_graph=False).detach()

    def _member_gradients(self, edge: Tensor, create_graph: bool) -> Tensor:
        phi = self.module(*self._arguments(edge))[1]
        if len(edge) == 0:
            return edge.new_zeros(phi.size(1), 0, 3, dtype=torch.float64)
        columns = [
            torch.autograd.grad(column.sum(), edge, retain_graph=True, create_graph=create_graph)[0].double()
            for column in phi.unbind(1)
        ]
        return torch.stack(columns)

    def member_bias(self, cotangents: Tensor) -> Tensor:
        """d(sum_m cotangents_m·gradient_m)/d(edge_vector) [P, 3] (float64) for cotangents [M, P, 3]."""
        edge = self.edge_vector.clone().requires_grad_(True)
        if len(edge) == 0:
            return torch.zeros_like(edge, dtype=torch.float64)
        gradients = self._member_gradients(edge, create_graph=True)
        return torch.autograd.grad((cotangents * gradients).sum(), edge)[0].double()

    def atomic_feature_gradient(self, w: Tensor) -> Tensor:
        """The same as ``feature_gradient`` for weights [n, p] that differ from atom to atom."""
        return self.feature_gradient(w)

    def atomic_uncertainties(self) -> Tensor:
        """u_i [n] (float64, eV/Å)."""
        if is_ensemble(self.module):
            return self._scaled(self.module.force_uncertainties(self._member_forces(self.member_gradients())))
        with torch.no_grad():
            return self._scaled(self.module.atomic_uncertainties(self.phi))

    def _scaled(self, u: Tensor) -> Tensor:
        """u_i [n] times the factors of the atoms' elements."""
        return u if self._weights is None else self._weights * u

    def atomic_uncertainty_gradient(self) -> tuple[Tensor, Tensor]:
        """(sum of the atomic uncertainties, its gradient with respect to edge_vector [P, 3] (float64))."""
        ensemble = is_ensemble(self.module)
        source = (self.member_gradients() if ensemble else self.phi).detach().requires_grad_(True)
        with torch.enable_grad():
            if ensemble:
                total = self._scaled(self.module.force_uncertainties(self._member_forces(source))).sum()
            else:
                total = self._scaled(self.module.atomic_uncertainties(source)).sum()
        (cotangent,) = torch.autograd.grad(total, source)
        pull = self.member_bias if ensemble else self.atomic_feature_gradient
        return total.detach(), pull(cotangent)

    def _member_forces(self, gradients: Tensor) -> Tensor:
        """Forces [n, 3, M] from the gradients [M, P, 3]."""
        return torch.stack([scatter_forces(self.pairs.edge_index, one, self.n_atoms) for one in gradients], 2)


class FastEvaluation(Evaluation):
    """The same by the fast part: one pass through the network, derivatives in closed form."""

    def _evaluate(self) -> None:
        self.energy, self.gradient, self._tape = self.module.evaluate(*self._arguments_by_centre(), True)
        _, self.phi, self._factors = self.module.features(self._tape, False)

    def _arguments_by_centre(self) -> tuple[Tensor, ...]:
        return self.pairs.species, self.pairs.first, self.pairs.neighbours, self.edge_vector

    def feature_gradient(self, w: Tensor) -> Tensor:
        directions = self.module.directions(w, False)
        gradient: Tensor = self.module.feature_gradient(self._tape, self._factors, directions, w)
        return gradient

    def atomic_feature_gradient(self, w: Tensor) -> Tensor:
        gradient: Tensor = self.module.feature_gradient(self._tape, self._factors, [], w)
        return gradient

    def member_gradients(self) -> Tensor:
        gradients: Tensor = self.module.member_gradients(self._tape)
        return gradients

    def member_bias(self, cotangents: Tensor) -> Tensor:
        gradient: Tensor = self.module.member_bias(*self._arguments_by_centre(), cotangents)
        return gradient
