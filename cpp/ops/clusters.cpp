// Operators of force-constant potentials: tables of a model file (see `ClusterTables`) become programs for the kernels.
#include "clusters.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "operators.h"

namespace ubmd::ops {

namespace {

using at::Tensor;

// Bytes of monomials that `moments` keeps at a time, about what fits into the second level of cache.
constexpr std::int64_t kTileBytes = 512 * 1024;
// Bytes of intermediate results of `crystal_deviations`; more would be allocated from the system at every call. But no
// fewer than kChunkSets sets of centres, for the products of matrices.
constexpr std::int64_t kChunkBytes = 1024 * 1024, kChunkSets = 8;

struct Free {
  void operator()(char *memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

Memory vectors(std::int64_t count) {
  const std::int64_t bytes = std::max<std::int64_t>(count, 1) * cluster_kernels().vector_bytes;
  char *memory = static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  TORCH_CHECK(memory, "ubmd operators: out of memory");
  return Memory(memory);
}

const std::int64_t *integers(const Tensor &tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_contiguous(),
              "ubmd operators: a table of clusters is not a contiguous int64 tensor");
  return tensor.const_data_ptr<std::int64_t>();
}

const double *numbers(const Tensor &tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.is_contiguous(),
              "ubmd operators: a table of clusters is not a contiguous float64 tensor");
  return tensor.const_data_ptr<double>();
}

// One row of a table of blocks: clusters of one sublattice and one tuple of degrees.
struct Block {
  explicit Block(const std::int64_t *row) : sublattice(row[0]), begin(row[1]), count(row[2]), offset(row[3]) {
    size = 1;
    for (int k = 0; k < kMaxBodies && row[4 + k] > 0; ++k, ++n_bodies) {
      TORCH_CHECK(row[4 + k] <= kMaxDegree, "ubmd operators: a cluster has a body of degree ", row[4 + k]);
      degrees[k] = int(row[4 + k]);
      size *= count_monomials(degrees[k]);
    }
    TORCH_CHECK(n_bodies > 0, "ubmd operators: a cluster has no bodies");
  }
  std::int64_t sublattice, begin, count;
  std::int64_t offset;  // of the coefficients; of members: which body is the centre
  std::array<int, kMaxBodies> degrees{};
  int n_bodies = 0;
  std::int64_t size;  // coefficients of a cluster
};

// The tables of a model file, all contiguous:
//  0 numbers of relative sites [S]         1 blocks of clusters [B, 10]        2 relative sites of their bodies [N, 6]
//  3 operation of each cluster [N]         4 component of each coefficient [C] 5 D, p of each orbit [O, 2]
//  6 raw coefficients, parameters [n, 2]   7 raw tensors                       8 raw coefficients by parameters
//  9 first matrix row of each degree [8]  10 first element of each row        11, 12 columns, values of the elements
// 13 blocks of members                    14 relative sites of their bodies   15, 16 orbit, operation of each member
struct ClusterTables {
  explicit ClusterTables(const std::vector<Tensor> &tables) : tables(tables) {
    TORCH_CHECK(tables.size() == 17, "ubmd operators: clusters have 17 tables, not ", tables.size());
    for (std::size_t k = 0; k < tables.size(); ++k) k == 7 || k == 8 || k == 12 ? (void)real(k) : (void)integer(k);
    blocks = rows(1);
  }

  const std::int64_t *integer(std::size_t k) const { return integers(tables[k]); }
  const double *real(std::size_t k) const { return numbers(tables[k]); }
  std::int64_t size(std::size_t k) const { return tables[k].size(0); }
  std::int64_t n_sublattices() const { return size(0); }
  std::int64_t n_coefficients() const { return size(4); }
  ClusterTurns turns() const { return {integer(9), integer(10), integer(11), real(12)}; }

  std::vector<Block> rows(std::size_t k) const {
    std::vector<Block> result;
    for (std::int64_t i = 0; i < size(k); ++i) result.emplace_back(integer(k) + (4 + kMaxBodies) * i);
    return result;
  }

