#include "graph.h"

#include <cmath>
#include <unordered_map>

namespace ubmd {
namespace {

// Room for at least n entries. Never shrinks, so that steady steps neither allocate nor clear memory.
template <typename Number>
void reserve(std::vector<Number> &values, std::size_t n) {
  if (values.size() < n) values.resize(n + n / 8);
}

}  // namespace

void Participants::read(const Atoms &atoms, const Neighbours &list, const std::vector<int> &element_of_type,
                        const Absent &absent) {
  elements.resize(atoms.n_all);
  for (int i = 0; i < atoms.n_all; ++i) elements[i] = element_of_type[atoms.types[i] - 1];
  if (absent.any())
    for (int i = 0; i < atoms.n_all; ++i)
      if (absent.covers(atoms.types[i], atoms.groups[i])) elements[i] = -1;
  centres.clear();
  for (int k = 0; k < list.count; ++k)
    if (elements[list.centres[k]] >= 0) centres.push_back(list.centres[k]);
}

void Block::reserve_pairs(std::int64_t n) {
  reserve(neighbours, n);
  reserve(ends, n);
  reserve(vectors, 3 * n);
}

// Write the pairs of an atom from number n on, where there is room for its whole row; returns the number after them.
std::int64_t Block::add_pairs(const Atoms &atoms, const Neighbours &list, const Participants &who, int centre,
                              double cutoff, std::int64_t n) {
  const double *x = atoms.positions;
  const double limit = cutoff * cutoff;
  const int *row = list.neighbours[centre];
  const double origin[3] = {x[3 * centre], x[3 * centre + 1], x[3 * centre + 2]};
  for (int m = 0; m < list.numbers[centre]; ++m) {
    // every candidate is written, the next one over it if it is too far: cheaper than an unpredictable branch
    const int j = row[m] & list.mask;
    const double dx = x[3 * j] - origin[0], dy = x[3 * j + 1] - origin[1], dz = x[3 * j + 2] - origin[2];
    const int element = who.elements[j];
    ends[n] = j;
    neighbours[n] = element;
    vectors[3 * n] = dx;
    vectors[3 * n + 1] = dy;
    vectors[3 * n + 2] = dz;
    const bool far = dx * dx + dy * dy + dz * dz >= limit;  // false for NaN, which must reach the energy
    n += static_cast<int>(!far) & static_cast<int>(element >= 0);
  }
  return n;
}

void Block::build(const Atoms &atoms, const Neighbours &list, const Participants &who, std::size_t begin,
                  std::size_t end, double cutoff) {
  centres.assign(who.centres.begin() + begin, who.centres.begin() + end);
  species.resize(centres.size());
  first.resize(centres.size() + 1);
  first[0] = 0;
  for (std::size_t k = 0; k < centres.size(); ++k) {
    species[k] = who.elements[centres[k]];
    // room for one row of the list at a time: the whole list, with its skin, is several times as long as the pairs
    reserve_pairs(first[k] + list.numbers[centres[k]]);
    first[k + 1] = add_pairs(atoms, list, who, centres[k], cutoff, first[k]);
  }
}

void Block::build_messages(const Atoms &atoms, const Neighbours &list, const Participants &who, const int *tags,
                           double cutoff, int layers) {
  centres = who.centres;
  first.assign(1, 0);
  std::unordered_map<int, int> node;  // by atom ID
  for (int i : centres) node.emplace(tags[i], i);
  std::size_t k = 0;
  for (int layer = 0; layer < layers; ++layer)
    for (const std::size_t end = centres.size(); k < end; ++k) {  // the atoms that are `layer` pairs away
      reserve_pairs(first[k] + list.numbers[centres[k]]);
      first.push_back(add_pairs(atoms, list, who, centres[k], cutoff, first[k]));
      reserve(nodes, first[k + 1]);
      for (auto e = first[k]; e < first[k + 1]; ++e) {
        const auto [known, is_new] = node.emplace(tags[ends[e]], ends[e]);
        nodes[e] = known->second;
        if (is_new && layer + 1 < layers) centres.push_back(ends[e]);
      }
    }
  n_messengers = centres.size() - who.centres.size();
  species.clear();
  for (int i : centres) species.push_back(who.elements[i]);
}

double Block::bytes() const {
  return static_cast<double>((centres.capacity() + ends.capacity() + nodes.capacity()) * sizeof(int) +
                             (species.capacity() + first.capacity() + neighbours.capacity()) * sizeof(std::int64_t) +
                             (vectors.capacity() + displacements.capacity()) * sizeof(double));
}

void add_gradient(const Block &block, const double *gradient, double sign, double *f, int stride) {
  for (std::size_t k = 0; k < block.centres.size(); ++k) {
    double sum[3] = {0.0, 0.0, 0.0};
    for (std::int64_t e = block.first[k]; e < block.first[k + 1]; ++e) {
      double *neighbour = f + static_cast<std::ptrdiff_t>(stride) * block.ends[e];
      for (int a = 0; a < 3; ++a) {
        const double g = sign * gradient[3 * e + a];  // the vector is x_neighbour - x_centre
        neighbour[a] += g;
        sum[a] += g;
      }
    }
    if (block.of_sites) continue;  // a displacement is that of one atom alone
    double *centre = f + static_cast<std::ptrdiff_t>(stride) * block.centres[k];
    for (int a = 0; a < 3; ++a) centre[a] -= sum[a];
  }
}

void add_strain_derivative(const Block &block, const double *gradient, double *derivative) {
  double sum[9] = {};
  for (std::int64_t e = 0; e < block.n_pairs(); ++e)
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) sum[3 * a + b] += block.vectors[3 * e + a] * gradient[3 * e + b];
  for (int k = 0; k < 9; ++k) derivative[k] += sum[k];
}

int find_non_finite(const Atoms &atoms) {
  for (int i = 0; i < atoms.n_local; ++i)
    for (int k = 0; k < 3; ++k)
      if (!std::isfinite(atoms.positions[3 * i + k])) return i;
  return -1;
}

}  // namespace ubmd
