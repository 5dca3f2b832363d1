// The operators on tensors: checks, memory, threads. The arithmetic is in the kernels.
#include "operators.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels.h"

namespace ubmd::ops {

namespace {

using at::Tensor;

// Centres per task below which another thread has no benefit.
constexpr std::int64_t kGrain = 16;
// Gradients w.r.t. B are summed over this many fixed parts at most, so that they don't depend on the number of threads.
constexpr std::int64_t kParts = 32;

struct Free {
  void operator()(char *memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

Memory aligned_memory(std::int64_t bytes) {
  char *memory = static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  TORCH_CHECK(memory, "ubmd operators: out of memory");
  return Memory(memory);
}

void check_floating(const Tensor &tensor, const char *name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, "ubmd operators: ", name,
              " must be float32 or float64, not ", tensor.scalar_type());
}

// The tensor contiguous; one sentence if its shape or type is not as expected.
Tensor expect(const Tensor &tensor, const char *name, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == type, "ubmd operators: ", name, " must be ", type, ", not ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, "ubmd operators: ", name, " must have the shape ", shape, ", not ",
              tensor.sizes());
  return tensor.contiguous();
}

std::int64_t padded(std::int64_t n) {
  return (n + kPadding - 1) / kPadding * kPadding;
}

// B in both layouts of the kernels with zeros as padding: [Z, Z, N_r, N_b padded], then [Z, Z, N_b, S].
template <class F>
Memory padded_radial(const Tensor &radial) {
  const std::int64_t n_pairs = radial.size(0) * radial.size(1), n_radial = radial.size(2), n_basis = radial.size(3);
  const std::int64_t row = padded(n_basis), column = padded(n_radial);
  const std::int64_t count = n_pairs * (n_radial * row + n_basis * column);
  Memory memory = aligned_memory(count * std::int64_t(sizeof(F)));
  F *by_radial = reinterpret_cast<F *>(memory.get()), *by_basis = by_radial + n_pairs * n_radial * row;
  std::fill_n(by_radial, count, F(0));
  const F *from = radial.const_data_ptr<F>();
  for (std::int64_t k = 0; k < n_pairs; ++k)
    for (std::int64_t s = 0; s < n_radial; ++s)
      for (std::int64_t b = 0; b < n_basis; ++b, ++from) {
        by_radial[(k * n_radial + s) * row + b] = *from;
        by_basis[(k * n_basis + b) * column + s] = *from;
      }
  return memory;
}

template <class F>
Graph<F> graph_of(const Pairs &pairs, const Tensor &tangent, const Memory &coefficients) {
  Graph<F> graph{};
  graph.species = pairs.species.const_data_ptr<std::int64_t>();
  graph.first = pairs.first.const_data_ptr<std::int64_t>();
  graph.neighbours = pairs.neighbours.const_data_ptr<std::int64_t>();
  graph.vectors = pairs.vectors.const_data_ptr();
  graph.tangents = tangent.defined() ? tangent.const_data_ptr() : nullptr;
  graph.wide = pairs.vectors.scalar_type() == at::kDouble;
  graph.n_elements = int(pairs.radial.size(0));
  graph.n_radial = int(pairs.radial.size(2));
  graph.n_basis = int(pairs.radial.size(3));
  graph.cutoff = pairs.cutoff;
  graph.r_min = pairs.r_min;
  graph.by_radial = reinterpret_cast<const F *>(coefficients.get());
  graph.by_basis =
      graph.by_radial + std::int64_t(graph.n_elements) * graph.n_elements * graph.n_radial * graph.padded_basis();
  return graph;
}

void check_neighbours(bool known) {
  TORCH_CHECK_INDEX(known, "ubmd operators: a neighbour's element is not an element index of the model");
}

// A tangent of the vectors in their own type; undefined if there is none.
Tensor tangent_of(const Pairs &pairs, const Tensor &tangent) {
  check_floating(tangent, "the tangent of the vectors");
  return expect(tangent.to(pairs.vectors.scalar_type()), "the tangent of the vectors", pairs.vectors.scalar_type(),
                {pairs.n_pairs(), 3});
}

Tensor moments_like(const Pairs &pairs, const Tensor &cotangent, const char *name) {
  return expect(cotangent, name, pairs.radial.scalar_type(),
                {pairs.n_centres(), kComponents, padded(pairs.radial.size(2))});
}

// T, or with a tangent of the vectors its derivative.
Tensor moments_or_tangent(const Pairs &pairs, const Tensor &tangent) {
  Tensor out = at::empty({pairs.n_centres(), kComponents, padded(pairs.radial.size(2))}, pairs.radial.options());
  AT_DISPATCH_FLOATING_TYPES(pairs.radial.scalar_type(), "ubmd::moments", [&] {
    const Memory coefficients = padded_radial<scalar_t>(pairs.radial);
    const Graph<scalar_t> graph = graph_of<scalar_t>(pairs, tangent, coefficients);
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    at::parallel_for(0, pairs.n_centres(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      const Memory scratch = aligned_memory(table.scratch_bytes(graph));
      check_neighbours(table.moments(graph, begin, end, out.mutable_data_ptr<scalar_t>(), scratch.get()));
    });
  });
  return out;
}

// Gradients with respect to vectors (float64) and radial, each undefined if not wanted.
std::tuple<Tensor, Tensor> gradients(const Pairs &pairs, const Tensor &tangent, const Tensor &cotangent,
                                     const Tensor &tangent_cotangent, bool want_vectors, bool want_radial) {
  const std::int64_t n = pairs.n_centres(), n_elements = pairs.radial.size(0), n_radial = pairs.radial.size(2),
                     n_basis = pairs.radial.size(3), width = padded(n_radial);
  const auto wide = pairs.radial.options().dtype(at::kDouble);
  const std::int64_t n_parts = std::max<std::int64_t>(1, std::min(kParts, (n + kGrain - 1) / kGrain));
  Tensor vectors, parts;
  if (want_vectors) vectors = at::empty({pairs.n_pairs(), 3}, wide);
  if (want_radial) parts = at::zeros({n_parts, n_elements, n_elements, n_basis, width}, wide);
  AT_DISPATCH_FLOATING_TYPES(pairs.radial.scalar_type(), "ubmd::moments_gradient", [&] {
    const Memory coefficients = padded_radial<scalar_t>(pairs.radial);
    const Graph<scalar_t> graph = graph_of<scalar_t>(pairs, tangent, coefficients);
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    const scalar_t *first = cotangent.const_data_ptr<scalar_t>();
    const scalar_t *second = tangent.defined() ? tangent_cotangent.const_data_ptr<scalar_t>() : nullptr;
    double *out = want_vectors ? vectors.mutable_data_ptr<double>() : nullptr;
    const auto run = [&](std::int64_t begin, std::int64_t end, double *radial) {
      const Memory scratch = aligned_memory(table.scratch_bytes(graph));
      check_neighbours(table.moments_gradient(graph, begin, end, first, second, out, radial, scratch.get()));
    };
    if (!want_radial) {
      at::parallel_for(0, n, kGrain, [&](std::int64_t begin, std::int64_t end) { run(begin, end, nullptr); });
    } else {
      at::parallel_for(0, n_parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t k = begin; k < end; ++k)
          run(n * k / n_parts, n * (k + 1) / n_parts,
              parts.mutable_data_ptr<double>() + k * n_elements * n_elements * n_basis * width);
      });
    }
  });
  if (!want_radial) return {vectors, Tensor()};
  const Tensor sum = parts.sum(0).narrow(3, 0, n_radial).transpose(2, 3);
  return {vectors, sum.to(pairs.radial.scalar_type()).contiguous()};
}