  const std::vector<Tensor> &tables;
  std::vector<Block> blocks;
};

// A program for one sublattice, and the arrays that it points to.
class Program {
 public:
  // Clusters that are anchored at the centre, or all that contain it.
  Program(const ClusterTables &tables, std::int64_t sublattice, bool members) {
    program_.n_sites = int(tables.integer(0)[sublattice]);
    const std::vector<Block> blocks = members ? tables.rows(13) : tables.blocks;
    place_sites(blocks, tables.integer(members ? 14 : 2), sublattice);
    program_.largest_rows = 1;
    if (members) {
      add_orbits(tables, blocks, sublattice);
    } else {
      add_groups(blocks, tables.integer(2), sublattice);
    }
  }
  Program(const Program &) = delete;

  const ClusterProgram &get() const { return program_; }

 private:
  // Every site has monomials up to the highest degree that a body has there.
  void place_sites(const std::vector<Block> &blocks, const std::int64_t *bodies, std::int64_t sublattice) {
    degree_.assign(program_.n_sites, 0);
    place_.assign(program_.n_sites, 0);
    for (const Block &block : blocks)
      for (std::int64_t i = block.begin; block.sublattice == sublattice && i < block.begin + block.count; ++i)
        for (int k = 0; k < block.n_bodies; ++k) {
          const std::int64_t site = bodies[kMaxBodies * i + k];
          TORCH_CHECK_INDEX(site >= 0 && site < program_.n_sites, "ubmd operators: a cluster has an unknown site");
          degree_[site] = std::max(degree_[site], block.degrees[k]);
        }
    for (int k = 0; k < program_.n_sites; ++k) {
      place_[k] = program_.n_monomials;
      program_.n_monomials += count_all_monomials(degree_[k]);
    }
    program_.degree = degree_.data();
    program_.place = place_.data();
  }

  int place(std::int64_t site, int degree) const { return place_[site] + count_all_monomials(degree - 1); }

  // Neighbouring clusters with the same bodies but the last share a group.
  void add_groups(const std::vector<Block> &blocks, const std::int64_t *bodies, std::int64_t sublattice) {
    for (const Block &block : blocks) {
      if (block.sublattice != sublattice) continue;
      const int last = block.n_bodies - 1;
      for (std::int64_t i = 0; i < block.count; ++i) {
        const std::int64_t *body = bodies + kMaxBodies * (block.begin + i);
        if (i == 0 || !std::equal(body, body + last, body - kMaxBodies)) start_group(block, body, i);
        ++groups_.back().n_clusters;
        last_.push_back(place(body[last], block.degrees[last]));
      }
    }
    const int *from = last_.data();
    for (ClusterGroup &group : groups_) {
      group.last = from;
      from += group.n_clusters;
      program_.largest_rows = std::max(program_.largest_rows, group.rows);
    }
    program_.groups = groups_.data();
    program_.n_groups = int(groups_.size());
  }

  void start_group(const Block &block, const std::int64_t *body, std::int64_t index) {
    ClusterGroup group{};
    group.n_others = block.n_bodies - 1;
    group.rows = 1;
    for (int k = 0; k < group.n_others; ++k) {
      group.others[k] = place(body[k], block.degrees[k]);
      group.dims[k] = count_monomials(block.degrees[k]);
      group.rows *= group.dims[k];
    }
    group.columns = count_monomials(block.degrees[group.n_others]);
    group.coefficient = block.offset + index * block.size;
    groups_.push_back(group);
  }

