// Matrix products of the network. They are most of the work, so the fastest library at hand does them.
#include <ATen/Parallel.h>

#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "operators.h"

namespace ubmd::ops {

using at::Tensor;

namespace {

// Below this number of rows, columns or terms the fixed cost of our own product is larger than its gain.
constexpr std::int64_t fewest = 8;

// The rows of `left` in two halves, as a batch. The LAMMPS library exports a dgemm_ of its own, which under the program
// lmp replaces the one in torch, and is some ten times slower; products in batches have another name.
Tensor by_halves(const Tensor &left, const Tensor &right) {
  const auto rows = left.size(0), half = (rows + 1) / 2;  // they share a row if the number is odd
  const Tensor halves =
      left.as_strided({2, half, left.size(1)}, {(rows - half) * left.stride(0), left.stride(0), left.stride(1)});
  const Tensor result = at::bmm(halves, right.unsqueeze(0).expand({2, right.size(0), right.size(1)}));
  if (rows % 2 == 0) return result.reshape({rows, right.size(1)});
  return at::cat({result.select(0, 0), result.select(0, 1).slice(0, 1)});
}

// Our own product. oneMKL reaches 26 billion multiply-adds per second in float64 on an AMD EPYC with AVX-512, this one
// about 50.
Tensor wide_product(const Tensor &left, const Tensor &right) {
  Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  const MatrixProduct<double> task{left.size(0),
                                   left.size(1),
                                   right.size(1),
                                   left.const_data_ptr<double>(),
                                   left.stride(0),
                                   left.stride(1),
                                   right.const_data_ptr<double>(),
                                   right.stride(0),
                                   right.stride(1),
                                   out.mutable_data_ptr<double>()};
  const Kernels<double> &table = kernels<double>();
  const std::int64_t n_panels = (task.columns + table.panel - 1) / table.panel;
  at::parallel_for(0, n_panels, 1, [&](std::int64_t begin, std::int64_t end) {
    const Tensor scratch = at::empty({table.matrix_scratch_bytes}, at::kByte);
    table.matrix_product(task, begin * table.panel, std::min(end * table.panel, task.columns),
                         reinterpret_cast<char *>(scratch.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

// left [M, K] @ right [K, N], plus `add` [N] or [M, N] if given. Any strides.
Tensor product(const Tensor &left, const Tensor &right, const std::optional<Tensor> &add) {
  TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0),
              "ubmd operators: product needs matrices [M, K] and [K, N], not ", left.sizes(), " and ", right.sizes());
  if (const auto result = private_product(left, right, add)) return *result;
  if (left.scalar_type() == at::kDouble && right.scalar_type() == at::kDouble && left.is_cpu() && left.size(0) > 1) {
    static const bool ours = wide_vectors_elsewhere();
    const bool large = left.size(0) >= fewest && left.size(1) >= fewest && right.size(1) >= fewest;
    const Tensor result = ours && large ? wide_product(left, right) : by_halves(left, right);
    return add ? at::add(result, *add) : result;
  }
  return add ? at::addmm(*add, left, right) : at::mm(left, right);
}

}  // namespace ubmd::ops
