// The operators as functions on tensors; see operators.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ubmd::ops {

// A graph of directed pairs, checked and contiguous, with the coefficients B in the layouts of the kernels.
// species [n], first [n + 1], neighbours [P] (elements) are int64; vectors [P, 3] float64 or float32; radial is
// B [Z, Z, N_r, N_b] and gives the type in which everything is computed.
struct Pairs {
  Pairs(const at::Tensor &species, const at::Tensor &first, const at::Tensor &neighbours, const at::Tensor &vectors,
        const at::Tensor &radial, double cutoff, double r_min);

  at::Tensor species, first, neighbours, vectors, radial;
  double cutoff, r_min;

  std::int64_t n_centres() const { return species.size(0); }
  std::int64_t n_pairs() const { return vectors.size(0); }
};

at::Tensor moments(const Pairs &pairs);
at::Tensor moments_vjp(const Pairs &pairs, const at::Tensor &cotangent);
at::Tensor moments_jvp(const Pairs &pairs, const at::Tensor &tangent);
std::tuple<at::Tensor, at::Tensor> moments_second(const Pairs &pairs, const at::Tensor &tangent,
                                                  const at::Tensor &cotangent, const at::Tensor &tangent_cotangent,
                                                  bool want_vectors, bool want_radial);
at::Tensor invariants(const at::Tensor &moments, std::int64_t n_radial);
at::Tensor invariants_vjp(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &cotangent);
at::Tensor invariants_jvp(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &tangent);
at::Tensor invariants_second(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &tangent,
                             const at::Tensor &cotangent, const at::Tensor &tangent_cotangent);
std::vector<at::Tensor> activation(const at::Tensor &z, std::int64_t order);
at::Tensor product(const at::Tensor &left, const at::Tensor &right, const std::optional<at::Tensor> &add);

}  // namespace ubmd::ops