  void add_orbits(const ClusterTables &tables, const std::vector<Block> &blocks, std::int64_t sublattice) {
    const std::int64_t *shapes = tables.integer(5);
    const double *raw = tables.real(7);
    for (std::int64_t o = 0; o < tables.size(5); ++o) {
      ClusterOrbit orbit{};
      orbit.dimension = int(shapes[2 * o]);
      orbit.n_raw = int(shapes[2 * o + 1]);
      orbit.raw = raw;
      orbit.raw_place = program_.n_raw;
      raw += std::int64_t(orbit.dimension) * orbit.n_raw;
      program_.n_raw += orbit.n_raw;
      program_.largest_dimension = std::max(program_.largest_dimension, orbit.dimension);
      orbits_.push_back(orbit);
    }
    std::vector<std::vector<ClusterMember>> by_orbit(orbits_.size());
    for (const Block &block : blocks) {
      if (block.sublattice != sublattice) continue;
      for (std::int64_t i = block.begin; i < block.begin + block.count; ++i) {
        const std::int64_t o = tables.integer(15)[i];
        TORCH_CHECK_INDEX(o >= 0 && o < std::int64_t(orbits_.size()), "ubmd operators: a cluster has an unknown orbit");
        orbits_[o].n_bodies = block.n_bodies;
        std::copy(block.degrees.begin(), block.degrees.end(), orbits_[o].degrees);
        TORCH_CHECK_INDEX(block.size == orbits_[o].dimension, "ubmd operators: a cluster doesn't fit its orbit");
        by_orbit[o].push_back(make_member(tables, block, i));
      }
    }
    for (std::size_t o = 0; o < orbits_.size(); ++o) {
      orbits_[o].n_members = int(by_orbit[o].size());
      members_.insert(members_.end(), by_orbit[o].begin(), by_orbit[o].end());
    }
    const ClusterMember *from = members_.data();
    for (ClusterOrbit &orbit : orbits_) {
      orbit.members = from;
      from += orbit.n_members;
    }
    program_.orbits = orbits_.data();
    program_.n_orbits = int(orbits_.size());
  }

  ClusterMember make_member(const ClusterTables &tables, const Block &block, std::int64_t row) const {
    ClusterMember member{};
    member.centre = int(block.offset);
    for (int k = 0; k < block.n_bodies; ++k)
      member.places[k] = place(tables.integer(14)[kMaxBodies * row + k], block.degrees[k]);
    member.operation = int(tables.integer(16)[row]);
    return member;
  }

  ClusterProgram program_{};
  std::vector<int> degree_, place_, last_;
  std::vector<ClusterGroup> groups_;
  std::vector<ClusterOrbit> orbits_;
  std::vector<ClusterMember> members_;
};

// Centres with their edges, checked: centre i has the edges first[i] and on, as many as its sublattice has sites.
struct Sites {
  Sites(const Tensor &species_, const Tensor &first_, const Tensor &displacement_, const ClusterTables &tables)
      : species(species_.contiguous()), first(first_.contiguous()), displacement(displacement_.contiguous()) {
    TORCH_CHECK(species.dim() == 1 && first.dim() == 1 && first.size(0) == species.size(0) + 1,
                "ubmd operators: species must have the shape [n] and first [n + 1]");
    TORCH_CHECK(displacement.dim() == 2 && displacement.size(1) == 3 && displacement.scalar_type() == at::kDouble,
                "ubmd operators: displacements must be float64 [P, 3]");
    const std::int64_t n = species.size(0), *sublattice = integers(species), *edge = integers(first);
    const std::int64_t *count = tables.integer(0);
    by_sublattice.resize(tables.n_sublattices());
    bool right = edge[0] == 0 && edge[n] == displacement.size(0);
    for (std::int64_t i = 0; i < n && right; ++i) {
      right =
          sublattice[i] >= 0 && sublattice[i] < tables.n_sublattices() && edge[i + 1] - edge[i] == count[sublattice[i]];
      if (right) by_sublattice[sublattice[i]].push_back(i);
    }
    TORCH_CHECK_INDEX(right, "A centre of the crystal doesn't have one edge for each of its relative sites.");
  }