// Moments [n, 20, S] contiguous, and n_radial fitting to S.
Tensor checked_moments(const Tensor &moments, std::int64_t n_radial) {
  check_floating(moments, "moments");
  TORCH_CHECK(n_radial >= 1, "ubmd operators: n_radial must be at least 1, not ", n_radial);
  TORCH_CHECK(moments.dim() == 3, "ubmd operators: moments must have the shape [n, 20, S], not ", moments.sizes());
  return expect(moments, "moments", moments.scalar_type(), {moments.size(0), kComponents, padded(n_radial)});
}

Tensor expect_invariants(const Tensor &moments, std::int64_t n_radial, const Tensor &tensor, const char *name) {
  return expect(tensor, name, moments.scalar_type(), {moments.size(0), count_invariants(int(n_radial))});
}

template <class Run>
void for_blocks_of_atoms(std::int64_t n, int lanes, Run run) {
  const std::int64_t n_blocks = (n + lanes - 1) / lanes;
  at::parallel_for(0, n_blocks, std::max<std::int64_t>(1, 32 / lanes),
                   [&](std::int64_t begin, std::int64_t end) { run(begin * lanes, std::min(end * lanes, n)); });
}

Tensor invariants_or_tangent(const Tensor &moments, std::int64_t n_radial, const Tensor &tangent) {
  Tensor out = at::empty({moments.size(0), count_invariants(int(n_radial))}, moments.options());
  AT_DISPATCH_FLOATING_TYPES(moments.scalar_type(), "ubmd::invariants", [&] {
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    const scalar_t *direction = tangent.defined() ? tangent.const_data_ptr<scalar_t>() : nullptr;
    for_blocks_of_atoms(moments.size(0), table.lanes, [&](std::int64_t begin, std::int64_t end) {
      const Memory scratch = aligned_memory(table.invariants_scratch_bytes(int(n_radial)));
      table.invariants(begin, end, int(n_radial), moments.const_data_ptr<scalar_t>(), direction,
                       out.mutable_data_ptr<scalar_t>(), scratch.get());
    });
  });
  return out;
}

