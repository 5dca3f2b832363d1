#include "graph.h"

#include <cmath>

namespace ubmd {
namespace {

// Number the atoms that have an element, owned ones first; returns atom index -> graph index (-1: none).
std::vector<std::int64_t> number_atoms(const Atoms &atoms, const std::vector<int> &species, Graph &graph) {
  std::vector<std::int64_t> slots(atoms.n_all, -1);
  graph.atoms.clear();
  graph.species.clear();
  for (int i = 0; i < atoms.n_all; ++i) {
    if (i == atoms.n_local) graph.n_local = static_cast<std::int64_t>(graph.atoms.size());
    const int element = species[atoms.types[i] - 1];
    if (element < 0) continue;
    slots[i] = static_cast<std::int64_t>(graph.atoms.size());
    graph.atoms.push_back(i);
    graph.species.push_back(element);
  }
  if (atoms.n_local == atoms.n_all) graph.n_local = static_cast<std::int64_t>(graph.atoms.size());
  return slots;
}

}  // namespace

void build_graph(const Atoms &atoms, const Neighbours &list, const std::vector<int> &species, double cutoff,
                 Graph &graph) {
  const auto slots = number_atoms(atoms, species, graph);
  const double *x = atoms.positions;
  std::vector<std::int64_t> ends;
  graph.edges.clear();
  graph.vectors.clear();
  for (int k = 0; k < list.count; ++k) {
    const int i = list.centres[k];
    if (slots[i] < 0) continue;
    for (int n = 0; n < list.numbers[i]; ++n) {
      const int j = list.neighbours[i][n] & list.mask;
      if (slots[j] < 0) continue;
      const double d[3] = {x[3 * j] - x[3 * i], x[3 * j + 1] - x[3 * i + 1], x[3 * j + 2] - x[3 * i + 2]};
      if (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] >= cutoff * cutoff) continue;
      graph.edges.push_back(slots[i]);
      ends.push_back(slots[j]);
      graph.vectors.insert(graph.vectors.end(), d, d + 3);
    }
  }
  graph.edges.insert(graph.edges.end(), ends.begin(), ends.end());
}

int find_non_finite(const Atoms &atoms) {
  for (int i = 0; i < atoms.n_local; ++i)
    for (int k = 0; k < 3; ++k)
      if (!std::isfinite(atoms.positions[3 * i + k])) return i;
  return -1;
}

}  // namespace ubmd