  // Lane by lane: the sets begin .. end - 1 of as many centres of a sublattice as there are lanes.
  Centres some(std::int64_t sublattice, std::int64_t begin, std::int64_t end) const {
    const auto &indices = by_sublattice[sublattice];
    const std::int64_t lanes = cluster_kernels().lanes, n = std::int64_t(indices.size());
    return {std::min(end * lanes, n) - begin * lanes, indices.data() + begin * lanes,
            first.const_data_ptr<std::int64_t>(), displacement.const_data_ptr<double>()};
  }
  std::int64_t n_sets(std::int64_t sublattice) const {
    const std::int64_t lanes = cluster_kernels().lanes;
    return (std::int64_t(by_sublattice[sublattice].size()) + lanes - 1) / lanes;
  }

  Tensor species, first, displacement;
  std::vector<std::vector<std::int64_t>> by_sublattice;
};

// A cluster's tensor along one axis after the other: turned to the cluster, or moments of it turned back.
void turn(const ClusterTurns &turns, const Block &block, std::int64_t operation, bool back, std::vector<double> &tensor,
          std::vector<double> &scratch) {
  std::int64_t left = 1, right = block.size;
  for (int k = 0; k < block.n_bodies; ++k) {
    const int n = count_monomials(block.degrees[k]);
    right /= n;
    std::fill_n(scratch.begin(), block.size, 0.);
    const std::int64_t *row = turns.first + turns.start[block.degrees[k]] + operation * n;
    for (std::int64_t l = 0; l < left; ++l)
      for (int i = 0; i < n; ++i)
        for (std::int64_t e = row[i]; e < row[i + 1]; ++e) {
          const std::int64_t j = turns.column[e];
          const double *from = tensor.data() + (l * n + (back ? i : j)) * right;
          double *to = scratch.data() + (l * n + (back ? j : i)) * right;
          for (std::int64_t r = 0; r < right; ++r) to[r] += turns.value[e] * from[r];
        }
    tensor.swap(scratch);
    left *= n;
  }
}

// Calls run(block, operation, first coefficient) for every cluster.
template <class Run>
void for_clusters(const ClusterTables &tables, Run run) {
  const std::int64_t *operation = tables.integer(3);
  for (const Block &block : tables.blocks)
    for (std::int64_t i = 0; i < block.count; ++i)
      run(block, operation[block.begin + i], block.offset + i * block.size);
}

std::int64_t largest_cluster(const ClusterTables &tables) {
  std::int64_t largest = 0;
  for (const Block &block : tables.blocks) largest = std::max(largest, block.size);
  return largest;
}

// For each orbit: run(D, p, raw tensors, first component, first raw coefficient); returns the two totals.
template <class Run>
std::array<std::int64_t, 2> for_orbits(const ClusterTables &tables, Run run) {
  const std::int64_t *shape = tables.integer(5);
  const double *raw = tables.real(7);
  std::array<std::int64_t, 2> at{0, 0};
  for (std::int64_t o = 0; o < tables.size(5); ++o, shape += 2) {
    run(shape[0], shape[1], raw, at[0], at[1]);
    raw += shape[0] * shape[1];
    at[0] += shape[0];
    at[1] += shape[1];
  }
  return at;
}

// For each order: run(raw coefficients, parameters, their matrix, first raw coefficient, first parameter); the totals.
template <class Run>
std::array<std::int64_t, 2> for_orders(const ClusterTables &tables, Run run) {
  const std::int64_t *shape = tables.integer(6);
  const double *matrix = tables.real(8);
  std::array<std::int64_t, 2> at{0, 0};
  for (std::int64_t o = 0; o < tables.size(6); ++o, shape += 2) {
    run(shape[0], shape[1], matrix, at[0], at[1]);
    matrix += shape[0] * shape[1];
    at[0] += shape[0];
    at[1] += shape[1];
  }
  return at;
}

std::array<std::int64_t, 2> sizes_of_orbits(const ClusterTables &tables) {
  return for_orbits(tables, [](auto...) {});
}

std::array<std::int64_t, 2> sizes_of_orders(const ClusterTables &tables) {
  return for_orders(tables, [](auto...) {});
}

// Derivatives by the parameters [rows, P] from those by the raw coefficients.
Tensor by_parameters(const Tensor &by_raw, const ClusterTables &tables) {
  std::vector<Tensor> columns;
  for_orders(tables, [&](std::int64_t n_raw, std::int64_t n, const double *matrix, std::int64_t begin, std::int64_t) {
    const Tensor map = at::from_blob(const_cast<double *>(matrix), {n_raw, n}, at::kDouble);
    columns.push_back(product(by_raw.narrow(1, begin, n_raw), map, std::nullopt));
  });
  return at::cat(columns, 1);
}

// Norms of the rows of left @ factor; the columns of a triangular factor in parts, without its zeros.
Tensor projected_norms(const Tensor &left, const Tensor &factor, bool triangular) {
  const std::int64_t p = factor.size(1), n_parts = triangular && p >= 256 ? 8 : 1;
  Tensor result = at::zeros({left.size(0)}, left.options());
  for (std::int64_t k = 0; k < n_parts; ++k) {
    const std::int64_t begin = p * k / n_parts, end = p * (k + 1) / n_parts, rows = triangular ? end : factor.size(0);
    const Tensor part =
        product(left.narrow(1, 0, rows), factor.narrow(0, 0, rows).narrow(1, begin, end - begin), std::nullopt);
    result += part.square().sum(1);
  }
  return result.sqrt_();
}

}  // namespace

std::tuple<Tensor, Tensor> crystal_energies(const Tensor &species, const Tensor &first, const Tensor &displacement,
                                            const Tensor &coefficients, const std::vector<Tensor> &tensors) {
  const ClusterTables tables(tensors);
  const Sites sites(species, first, displacement, tables);
  const ClusterKernels &kernels = cluster_kernels();
  TORCH_CHECK(coefficients.numel() == tables.n_coefficients(), "ubmd operators: clusters have ",
              tables.n_coefficients(), " coefficients, not ", coefficients.numel());
  Tensor energy = at::empty({species.size(0)}, displacement.options()), gradient = at::empty_like(sites.displacement);
  const double *c = numbers(coefficients);
  for (std::int64_t s = 0; s < tables.n_sublattices(); ++s) {
    if (sites.n_sets(s) == 0) continue;
    const Program program(tables, s, false);
    at::parallel_for(0, sites.n_sets(s), 2, [&](std::int64_t begin, std::int64_t end) {
      const Memory scratch = vectors(kernels.scratch(program.get()));
      kernels.contract(program.get(), sites.some(s, begin, end), c, energy.mutable_data_ptr<double>(),
                       gradient.mutable_data_ptr<double>(), scratch.get());
    });
  }
  return {energy, gradient};
}

Tensor crystal_moments(const Tensor &species, const Tensor &first, const Tensor &displacement,
                       const std::vector<Tensor> &tensors) {
  const ClusterTables tables(tensors);
  const Sites sites(species, first, displacement, tables);
  const ClusterKernels &kernels = cluster_kernels();
  Tensor result = at::zeros({tables.n_coefficients()}, displacement.options());
  double *out = result.mutable_data_ptr<double>();
  for (std::int64_t s = 0; s < tables.n_sublattices(); ++s) {
    const std::int64_t n_sets = sites.n_sets(s);
    if (n_sets == 0) continue;
    const Program program(tables, s, false);
    if (program.get().n_groups == 0) continue;
    const std::int64_t size = std::int64_t(program.get().n_monomials) * kernels.vector_bytes;
    const std::int64_t n_tiles = std::clamp<std::int64_t>(kTileBytes / size, 1, n_sets);
    const Memory monomials = vectors(n_tiles * program.get().n_monomials);
    for (std::int64_t tile = 0; tile < n_sets; tile += n_tiles) {
      const std::int64_t count = std::min(n_tiles, n_sets - tile);
      for (std::int64_t k = 0; k < count; ++k)
        kernels.monomials(program.get(), sites.some(s, tile + k, tile + k + 1), monomials.get() + k * size);
      at::parallel_for(0, program.get().n_groups, 8, [&](std::int64_t begin, std::int64_t end) {
        const Memory scratch = vectors(kernels.moments_scratch(program.get(), int(count)));
        kernels.moments(program.get(), int(begin), int(end), int(count), monomials.get(), out, scratch.get());
      });
    }
  }
  return result;
}

Tensor crystal_expand(const Tensor &parameters, const std::vector<Tensor> &tensors) {
  const ClusterTables tables(tensors);
  const ClusterKernels &kernels = cluster_kernels();
  const auto [n_raw, n] = sizes_of_orders(tables);
  TORCH_CHECK(parameters.dim() == 1 && parameters.size(0) == n, "ubmd operators: a crystal has ", n,
              " parameters, not ", parameters.numel());
  const Tensor w = parameters.contiguous();
  std::vector<double> raw(n_raw), components(sizes_of_orbits(tables)[0]);
  for_orders(tables,
             [&](std::int64_t rows, std::int64_t columns, const double *matrix, std::int64_t to, std::int64_t from) {
               kernels.multiply(rows, columns, matrix, numbers(w) + from, raw.data() + to, false);
             });
  for_orbits(tables,
             [&](std::int64_t rows, std::int64_t columns, const double *matrix, std::int64_t to, std::int64_t from) {
               kernels.multiply(rows, columns, matrix, raw.data() + from, components.data() + to, false);
             });
  Tensor result = at::empty({tables.n_coefficients()}, w.options());
  std::vector<double> tensor(largest_cluster(tables)), scratch(tensor.size());
  const ClusterTurns turns = tables.turns();
  for_clusters(tables, [&](const Block &block, std::int64_t operation, std::int64_t offset) {
    const std::int64_t *from = tables.integer(4) + offset;
    for (std::int64_t i = 0; i < block.size; ++i) tensor[i] = components[from[i]];
    turn(turns, block, operation, false, tensor, scratch);
    std::copy_n(tensor.begin(), block.size, result.mutable_data_ptr<double>() + offset);
  });
  return result;
}

Tensor crystal_reduce(const Tensor &moments, const std::vector<Tensor> &tensors) {
  const ClusterTables tables(tensors);
  const ClusterKernels &kernels = cluster_kernels();
  TORCH_CHECK(moments.numel() == tables.n_coefficients(), "ubmd operators: clusters have ", tables.n_coefficients(),
              " coefficients, not ", moments.numel());
  const Tensor given = moments.contiguous();
  const auto [n_raw, n] = sizes_of_orders(tables);
  std::vector<double> raw(n_raw), components(sizes_of_orbits(tables)[0]);
  std::vector<double> tensor(largest_cluster(tables)), scratch(tensor.size());
  const ClusterTurns turns = tables.turns();
  for_clusters(tables, [&](const Block &block, std::int64_t operation, std::int64_t offset) {
    std::copy_n(numbers(given) + offset, block.size, tensor.begin());
    turn(turns, block, operation, true, tensor, scratch);
    const std::int64_t *to = tables.integer(4) + offset;
    for (std::int64_t i = 0; i < block.size; ++i) components[to[i]] += tensor[i];
  });
  for_orbits(tables,
             [&](std::int64_t rows, std::int64_t columns, const double *matrix, std::int64_t from, std::int64_t to) {
               kernels.multiply_transposed(rows, columns, matrix, components.data() + from, raw.data() + to, false);
             });
  Tensor result = at::zeros({n}, given.options());
  for_orders(tables,
             [&](std::int64_t rows, std::int64_t columns, const double *matrix, std::int64_t from, std::int64_t to) {
               kernels.multiply_transposed(rows, columns, matrix, raw.data() + from,
                                           result.mutable_data_ptr<double>() + to, false);
             });
  return result;
}

Tensor crystal_deviations(const Tensor &species, const Tensor &first, const Tensor &displacement, const Tensor &factor,
                          bool triangular, const std::vector<Tensor> &tensors, const std::optional<Tensor> &others) {
  const ClusterTables tables(tensors);
  const Sites sites(species, first, displacement, tables);
  const ClusterKernels &kernels = cluster_kernels();
  const auto [n_raw, n_clusters] = sizes_of_orders(tables);
  if (others)
    TORCH_CHECK(others->dim() == 3 && others->size(0) == species.size(0) && others->size(1) == 3,
                "ubmd operators: derivatives by other parameters must be [", species.size(0), ", 3, P], not ",
                others->sizes());
  const std::int64_t n_parameters = n_clusters + (others ? others->size(2) : 0);
  TORCH_CHECK(factor.dim() == 2 && factor.size(0) == n_parameters, "ubmd operators: the factor of ", n_parameters,
              " parameters must have as many rows, not ", factor.sizes());
  Tensor result = at::empty({species.size(0)}, displacement.options());
  const std::int64_t width = n_raw + 2 * n_parameters, lanes = kernels.lanes;
  const std::int64_t most = std::max(kChunkSets, kChunkBytes / (24 * width * lanes));  // sets of centres at once
  for (std::int64_t s = 0; s < tables.n_sublattices(); ++s) {
    if (sites.n_sets(s) == 0) continue;
    const Program program(tables, s, true);
    for (std::int64_t set = 0; set < sites.n_sets(s); set += most) {
      const Centres all = sites.some(s, set, std::min(set + most, sites.n_sets(s)));
      // the kernel's results are indexed like its centres: from 0
      std::vector<std::int64_t> indices(all.n), edges(all.n);
      for (std::int64_t i = 0; i < all.n; ++i) {
        indices[i] = i;
        edges[i] = all.first[all.indices[i]];
      }
      Tensor by_raw = at::empty({3 * all.n, n_raw}, displacement.options());
      at::parallel_for(0, (all.n + lanes - 1) / lanes, 1, [&](std::int64_t begin, std::int64_t end) {
        const Memory scratch = vectors(kernels.scratch(program.get()));
        const Centres some{std::min(end * lanes, all.n) - begin * lanes, indices.data() + begin * lanes, edges.data(),
                           all.displacement};
        kernels.site_moments(program.get(), tables.turns(), some, by_raw.mutable_data_ptr<double>(), scratch.get());
      });
      Tensor rows = by_parameters(by_raw, tables);
      if (others) {
        const Tensor chosen = at::from_blob(const_cast<std::int64_t *>(all.indices), {all.n}, at::kLong);
        rows = at::cat({rows, others->index_select(0, chosen).view({3 * all.n, -1})}, 1);
      }
      const Tensor norms = projected_norms(rows, factor, triangular).view({all.n, 3}).amax(1);
      const double *from = norms.const_data_ptr<double>();
      double *to = result.mutable_data_ptr<double>();
      for (std::int64_t i = 0; i < all.n; ++i) to[all.indices[i]] = from[i];
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> crystal_deviation(const Tensor &phi, const Tensor &factor, bool triangular, double tiny) {
  TORCH_CHECK(phi.dim() == 1 && factor.dim() == 2 && factor.size(0) == phi.size(0),
              "ubmd operators: phi must have one element per row of its factor, not ", phi.sizes());
  const Tensor given = phi.contiguous(), z = at::zeros({factor.size(1)}, phi.options());
  cluster_kernels().multiply_transposed(factor.size(0), factor.size(1), numbers(factor), numbers(given),
                                        z.mutable_data_ptr<double>(), triangular);
  return {z.square().sum().add_(tiny * tiny).sqrt_(), z};
}

Tensor crystal_deviation_gradient(const Tensor &factor, bool triangular, const Tensor &deviation, const Tensor &z) {
  Tensor result = at::empty({factor.size(0)}, factor.options());
  cluster_kernels().multiply(factor.size(0), factor.size(1), numbers(factor), numbers(z),
                             result.mutable_data_ptr<double>(), triangular);
  return result.div_(deviation);
}

}  // namespace ubmd::ops
