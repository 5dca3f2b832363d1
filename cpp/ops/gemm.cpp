// Matrix products of the network. They are most of the work, so the fastest library at hand does them.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>

#include "kernels.h"
#include "operators.h"

namespace ubmd::ops {

using at::Tensor;

namespace {

using Linear = Tensor(const Tensor &, const Tensor &, const std::optional<Tensor> &, std::string_view,
                      c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
using LinearAdd = Tensor(const Tensor &, const Tensor &, const Tensor &, const std::optional<Tensor> &,
                         std::string_view);

// On processors with AVX-512 that are not Intel's, torch's own products (oneMKL) use half the width of the vector
// units: measured on an AMD EPYC 110 GFLOP/s in float32, oneDNN 235. torch offers oneDNN for float32 as an operator of
// its own, which is no part of the public interface: without it, or elsewhere, the products are torch's.
bool wide_vectors_elsewhere() {
#if defined(__x86_64__)
  return uses_avx512() && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::optional<c10::OperatorHandle> find(const char *overload) {
  if (!wide_vectors_elsewhere()) return std::nullopt;
  return c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", overload});
}

// Below this number of rows the fixed cost of oneDNN is larger than its gain.
constexpr std::int64_t fewest_rows = 8;

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
  static const auto linear = find(""), linear_add = find("binary");
  const bool wide = left.scalar_type() == at::kFloat && right.scalar_type() == at::kFloat && left.is_cpu() &&
                    left.size(0) >= fewest_rows && left.size(1) > 0 && right.size(1) > 0;
  if (wide && linear && linear_add) {
    if (add && add->dim() == 2)
      return linear_add->typed<LinearAdd>().call(left, add->contiguous(), right.t(), std::nullopt, "add");
    return linear->typed<Linear>().call(left, right.t(), add, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
  if (left.scalar_type() == at::kDouble && right.scalar_type() == at::kDouble && left.is_cpu() && left.size(0) > 1) {
    static const bool ours = wide_vectors_elsewhere();
    const bool large = left.size(0) >= fewest_rows && left.size(1) >= fewest_rows && right.size(1) >= fewest_rows;
    const Tensor result = ours && large ? wide_product(left, right) : by_halves(left, right);
    return add ? at::add(result, *add) : result;
  }
  return add ? at::addmm(*add, left, right) : at::mm(left, right);
}

}  // namespace ubmd::ops
