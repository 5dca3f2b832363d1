// Atoms and edges in the arrays that a model file takes.
#pragma once

#include <cstdint>
#include <vector>

namespace ubmd {

// A full neighbour list in LAMMPS's layout; `mask` strips the special-bond bits of an entry.
struct Neighbours {
  int count;                     // number of centres
  const int *centres;            // [count] atom index of each centre
  const int *numbers;            // neighbours of each atom, by atom index
  const int *const *neighbours;  // by atom index
  int mask;
};

// Atoms as LAMMPS stores them: the first n_local are owned by this rank, the others are ghosts.
struct Atoms {
  int n_local;
  int n_all;
  const double *positions;  // [n_all, 3], Å
  const int *types;         // [n_all], from 1
};

// The model's view: only atoms whose type has an element, owned ones first.
struct Graph {
  std::vector<int> atoms;             // atom index of each graph atom
  std::vector<std::int64_t> species;  // [n]
  std::vector<std::int64_t> edges;    // [2, P] row 0: centres, row 1: neighbours (graph atoms)
  std::vector<double> vectors;        // [P, 3] x_neighbour - x_centre, Å
  std::int64_t n_local = 0;           // owned graph atoms

  std::int64_t n_edges() const { return static_cast<std::int64_t>(vectors.size() / 3); }
};

// Fill `graph` with the edges shorter than `cutoff`; `species` gives the element of each type (index type - 1), -1:
// none.
void build_graph(const Atoms &atoms, const Neighbours &list, const std::vector<int> &species, double cutoff,
                 Graph &graph);

// Index of the first owned atom with a position that is not finite; -1 if all are.
int find_non_finite(const Atoms &atoms);

}  // namespace ubmd
