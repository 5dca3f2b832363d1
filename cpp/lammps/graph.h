// From LAMMPS's neighbour list to the arrays that a model file takes, in blocks of centres, and back to the atoms.
#pragma once

#include <cstddef>
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
  const int *groups;        // [n_all] bits of each atom's groups
};

// Atoms that are excluded from all others (neigh_modify exclude): they count as absent. Fixes that try deletions, as
// fix gcmc, put an atom into such a group and ask for the energy. An atom that merely has no neighbour is there.
struct Absent {
  int groups = 0;           // bits of the groups
  std::vector<bool> types;  // of each type; empty: none

  bool any() const { return groups != 0 || !types.empty(); }
  bool covers(int type, int bits) const { return (bits & groups) != 0 || (!types.empty() && types[type - 1]); }
};

// Who takes part: only atoms whose type has an element, and which aren't absent. Read again at every evaluation,
// because types and groups may change between two rebuilds of the list (fix atom/swap).
struct Participants {
  std::vector<int> centres;   // atom index of each centre, in the order of the list
  std::vector<int> elements;  // [n_all] element index of each atom, -1: none, or absent

  void read(const Atoms &atoms, const Neighbours &list, const std::vector<int> &element_of_type, const Absent &absent);
};

// Consecutive centres with their pairs, sorted by centre. `neighbours`, `ends` and `vectors` may be longer than the
// pairs: they keep their size from one evaluation to the next.
struct Block {
  std::vector<int> centres;              // [n] atom index
  std::vector<std::int64_t> species;     // [n] element index
  std::vector<std::int64_t> first;       // [n + 1] pairs of centre i: first[i] to first[i + 1] - 1
  std::vector<std::int64_t> neighbours;  // [P] element index of a pair's neighbour
  std::vector<int> ends;                 // [P] atom index of a pair's neighbour
  std::vector<int> nodes;                // [P] with message passing: atom that stands for the neighbour; else empty
  std::vector<double> vectors;           // [P, 3] x_neighbour - x_centre, Å
  // Of a crystal a centre's pairs are its sites (itself among them), and the energy depends on the displacements of the
  // atoms there from the ideal crystal, in the model's own frame; vectors and neighbours aren't filled.
  bool of_sites = false;
  std::size_t n_messengers = 0;       // centres at the end whose own energies don't count: they only carry messages
  std::vector<double> displacements;  // [P, 3] Å

  std::int64_t n_centres() const { return static_cast<std::int64_t>(centres.size()); }
  std::int64_t n_energies() const { return n_centres() - static_cast<std::int64_t>(n_messengers); }
  std::int64_t n_pairs() const { return first.empty() ? 0 : first.back(); }

  // Take centres begin to end - 1 and their pairs shorter than `cutoff`.
  void build(const Atoms &atoms, const Neighbours &list, const Participants &who, std::size_t begin, std::size_t end,
             double cutoff);

  // Of a network that passes messages in `layers` steps: take all centres, and behind them the atoms that are up to
  // layers - 1 pairs away from one, with their pairs. Images of an atom have the same features: one of them stands for
  // all (the owned atom, if there is one), so the graph has no more atoms than the system. The list has rows of the
  // ghosts that stand for an atom, and `tags` [n_all] are atom IDs.
  void build_messages(const Atoms &atoms, const Neighbours &list, const Participants &who, const int *tags,
                      double cutoff, int layers);
  double bytes() const;

 private:
  void reserve_pairs(std::int64_t n);
  std::int64_t add_pairs(const Atoms &atoms, const Neighbours &list, const Participants &who, int centre, double cutoff,
                         std::int64_t n);
};

// Add to f [n_all, stride], its first three columns, sign * dE/dx for the energy with this gradient [P, 3] with respect
// to the vectors or displacements (sign -1: forces). Ghosts included.
void add_gradient(const Block &block, const double *gradient, double sign, double *f, int stride);

// Add the sum over pairs of r ⊗ gradient (dE/dstrain of this rank), rows of r first: xx xy xz yx ...
void add_strain_derivative(const Block &block, const double *gradient, double *derivative);

// Index of the first owned atom with a position that is not finite; -1 if all are.
int find_non_finite(const Atoms &atoms);

}  // namespace ubmd
