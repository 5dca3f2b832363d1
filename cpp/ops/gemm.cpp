#include "gemm.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>

#include "kernels.h"

namespace ubmd::ops {

using at::Tensor;

#ifdef UBMD_PRIVATE_GEMM

namespace {

using Linear = Tensor(const Tensor &, const Tensor &, const std::optional<Tensor> &, std::string_view,
                      c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
using LinearAdd = Tensor(const Tensor &, const Tensor &, const Tensor &, const std::optional<Tensor> &,
                         std::string_view);

std::optional<c10::OperatorHandle> find(const char *overload) {
  if (!wide_vectors_elsewhere()) return std::nullopt;
  return c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", overload});
}

// Below this number of rows the fixed cost of oneDNN is larger than its gain.
constexpr std::int64_t fewest_rows = 8;

}  // namespace

std::optional<Tensor> private_product(const Tensor &left, const Tensor &right, const std::optional<Tensor> &add) {
  static const auto linear = find(""), linear_add = find("binary");
  const bool wide = left.scalar_type() == at::kFloat && right.scalar_type() == at::kFloat && left.is_cpu() &&
                    left.size(0) >= fewest_rows && left.size(1) > 0 && right.size(1) > 0;
  if (!wide || !linear || !linear_add) return std::nullopt;
  if (add && add->dim() == 2)
    return linear_add->typed<LinearAdd>().call(left, add->contiguous(), right.t(), std::nullopt, "add");
  return linear->typed<Linear>().call(left, right.t(), add, "none", c10::List<std::optional<at::Scalar>>(), "");
}

#else

std::optional<Tensor> private_product(const Tensor &, const Tensor &, const std::optional<Tensor> &) {
  return std::nullopt;
}

#endif

}  // namespace ubmd::ops
