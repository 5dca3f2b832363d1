// What LAMMPS's exclusions (neigh_modify exclude) mean for a model whose atoms have energies of their own.
#pragma once

#include <vector>

#include "graph.h"

namespace LAMMPS_NS {
class Group;
class Neighbor;
}  // namespace LAMMPS_NS

namespace ubmd {

// Atoms that are excluded from all others: those of a group that is excluded from group all, and those of a type that
// is excluded from every type with an element. `species` is the element index of each type, -1: none.
Absent read_absent(const LAMMPS_NS::Neighbor &neighbor, const LAMMPS_NS::Group &group, const std::vector<int> &species);

// Whether an exclusion may concern a pair of atoms with elements; `bits` are those of all groups that they are in.
bool excludes_pairs(const LAMMPS_NS::Neighbor &neighbor, const LAMMPS_NS::Group &group, const std::vector<int> &species,
                    int bits);

}  // namespace ubmd
