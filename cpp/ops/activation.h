// Scaled SiLU x = 1.67653 z sigmoid(z) with its derivatives. Included by kernels.cpp only.

template <bool second_order, class F>
UBMD_INLINE void activate(const F *z, F *value, F *first, F *second) {
  constexpr int W = kLanes<F>;
  const F scale = F(1.6765324703310907);
  const Lanes<F> x = load<F, W>(z);
  const Lanes<F> exp = exponential(-x), sigmoid = F(1) / (F(1) + exp);
  // 1 - sigmoid without its cancellation
  const Lanes<F> scaled = scale * sigmoid, rest = exp * sigmoid;
  store<F, W>(value, x * scaled);
  store<F, W>(first, scaled + (x * scaled) * rest);
  if constexpr (second_order) store<F, W>(second, (scaled * rest) * (F(2) + x * (rest - sigmoid)));
}

template <bool second_order, class F>
void activate_all(std::int64_t n, const F *z, F *value, F *first, F *second) {
  constexpr int W = kLanes<F>;
  std::int64_t k = 0;
  for (; k + W <= n; k += W) activate<second_order>(z + k, value + k, first + k, second + k);
  if (k == n) return;
  F in[W] = {}, out[3][W];
  for (int q = 0; k + q < n; ++q) in[q] = z[k + q];
  activate<second_order>(in, out[0], out[1], out[2]);
  for (int q = 0; k + q < n; ++q) {
    value[k + q] = out[0][q];
    first[k + q] = out[1][q];
    if constexpr (second_order) second[k + q] = out[2][q];
  }
}
