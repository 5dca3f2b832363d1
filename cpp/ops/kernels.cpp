// The kernels for one instruction set: compiled once per set with UBMD_ISA = v4, v3 or base as the namespace.
#include "kernels.h"

#include "clusters.h"

namespace ubmd::ops::UBMD_ISA {

#include "lanes.h"

#include "activation.h"
#include "cluster_kernels.h"
#include "invariants.h"
#include "matrix.h"
#include "moments.h"

template <class F>
bool moments(const Graph<F> &graph, std::int64_t begin, std::int64_t end, F *out, char *scratch) {
  using V = Lanes<F>;
  return graph.tangents ? moments_of<F, Dual<V>>(graph, begin, end, out, scratch)
                        : moments_of<F, V>(graph, begin, end, out, scratch);
}

// The derivative of sum(C T + D dT) is the tangent of the gradient of sum((D + epsilon C) T).
template <class F>
bool moments_gradient(const Graph<F> &graph, std::int64_t begin, std::int64_t end, const F *cotangent,
                      const F *tangent_cotangent, double *vectors, double *radial, char *scratch) {
  using V = Lanes<F>;
  if (graph.tangents)
    return moments_gradient_of<F, Dual<V>>(graph, begin, end, tangent_cotangent, cotangent, vectors, radial, scratch);
  return moments_gradient_of<F, V>(graph, begin, end, cotangent, nullptr, vectors, radial, scratch);
}

template <class F>
void invariants(std::int64_t begin, std::int64_t end, int n, const F *moments, const F *tangents, F *out,
                char *scratch) {
  using V = Lanes<F>;
  if (tangents) {
    invariants_of<F, Dual<V>>(begin, end, n, moments, tangents, out, scratch);
  } else {
    invariants_of<F, V>(begin, end, n, moments, nullptr, out, scratch);
  }
}

template <class F>
void invariants_gradient(std::int64_t begin, std::int64_t end, int n, const F *moments, const F *tangents,
                         const F *cotangent, const F *tangent_cotangent, F *out, char *scratch) {
  using V = Lanes<F>;
  if (tangents) {
    invariants_gradient_of<F, Dual<V>>(begin, end, n, moments, tangents, tangent_cotangent, cotangent, out, scratch);
  } else {
    invariants_gradient_of<F, V>(begin, end, n, moments, nullptr, cotangent, nullptr, out, scratch);
  }
}

template <class F>
void activation(std::int64_t n, const F *z, F *value, F *first, F *second) {
  second ? activate_all<true>(n, z, value, first, second) : activate_all<false>(n, z, value, first, second);
}

template <class F>
constexpr Kernels<F> table() {
  return {moments_scratch<F>,    moments<F>,    moments_gradient<F>, invariants<F>, invariants_gradient<F>,
          invariants_scratch<F>, activation<F>, kLanes<F>,           pack<F>,       kPanel<F>,
          pack_tiles<F>,         kTileRows,     panel_product<F>,    last_layer<F>, multiply_elements<F>};
}

extern const Kernels<float> single_precision;
extern const Kernels<double> double_precision;
const Kernels<float> single_precision = table<float>();
const Kernels<double> double_precision = table<double>();

}  // namespace ubmd::ops::UBMD_ISA