Tensor invariants_gradient(const Tensor &moments, std::int64_t n_radial, const Tensor &tangent, const Tensor &cotangent,
                           const Tensor &tangent_cotangent) {
  Tensor out = at::empty_like(moments);
  AT_DISPATCH_FLOATING_TYPES(moments.scalar_type(), "ubmd::invariants_gradient", [&] {
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    const scalar_t *direction = tangent.defined() ? tangent.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t *second = tangent.defined() ? tangent_cotangent.const_data_ptr<scalar_t>() : nullptr;
    for_blocks_of_atoms(moments.size(0), table.lanes, [&](std::int64_t begin, std::int64_t end) {
      const Memory scratch = aligned_memory(table.invariants_scratch_bytes(int(n_radial)));
      table.invariants_gradient(begin, end, int(n_radial), moments.const_data_ptr<scalar_t>(), direction,
                                cotangent.const_data_ptr<scalar_t>(), second, out.mutable_data_ptr<scalar_t>(),
                                scratch.get());
    });
  });
  return out;
}

}  // namespace

Pairs::Pairs(const Tensor &species_, const Tensor &first_, const Tensor &neighbours_, const Tensor &vectors_,
             const Tensor &radial_, double cutoff_, double r_min_)
    : cutoff(cutoff_), r_min(r_min_) {
  check_floating(vectors_, "vectors");
  check_floating(radial_, "radial");
  TORCH_CHECK(species_.dim() == 1, "ubmd operators: species must have the shape [n], not ", species_.sizes());
  TORCH_CHECK(vectors_.dim() == 2, "ubmd operators: vectors must have the shape [P, 3], not ", vectors_.sizes());
  TORCH_CHECK(radial_.dim() == 4 && radial_.size(0) == radial_.size(1) && radial_.numel() > 0,
              "ubmd operators: radial must have the shape [Z, Z, N_r, N_b], not ", radial_.sizes());
  TORCH_CHECK(cutoff > 0, "ubmd operators: the cutoff must be positive, not ", cutoff);
  const std::int64_t n = species_.size(0), n_pairs = vectors_.size(0);
  species = expect(species_, "species", at::kLong, {n});
  first = expect(first_, "first", at::kLong, {n + 1});
  neighbours = expect(neighbours_, "neighbours", at::kLong, {n_pairs});
  vectors = expect(vectors_, "vectors", vectors_.scalar_type(), {n_pairs, 3});
  radial = radial_.contiguous();
  const std::int64_t *element = species.const_data_ptr<std::int64_t>(), *offset = first.const_data_ptr<std::int64_t>();
  bool known = true, sorted = offset[0] == 0 && offset[n] == n_pairs;
  for (std::int64_t i = 0; i < n; ++i) {
    known &= element[i] >= 0 && element[i] < radial.size(0);
    sorted &= offset[i] <= offset[i + 1];
  }
  TORCH_CHECK_INDEX(known, "ubmd operators: a centre's element is not an element index of the model");
  TORCH_CHECK_INDEX(sorted, "ubmd operators: first must rise from 0 to the number of pairs");
}

