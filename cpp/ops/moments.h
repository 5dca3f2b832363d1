// Gaussian moments of the pairs of a centre and their gradients. Included by kernels.cpp only.
//
// Lanes are pairs wherever a pair is on its own (distances, Gaussians, gradients w.r.t. its vector), and radial
// functions where pairs are summed (moments, gradient w.r.t. B). The pairs of a centre are sorted by the neighbour's
// element first, because all of one element share their coefficients.

// One centre's pairs are handled in batches of this many (a multiple of every lane count).
constexpr int kBatch = 256;

// Hands out pieces of the scratch memory.
struct Scratch {
  char *next;
  template <class T>
  T *take(std::int64_t count) {
    T *piece = reinterpret_cast<T *>(next);
    next += (count * std::int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Pairs of one centre: those inside the cutoff, sorted by element, filled up with pairs at the cutoff to whole vectors.
template <class N>
struct Batch {
  using F = typename Parts<N>::F;
  using V = Lanes<F>;
  static constexpr int W = kLanes<F>;
  static constexpr int vectors = kBatch / W;

  int *order;    // [kBatch + 1] places of the sorted pairs among the centre's pairs
  int *start;    // [n_elements + 1] first sorted pair of every element
  F *distance2;  // [kBatch]
  F *x[3], *dx[3];

  Batch(Scratch &scratch, int n_elements) {
    order = scratch.take<int>(kBatch + 1);
    start = scratch.take<int>(n_elements + 1);
    distance2 = scratch.take<F>(kBatch);
    for (int d = 0; d < 3; ++d) x[d] = scratch.take<F>(kBatch);
    for (int d = 0; d < 3; ++d) dx[d] = scratch.take<F>(kBatch);
  }

  int count(const Graph<F> &graph) const { return start[graph.n_elements]; }

  // Pairs p .. p + m - 1; false if an element is unknown.
  bool fill(const Graph<F> &graph, std::int64_t p, int m) {
    return graph.wide ? fill_from<double>(graph, p, m) : fill_from<float>(graph, p, m);
  }

  template <class X>
  bool fill_from(const Graph<F> &graph, std::int64_t p, int m) {
    const X *vectors = static_cast<const X *>(graph.vectors) + 3 * p;
    const F limit = F(graph.cutoff) * F(graph.cutoff);
    int n_inside = 0;
    for (int k = 0; k < m; ++k) {
      const F a = F(vectors[3 * k]), b = F(vectors[3 * k + 1]), c = F(vectors[3 * k + 2]);
      distance2[k] = a * a + b * b + c * c;
      n_inside += !(distance2[k] >= limit);
    }
    const int n_sorted = sort(graph, graph.neighbours + p, m, limit);
    gather(vectors, x, n_sorted, F(graph.cutoff));
    if constexpr (Parts<N>::dual) gather(static_cast<const X *>(graph.tangents) + 3 * p, dx, n_sorted, F(0));
    return n_sorted == n_inside;
  }

  int sort(const Graph<F> &graph, const std::int64_t *neighbours, int m, F limit) {
    int n = 0;
    for (int element = 0; element < graph.n_elements; ++element) {
      start[element] = n;
      for (int k = 0; k < m; ++k) {  // without branches: which pair comes next can't be predicted
        order[n] = k;
        n += (neighbours[k] == element) & !(distance2[k] >= limit);
      }
    }
    start[graph.n_elements] = n;
    return n;
  }

  template <class X>
  void gather(const X *from, F *const (&to)[3], int n, F filler) {
    for (int k = 0; k < n; ++k)
      for (int d = 0; d < 3; ++d) to[d][k] = F(from[3 * order[k] + d]);
    for (int k = n; k % W; ++k)
      for (int d = 0; d < 3; ++d) to[d][k] = filler;
  }

  N coordinate(int d, int k) const {
    if constexpr (Parts<N>::dual) {
      return {load<F, W>(x[d] + k), load<F, W>(dx[d] + k)};
    } else {
      return load<F, W>(x[d] + k);
    }
  }
};

// Everything about one vector of pairs that doesn't depend on their elements.
template <class N>
struct Block {
  using F = typename Parts<N>::F;
  N unit[3], inverse;        // u and 1/r
  N monomials[kComponents];  // products of the components of u
  N *basis, *slope;          // [N_b] f_c(r) N_b^(-1/2) g_b(r) and its derivative with respect to r

  Block(Scratch &scratch, int n_basis) {
    basis = scratch.take<N>(n_basis);
    slope = scratch.take<N>(n_basis);
  }

  // with_slope: whether the derivatives are needed.
  template <bool with_slope>
  void evaluate(const Graph<F> &graph, const Batch<N> &batch, int k) {
    const N x = batch.coordinate(0, k), y = batch.coordinate(1, k), z = batch.coordinate(2, k);
    const N r = square_root(x * x + y * y + z * z);
    inverse = reciprocal(r);
    unit[0] = x * inverse, unit[1] = y * inverse, unit[2] = z * inverse;
    fill_monomials();
    fill_basis<with_slope>(graph, r);
  }

  UBMD_INLINE void fill_monomials() {
    const N x = unit[0], y = unit[1], z = unit[2];
    const N xx = x * x, xy = x * y, xz = x * z, yy = y * y, yz = y * z, zz = z * z;
    const N products[] = {x,      y,      z,      xx,     xy,     xz,     yy,     yz,     zz,    xx * x,
                          xx * y, xx * z, xy * y, xy * z, xz * z, yy * y, yy * z, yz * z, zz * z};
    monomials[0] = N{};
    monomials[0] = F(1) - monomials[0];
#pragma GCC unroll 20
    for (int c = 1; c < kComponents; ++c) monomials[c] = products[c - 1];
  }

  template <bool with_slope>
  UBMD_INLINE void fill_basis(const Graph<F> &graph, N r) {
    const double beta = graph.n_basis * graph.n_basis / (graph.cutoff * graph.cutoff);
    // (2 beta / pi)^(1/4) of g_b, times N_b^(-1/2) of R_s
    const F prefactor = F(__builtin_sqrt(__builtin_sqrt(2 * beta / 3.14159265358979323846) / graph.n_basis));
    const F limit = F(graph.cutoff);
    // f_c = (1 + cos(pi r / r_c)) / 2 = sin^2(pi/2 (1 - r / r_c))
    const N y = zero_from(r, limit, F(1) - F(1 / graph.cutoff) * r);
    const auto [sine, cosine] = quarter_turn(y);
    const N cut = zero_from(r, limit, prefactor * (sine * sine));
    const N cut_slope = zero_from(r, limit, prefactor * F(-3.14159265358979323846 / graph.cutoff) * (sine * cosine));
    for (int b = 0; b < graph.n_basis; ++b) {
      const N shift = r - F(graph.r_min + b * (graph.cutoff - graph.r_min) / graph.n_basis);
      const N gaussian = exponential(F(-beta) * (shift * shift));
      basis[b] = cut * gaussian;
      if constexpr (with_slope) slope[b] = (cut_slope + F(-2 * beta) * (shift * cut)) * gaussian;
    }
  }
};

// Calls use(block, first sorted pair of the block, element, begin, end) for the lanes begin .. end - 1 of every vector
// of pairs that belong to one element.
template <class N, bool with_slope, class Use>
UBMD_INLINE bool for_each_segment(const Graph<typename Parts<N>::F> &graph, std::int64_t p, std::int64_t p_end,
                                  Batch<N> &batch, Block<N> &block, Use use) {
  constexpr int W = Batch<N>::W;
  for (; p < p_end; p += kBatch) {
    if (!batch.fill(graph, p, p_end - p < kBatch ? int(p_end - p) : kBatch)) return false;
    int element = 0;
    for (int k = 0; k < batch.count(graph); k += W) {
      block.template evaluate<with_slope>(graph, batch, k);
      for (;; ++element) {
        const int begin = batch.start[element] > k ? batch.start[element] - k : 0;
        const int stop = batch.start[element + 1] - k, end = stop < W ? stop : W;
        if (begin < end) use(p, k, element, begin, end);
        if (stop >= W || element + 1 == graph.n_elements) break;
      }
    }
  }
  return true;
}

// T += sum over the pairs begin .. end - 1 of R_s(r) monomials(u); lanes are radial functions.
template <class N>
UBMD_INLINE void add_moments(const Block<N> &block, int begin, int end, const typename Parts<N>::F *coefficients,
                             int n_basis, int width, typename Parts<N>::F *moments) {
  using F = typename Parts<N>::F;
  constexpr int W = kGroupLanes<F>;
  for (int s = 0; s < width; s += W) {
    Group<F> sum[kComponents];
#pragma GCC unroll 20
    for (int c = 0; c < kComponents; ++c) sum[c] = load<F, W>(moments + c * width + s);
    for (int k = begin; k < end; ++k) {
      typename Parts<N>::G radial{};
      for (int b = 0; b < n_basis; ++b) radial += lane(block.basis[b], k) * load<F, W>(coefficients + b * width + s);
#pragma GCC unroll 20
      for (int c = 0; c < kComponents; ++c) sum[c] += wanted(lane(block.monomials[c], k) * radial);
    }
#pragma GCC unroll 20
    for (int c = 0; c < kComponents; ++c) store<F, W>(moments + c * width + s, sum[c]);
  }
}

template <class F, class N>
bool moments_of(const Graph<F> &graph, std::int64_t begin, std::int64_t end, F *out, char *memory) {
  Scratch scratch{memory};
  Batch<N> batch(scratch, graph.n_elements);
  Block<N> block(scratch, graph.n_basis);
  const int width = graph.padded_radial();
  for (std::int64_t i = begin; i < end; ++i) {
    F *moments = out + i * kComponents * width;
    for (int k = 0; k < kComponents * width; ++k) moments[k] = 0;
    const F *centre = graph.by_basis + graph.species[i] * graph.n_elements * graph.n_basis * width;
    const auto add = [&](std::int64_t, int, int element, int first, int last) {
      add_moments(block, first, last, centre + element * graph.n_basis * width, graph.n_basis, width, moments);
    };
    if (!for_each_segment<N, false>(graph, graph.first[i], graph.first[i + 1], batch, block, add)) return false;
  }
  return true;
}

// Cotangents of a centre's moments contracted with B: weights [20, N_b padded], so that sum(cotangent * T) is
// sum_b,c weight_cb g_b m_c for every pair of one element. For dual numbers value and tangent are kept apart.
template <class N>
struct Weights {
  using F = typename Parts<N>::F;
  F *value, *tangent;
  int width;

  Weights(Scratch &scratch, int padded_basis) : width(padded_basis) {
    value = scratch.take<F>(kComponents * width);
    tangent = scratch.take<F>(kComponents * width);
  }

  static UBMD_INLINE void contract(const F *cotangent, const F *coefficients, int n_radial, int row, int width, F *to) {
    constexpr int W = kGroupLanes<F>, kRows = 5;
    for (int b = 0; b < width; b += W)
      for (int c = 0; c < kComponents; c += kRows) {
        Group<F> sum[kRows] = {};
        for (int s = 0; s < n_radial; ++s) {
          const Group<F> coefficient = load<F, W>(coefficients + s * width + b);
#pragma GCC unroll 5
          for (int q = 0; q < kRows; ++q) sum[q] += cotangent[(c + q) * row + s] * coefficient;
        }
#pragma GCC unroll 5
        for (int q = 0; q < kRows; ++q) store<F, W>(to + (c + q) * width + b, sum[q]);
      }
  }

  // A dual cotangent is value + epsilon * tangent, each [20, S] with S = row.
  void set(const F *cotangent, const F *tangent_part, const F *coefficients, int n_radial, int row) {
    contract(cotangent, coefficients, n_radial, row, width, value);
    if constexpr (Parts<N>::dual) contract(tangent_part, coefficients, n_radial, row, width, tangent);
  }

  UBMD_INLINE auto at(int c, int b) const {
    if constexpr (Parts<N>::dual) {
      return Dual<F>{value[c * width + b], tangent[c * width + b]};
    } else {
      return value[c * width + b];
    }
  }
};

// Derivatives of sum_c p_c m_c(u) with respect to u, as if its components were independent.
template <class N>
UBMD_INLINE void differentiate_monomials(const N (&p)[kComponents], const Block<N> &block, N (&t)[3]) {
  using F = typename Parts<N>::F;
  const N x = block.unit[0], y = block.unit[1], z = block.unit[2];
  const N *m = block.monomials;
  const N xx = m[4], xy = m[5], xz = m[6], yy = m[7], yz = m[8], zz = m[9];
  t[0] = p[1] + F(2) * (x * p[4] + xy * p[11] + xz * p[12]) + y * p[5] + z * p[6] + F(3) * (xx * p[10]) + yy * p[13] +
         yz * p[14] + zz * p[15];
  t[1] = p[2] + F(2) * (y * p[7] + xy * p[13] + yz * p[17]) + x * p[5] + z * p[8] + F(3) * (yy * p[16]) + xx * p[11] +
         xz * p[14] + zz * p[18];
  t[2] = p[3] + F(2) * (z * p[9] + xz * p[15] + yz * p[18]) + x * p[6] + y * p[8] + F(3) * (zz * p[19]) + xx * p[12] +
         xy * p[14] + yy * p[17];
}

// Gradient [3] of the weighted sum with respect to the pairs' vectors; lanes are pairs.
template <class N>
UBMD_INLINE void pair_gradient(const Block<N> &block, const Weights<N> &weights, int n_basis, N (&gradient)[3]) {
  constexpr int kRows = 5;
  N p[kComponents], radial{};
#pragma GCC unroll 4
  for (int c = 0; c < kComponents; c += kRows) {
    N value[kRows] = {}, slope[kRows] = {};
    for (int b = 0; b < n_basis; ++b) {
#pragma GCC unroll 5
      for (int q = 0; q < kRows; ++q) {
        const auto weight = weights.at(c + q, b);
        value[q] += weight * block.basis[b];
        slope[q] += weight * block.slope[b];
      }
    }
#pragma GCC unroll 5
    for (int q = 0; q < kRows; ++q) {
      p[c + q] = value[q];
      radial += slope[q] * block.monomials[c + q];
    }
  }
  N t[3];
  differentiate_monomials(p, block, t);
  // along u the distance changes; u itself changes only across
  const N along = block.unit[0] * t[0] + block.unit[1] * t[1] + block.unit[2] * t[2];
  for (int d = 0; d < 3; ++d) gradient[d] = block.unit[d] * radial + block.inverse * (t[d] - along * block.unit[d]);
}

// radial += gradient of the sum over the pairs begin .. end - 1 with respect to B [N_b, S]; lanes are radial functions.
template <class N>
UBMD_INLINE void add_radial_gradient(const Block<N> &block, int begin, int end, const typename Parts<N>::F *cotangent,
                                     const typename Parts<N>::F *tangent_part, int n_basis, int width,
                                     typename Parts<N>::F *sums, double *radial) {
  using F = typename Parts<N>::F;
  constexpr int W = kGroupLanes<F>;
  for (int s = 0; s < width; s += W) {
    for (int b = 0; b < n_basis; ++b) store<F, W>(sums + b * W, Group<F>{});
    for (int k = begin; k < end; ++k) {
      typename Parts<N>::G part[4] = {};  // several sums: one alone waits for every addition
#pragma GCC unroll 20
      for (int c = 0; c < kComponents; ++c) {
        const auto monomial = lane(block.monomials[c], k);
        if constexpr (Parts<N>::dual) {
          part[c % 4] += monomial * Dual<Group<F>>{load<F, W>(cotangent + c * width + s),
                                                   load<F, W>(tangent_part + c * width + s)};
        } else {
          part[c % 4] += monomial * load<F, W>(cotangent + c * width + s);
        }
      }
      const auto sum = (part[0] + part[1]) + (part[2] + part[3]);
      for (int b = 0; b < n_basis; ++b)
        store<F, W>(sums + b * W, load<F, W>(sums + b * W) + wanted(lane(block.basis[b], k) * sum));
    }
    for (int b = 0; b < n_basis; ++b)
      for (int q = 0; q < W; ++q) radial[b * width + s + q] += double(sums[b * W + q]);
  }
}

template <class F, class N>
bool moments_gradient_of(const Graph<F> &graph, std::int64_t begin, std::int64_t end, const F *cotangents,
                         const F *tangent_parts, double *vectors, double *radial, char *memory) {
  Scratch scratch{memory};
  Batch<N> batch(scratch, graph.n_elements);
  Block<N> block(scratch, graph.n_basis);
  Weights<N> weights(scratch, graph.padded_basis());
  F *sums = scratch.take<F>(graph.n_basis * kGroupLanes<F>);
  const int width = graph.padded_radial(), padded_basis = graph.padded_basis();
  const std::int64_t n_elements = graph.n_elements;
  for (std::int64_t i = begin; i < end; ++i) {
    const F *cotangent = cotangents + i * kComponents * width;
    const F *tangent_part = tangent_parts ? tangent_parts + i * kComponents * width : nullptr;
    const std::int64_t row = graph.species[i] * n_elements;
    if (vectors)  // pairs beyond the cutoff are left out below
      for (std::int64_t p = 3 * graph.first[i]; p < 3 * graph.first[i + 1]; ++p) vectors[p] = 0;
    int known = -1;
    std::int64_t known_batch = -1;
    const auto use = [&](std::int64_t p, int k, int element, int first, int last) {
      if (radial)
        add_radial_gradient(block, first, last, cotangent, tangent_part, graph.n_basis, width, sums,
                            radial + (row + element) * graph.n_basis * width);
      if (!vectors) return;
      if (known != element || known_batch != p)
        weights.set(cotangent, tangent_part, graph.by_radial + (row + element) * graph.n_radial * padded_basis,
                    graph.n_radial, width);
      known = element, known_batch = p;
      N gradient[3];
      pair_gradient(block, weights, graph.n_basis, gradient);
      for (int q = first; q < last; ++q)
        for (int d = 0; d < 3; ++d) vectors[3 * (p + batch.order[k + q]) + d] = double(wanted(gradient[d])[q]);
    };
    if (!for_each_segment<N, true>(graph, graph.first[i], graph.first[i + 1], batch, block, use)) return false;
  }
  return true;
}

template <class F>
std::int64_t moments_scratch(const Graph<F> &graph) {
  const std::int64_t batch = (kBatch + 1 + graph.n_elements + 1) * 4 + 7 * kBatch * std::int64_t(sizeof(F));
  const std::int64_t block = 2 * graph.n_basis * std::int64_t(sizeof(Dual<Lanes<F>>));
  const std::int64_t weights =
      (2 * kComponents * graph.padded_basis() + graph.n_basis * kPadding) * std::int64_t(sizeof(F));
  return batch + block + weights + 16 * 64;  // every piece starts at a multiple of 64
}
