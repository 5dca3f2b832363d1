#include "exclusions.h"

#include <cstddef>

#include "group.h"
#include "neighbor.h"

namespace ubmd {
namespace {

constexpr int group_all = 0;  // LAMMPS's index

bool excludes_types(const LAMMPS_NS::Neighbor &neighbor, int a, int b) {
  for (int k = 0; k < neighbor.nex_type; ++k) {
    const int first = neighbor.ex1_type[k], second = neighbor.ex2_type[k];
    if ((first == a && second == b) || (first == b && second == a)) return true;
  }
  return false;
}

}  // namespace

Absent read_absent(const LAMMPS_NS::Neighbor &neighbor, const LAMMPS_NS::Group &group,
                   const std::vector<int> &species) {
  Absent absent;
  for (int k = 0; k < neighbor.nex_group; ++k) {
    const int first = neighbor.ex1_group[k], second = neighbor.ex2_group[k];
    if (second == group_all) absent.groups |= group.bitmask[first];
    if (first == group_all) absent.groups |= group.bitmask[second];
  }
  if (neighbor.nex_type == 0) return absent;
  absent.types.assign(species.size(), true);
  for (std::size_t a = 0; a < species.size(); ++a)
    for (std::size_t b = 0; b < species.size(); ++b)
      if (species[b] >= 0 && !excludes_types(neighbor, static_cast<int>(a) + 1, static_cast<int>(b) + 1))
        absent.types[a] = false;
  return absent;
}

bool excludes_pairs(const LAMMPS_NS::Neighbor &neighbor, const LAMMPS_NS::Group &group, const std::vector<int> &species,
                    int bits) {
  for (int k = 0; k < neighbor.nex_type; ++k)
    if (species[neighbor.ex1_type[k] - 1] >= 0 && species[neighbor.ex2_type[k] - 1] >= 0) return true;
  for (int k = 0; k < neighbor.nex_group; ++k)
    if ((bits & group.bitmask[neighbor.ex1_group[k]]) && (bits & group.bitmask[neighbor.ex2_group[k]])) return true;
  for (int k = 0; k < neighbor.nex_mol; ++k)
    if (bits & group.bitmask[neighbor.ex_mol_group[k]]) return true;
  return false;
}

}  // namespace ubmd
