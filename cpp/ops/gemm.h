// torch's operator for products by oneDNN, which is not part of its public interface.
//
// torch's own products in float32 (oneMKL) use half the width of the vector units on processors with AVX-512 that are
// not Intel's: measured on an AMD EPYC 110 GFLOP/s, oneDNN 235. A build with -DUBMD_PRIVATE_GEMM=OFF does without.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace ubmd::ops {

// left [M, K] @ right [K, N], plus `add` [N] or [M, N] if given, for float32 where oneDNN is the faster one; none where
// it is not, where this torch doesn't have the operator, and in a build without it.
std::optional<at::Tensor> private_product(const at::Tensor &left, const at::Tensor &right,
                                          const std::optional<at::Tensor> &add);

}  // namespace ubmd::ops