Tensor moments(const Pairs &pairs) {
  return moments_or_tangent(pairs, Tensor());
}

Tensor moments_vjp(const Pairs &pairs, const Tensor &cotangent) {
  return std::get<0>(
      gradients(pairs, Tensor(), moments_like(pairs, cotangent, "the cotangent"), Tensor(), true, false));
}

Tensor moments_jvp(const Pairs &pairs, const Tensor &tangent) {
  return moments_or_tangent(pairs, tangent_of(pairs, tangent));
}

std::tuple<Tensor, Tensor> moments_second(const Pairs &pairs, const Tensor &tangent, const Tensor &cotangent,
                                          const Tensor &tangent_cotangent, bool want_vectors, bool want_radial) {
  // empty tensors in place of [P, 3] and [n, 20, S]: only the first term
  const bool first_only = tangent_cotangent.numel() == 0;
  const Tensor direction = first_only ? Tensor() : tangent_of(pairs, tangent);
  const Tensor second =
      first_only ? Tensor() : moments_like(pairs, tangent_cotangent, "the cotangent of the moments' tangent");
  auto [vectors, radial] =
      gradients(pairs, direction, moments_like(pairs, cotangent, "the cotangent"), second, want_vectors, want_radial);
  if (!want_vectors) vectors = at::empty({0}, pairs.radial.options().dtype(at::kDouble));
  if (!want_radial) radial = at::empty({0}, pairs.radial.options());
  return {vectors, radial};
}

Tensor invariants(const Tensor &moments, std::int64_t n_radial) {
  return invariants_or_tangent(checked_moments(moments, n_radial), n_radial, Tensor());
}

Tensor invariants_vjp(const Tensor &moments, std::int64_t n_radial, const Tensor &cotangent) {
  const Tensor checked = checked_moments(moments, n_radial);
  return invariants_gradient(checked, n_radial, Tensor(),
                             expect_invariants(checked, n_radial, cotangent, "the cotangent"), Tensor());
}

Tensor invariants_jvp(const Tensor &moments, std::int64_t n_radial, const Tensor &tangent) {
  const Tensor checked = checked_moments(moments, n_radial);
  return invariants_or_tangent(checked, n_radial,
                               expect(tangent, "the tangent", checked.scalar_type(), checked.sizes()));
}

Tensor invariants_second(const Tensor &moments, std::int64_t n_radial, const Tensor &tangent, const Tensor &cotangent,
                         const Tensor &tangent_cotangent) {
  const Tensor checked = checked_moments(moments, n_radial);
  return invariants_gradient(
      checked, n_radial, expect(tangent, "the tangent", checked.scalar_type(), checked.sizes()),
      expect_invariants(checked, n_radial, cotangent, "the cotangent"),
      expect_invariants(checked, n_radial, tangent_cotangent, "the cotangent of the invariants' tangent"));
}

std::vector<Tensor> activation(const Tensor &z, std::int64_t order) {
  check_floating(z, "z");
  TORCH_CHECK(order == 1 || order == 2, "ubmd operators: the order of the activation must be 1 or 2, not ", order);
  const Tensor in = z.contiguous();
  std::vector<Tensor> out;
  for (std::int64_t k = 0; k <= order; ++k) out.push_back(at::empty_like(in));
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "ubmd::activation", [&] {
    const Kernels<scalar_t> &table = kernels<scalar_t>();
    const scalar_t *from = in.const_data_ptr<scalar_t>();
    scalar_t *to[3] = {};
    for (std::size_t k = 0; k < out.size(); ++k) to[k] = out[k].mutable_data_ptr<scalar_t>();
    at::parallel_for(0, in.numel(), 16384, [&](std::int64_t begin, std::int64_t end) {
      table.activation(end - begin, from + begin, to[0] + begin, to[1] + begin, to[2] ? to[2] + begin : nullptr);
    });
  });
  return out;
}

}  // namespace ubmd::ops
