// Contractions of the moments to invariants, and their gradients. Included by kernels.cpp only. Lanes are atoms.

// Rows r .. r + W - 1 of a matrix, column by column: W x W blocks are transposed in registers on the way. Rows past the
// end read as zero.
template <class F>
struct Columns {
  static constexpr int W = kLanes<F>;
  using V = Lanes<F>;
  using Index = typename VectorOf<typename Fit<F>::Bits, W>::type;

  static UBMD_INLINE void transpose(V (&rows)[W]) {
#pragma GCC unroll 4
    for (int d = W / 2; d; d /= 2) {
      Index low, high;  // swaps the off-diagonal d x d blocks of every 2d x 2d block
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) {
        low[k] = k & d ? W + k - d : k;
        high[k] = k & d ? W + k : k + d;
      }
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k)
        if (!(k & d)) {
          const V upper = rows[k], lower = rows[k + d];
          rows[k] = __builtin_shuffle(upper, lower, low);
          rows[k + d] = __builtin_shuffle(upper, lower, high);
        }
    }
  }
};

template <class F>
class ColumnReader : Columns<F> {
  using V = Lanes<F>;
  static constexpr int W = kLanes<F>;

 public:
  ColumnReader(const F *matrix, std::int64_t row, std::int64_t n_rows, int n_columns)
      : next_(matrix + row * n_columns), n_rows_(n_rows < W ? int(n_rows) : W), n_columns_(n_columns) {}

  UBMD_INLINE V next() {
    if (place_ == W) refill();
    return buffer_[place_++];
  }

 private:
  __attribute__((noinline)) void refill() {
    V rows[W] = {};
    const int left = n_columns_ - column_;
    if (n_rows_ == W && left >= W) {
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) rows[k] = load<F, W>(next_ + std::int64_t(k) * n_columns_ + column_);
    } else {
      for (int k = 0; k < n_rows_; ++k)
        for (int c = 0; c < W && c < left; ++c) rows[k][c] = next_[std::int64_t(k) * n_columns_ + column_ + c];
    }
    Columns<F>::transpose(rows);
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) buffer_[k] = rows[k];
    column_ += W;
    place_ = 0;
  }

  const F *next_;
  int n_rows_, n_columns_, column_ = 0, place_ = W;
  V buffer_[W];
};

template <class F>
class ColumnWriter : Columns<F> {
  using V = Lanes<F>;
  static constexpr int W = kLanes<F>;

 public:
  ColumnWriter(F *matrix, std::int64_t row, std::int64_t n_rows, int n_columns)
      : next_(matrix + row * n_columns), n_rows_(n_rows < W ? int(n_rows) : W), n_columns_(n_columns) {}

  UBMD_INLINE void write(V column) {
    buffer_[place_++] = column;
    if (place_ == W) flush();
  }

  __attribute__((noinline)) void flush() {
    V rows[W];
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) rows[k] = buffer_[k];
    Columns<F>::transpose(rows);
    if (n_rows_ == W && place_ == W) {
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) store<F, W>(next_ + std::int64_t(k) * n_columns_ + column_, rows[k]);
    } else {
      for (int k = 0; k < n_rows_; ++k)
        for (int c = 0; c < place_; ++c) next_[std::int64_t(k) * n_columns_ + column_ + c] = rows[k][c];
    }
    column_ += place_;
    place_ = 0;
  }

 private:
  F *next_;
  int n_rows_, n_columns_, column_ = 0, place_ = 0;
  V buffer_[W] = {};
};

// Columns of one matrix, or of two as dual numbers.
template <class N>
struct Source {
  using F = typename Parts<N>::F;
  ColumnReader<F> value;
  Source(const F *value, const F *, std::int64_t row, std::int64_t n_rows, int n_columns)
      : value(value, row, n_rows, n_columns) {}
  UBMD_INLINE N next() { return value.next(); }
};
template <class V>
struct Source<Dual<V>> {
  using F = typename Parts<V>::F;
  ColumnReader<F> value, tangent;
  Source(const F *value, const F *tangent, std::int64_t row, std::int64_t n_rows, int n_columns)
      : value(value, row, n_rows, n_columns), tangent(tangent, row, n_rows, n_columns) {}
  UBMD_INLINE Dual<V> next() {
    const V a = value.next();
    return {a, tangent.next()};
  }
};

// Where the entries of the full symmetric tensors are among the packed ones, and how often each packed one occurs.
constexpr int kRank2[3][3] = {{0, 1, 2}, {1, 3, 4}, {2, 4, 5}};
constexpr int kRank3[6][3] = {{0, 1, 2}, {1, 3, 4}, {2, 4, 5}, {3, 6, 7}, {4, 7, 8}, {5, 8, 9}};
constexpr int kTimes2[6] = {1, 2, 2, 1, 2, 1};
constexpr int kTimes[kComponents] = {1, 1, 1, 1, 1, 2, 2, 1, 2, 1, 1, 3, 3, 3, 6, 3, 1, 3, 3, 1};
constexpr int kFirst[4] = {0, 1, 4, 10};  // first packed component of every rank
constexpr int kCount[4] = {1, 3, 6, 10};

#define UBMD_UNROLL _Pragma("GCC unroll 10")

// T^rank_r : T^rank_s of two packed tensors.
template <int rank, class N>
UBMD_INLINE N full_product(const N *r, const N *s) {
  using F = typename Parts<N>::F;
  N sum = r[kFirst[rank]] * s[kFirst[rank]];
  UBMD_UNROLL
  for (int k = kFirst[rank] + 1; k < kFirst[rank] + kCount[rank]; ++k) {
    if (kTimes[k] == 1) {
      sum += r[k] * s[k];
    } else {
      sum += F(kTimes[k]) * (r[k] * s[k]);
    }
  }
  return sum;
}

// The symmetric matrices that families 4 to 6 contract with T2_t: M_kl = T_r,..k T_s,..l summed over the other indices,
// packed with M_kl + M_lk off the diagonal. `rank` is that of T_r and T_s; r and s point to all 20 components.
template <int rank, class N>
UBMD_INLINE void matrix_product(const N *r, const N *s, N (&m)[6]) {
  using F = typename Parts<N>::F;
  constexpr int count = rank == 1 ? 1 : rank == 2 ? 3 : 6;
  UBMD_UNROLL
  for (int k = 0; k < 3; ++k) {
    UBMD_UNROLL
    for (int l = k; l < 3; ++l) {
      N sum{};
      UBMD_UNROLL
      for (int i = 0; i < count; ++i) {
        const int ik = rank == 1 ? 1 + k : rank == 2 ? 4 + kRank2[i][k] : 10 + kRank3[i][k];
        const int il = rank == 1 ? 1 + l : rank == 2 ? 4 + kRank2[i][l] : 10 + kRank3[i][l];
        N term = r[ik] * s[il];
        if (k != l) term += r[il] * s[ik];
        if (rank == 3 && kTimes2[i] == 2) term = F(2) * term;
        sum += term;
      }
      m[kRank2[k][l]] = sum;
    }
  }
}

// gradient += d(sum_k m_bar_k m_k)/dT_r for the matrix product with T_s (and the other way round, as m is symmetric).
template <int rank, class N, class V>
UBMD_INLINE void matrix_gradient(const N *s, const N (&m_bar)[6], V *gradient) {
  using F = typename Parts<N>::F;
  constexpr int count = rank == 1 ? 1 : rank == 2 ? 3 : 6;
  V sums[10] = {};
  UBMD_UNROLL
  for (int i = 0; i < count; ++i) {
    UBMD_UNROLL
    for (int k = 0; k < 3; ++k) {
      N sum{};
      UBMD_UNROLL
      for (int l = 0; l < 3; ++l) {
        const int il = rank == 1 ? 1 + l : rank == 2 ? 4 + kRank2[i][l] : 10 + kRank3[i][l];
        sum += s[il] * m_bar[kRank2[k][l]];
      }
      const int ik = rank == 1 ? k : rank == 2 ? kRank2[i][k] : kRank3[i][k];
      sums[ik] += rank == 3 && kTimes2[i] == 2 ? F(2) * wanted(sum) : wanted(sum);
    }
  }
  UBMD_UNROLL
  for (int k = 0; k < kCount[rank]; ++k) gradient[kFirst[rank] + k] += sums[k];
}

// v_k = T3_ijk T2_ij of family 7.
template <class N>
UBMD_INLINE void vector_product(const N *t3, const N *t2, N (&v)[3]) {
  using F = typename Parts<N>::F;
  UBMD_UNROLL
  for (int k = 0; k < 3; ++k) {
    N sum{};
    UBMD_UNROLL
    for (int i = 0; i < 6; ++i) {
      const N term = t3[10 + kRank3[i][k]] * t2[4 + i];
      sum += kTimes2[i] == 2 ? F(2) * term : term;
    }
    v[k] = sum;
  }
}

template <int rank, class N, class Out>
UBMD_INLINE void square_family(const N *t, int n, Out &out) {
  for (int r = 0; r < n; ++r)
    for (int s = r; s < n; ++s) out.write(wanted(full_product<rank>(t + r * kComponents, t + s * kComponents)));
}

// Families 4 (rank 2, t >= s only), 5 (rank 1) and 6 (rank 3).
template <int rank, class N, class Out>
UBMD_INLINE void matrix_family(const N *t, int n, Out &out) {
  for (int r = 0; r < n; ++r)
    for (int s = r; s < n; ++s) {
      N m[6];
      matrix_product<rank>(t + r * kComponents, t + s * kComponents, m);
      for (int q = rank == 2 ? s : 0; q < n; ++q) {
        const N *t2 = t + q * kComponents + 4;
        N sum = m[0] * t2[0];
        UBMD_UNROLL
        for (int k = 1; k < 6; ++k) sum += m[k] * t2[k];
        out.write(wanted(sum));
      }
    }
}

template <class N>
void read_moments(Source<N> &&source, int n_radial, int width, N *t) {
  for (int c = 0; c < kComponents; ++c)
    for (int s = 0; s < width; ++s) {
      const N column = source.next();
      if (s < n_radial) t[s * kComponents + c] = column;
    }
}

template <class F, class N>
void invariants_of(std::int64_t begin, std::int64_t end, int n, const F *moments, const F *tangents, F *to,
                   char *memory) {
  const int width = (n + kPadding - 1) / kPadding * kPadding;
  N *t = reinterpret_cast<N *>(memory);
  for (std::int64_t i = begin; i < end; i += kLanes<F>) {
    read_moments(Source<N>(moments, tangents, i, end - i, kComponents * width), n, width, t);
    ColumnWriter<F> out(to, i, end - i, count_invariants(n));
    for (int s = 0; s < n; ++s) out.write(wanted(t[s * kComponents]));
    square_family<1>(t, n, out);
    square_family<2>(t, n, out);
    square_family<3>(t, n, out);
    matrix_family<2>(t, n, out);
    matrix_family<1>(t, n, out);
    matrix_family<3>(t, n, out);
    for (int r = 0; r < n; ++r)
      for (int s = 0; s < n; ++s) {
        N v[3];
        vector_product(t + r * kComponents, t + s * kComponents, v);
        for (int q = 0; q < n; ++q) {
          const N *t1 = t + q * kComponents + 1;
          out.write(wanted(v[0] * t1[0] + v[1] * t1[1] + v[2] * t1[2]));
        }
      }
    out.flush();
  }
}

// The gradients of the families, in the same order: `in` gives the cotangents, `bar` collects [N_r][20].
template <int rank, class N, class V>
UBMD_INLINE void square_family_gradient(const N *t, int n, Source<N> &in, V *bar) {
  using F = typename Parts<N>::F;
  for (int r = 0; r < n; ++r)
    for (int s = r; s < n; ++s) {
      const N g = in.next();
      UBMD_UNROLL
      for (int k = kFirst[rank]; k < kFirst[rank] + kCount[rank]; ++k) {
        const N scaled = F(kTimes[k]) * g;
        bar[r * kComponents + k] += wanted(scaled * t[s * kComponents + k]);
        bar[s * kComponents + k] += wanted(scaled * t[r * kComponents + k]);
      }
    }
}

template <int rank, class N, class V>
UBMD_INLINE void matrix_family_gradient(const N *t, int n, Source<N> &in, V *bar) {
  for (int r = 0; r < n; ++r)
    for (int s = r; s < n; ++s) {
      N m[6], m_bar[6] = {};
      matrix_product<rank>(t + r * kComponents, t + s * kComponents, m);
      for (int q = rank == 2 ? s : 0; q < n; ++q) {
        const N g = in.next();
        UBMD_UNROLL
        for (int k = 0; k < 6; ++k) {
          m_bar[k] += g * t[q * kComponents + 4 + k];
          bar[q * kComponents + 4 + k] += wanted(g * m[k]);
        }
      }
      matrix_gradient<rank>(t + s * kComponents, m_bar, bar + r * kComponents);
      matrix_gradient<rank>(t + r * kComponents, m_bar, bar + s * kComponents);
    }
}

template <class N, class V>
UBMD_INLINE void vector_family_gradient(const N *t, int n, Source<N> &in, V *bar) {
  using F = typename Parts<N>::F;
  for (int r = 0; r < n; ++r)
    for (int s = 0; s < n; ++s) {
      const N *t3 = t + r * kComponents, *t2 = t + s * kComponents;
      N v[3], v_bar[3] = {};
      vector_product(t3, t2, v);
      for (int q = 0; q < n; ++q) {
        const N g = in.next();
        UBMD_UNROLL
        for (int k = 0; k < 3; ++k) {
          v_bar[k] += g * t[q * kComponents + 1 + k];
          bar[q * kComponents + 1 + k] += wanted(g * v[k]);
        }
      }
      UBMD_UNROLL
      for (int i = 0; i < 6; ++i) {
        const N twice = F(kTimes2[i]) * t2[4 + i];
        N sum{};
        UBMD_UNROLL
        for (int k = 0; k < 3; ++k) {
          sum += t3[10 + kRank3[i][k]] * v_bar[k];
          bar[r * kComponents + 10 + kRank3[i][k]] += wanted(twice * v_bar[k]);
        }
        bar[s * kComponents + 4 + i] += wanted(F(kTimes2[i]) * sum);
      }
    }
}

template <class F, class N>
void invariants_gradient_of(std::int64_t begin, std::int64_t end, int n, const F *moments, const F *tangents,
                            const F *cotangent, const F *tangent_part, F *to, char *memory) {
  using V = Lanes<F>;
  const int width = (n + kPadding - 1) / kPadding * kPadding;
  N *t = reinterpret_cast<N *>(memory);
  V *bar = reinterpret_cast<V *>(t + n * kComponents);
  for (std::int64_t i = begin; i < end; i += kLanes<F>) {
    read_moments(Source<N>(moments, tangents, i, end - i, kComponents * width), n, width, t);
    Source<N> in(cotangent, tangent_part, i, end - i, count_invariants(n));
    for (int k = 0; k < n * kComponents; ++k) bar[k] = V{};
    for (int s = 0; s < n; ++s) bar[s * kComponents] = wanted(in.next());
    square_family_gradient<1>(t, n, in, bar);
    square_family_gradient<2>(t, n, in, bar);
    square_family_gradient<3>(t, n, in, bar);
    matrix_family_gradient<2>(t, n, in, bar);
    matrix_family_gradient<1>(t, n, in, bar);
    matrix_family_gradient<3>(t, n, in, bar);
    vector_family_gradient(t, n, in, bar);
    ColumnWriter<F> out(to, i, end - i, kComponents * width);
    for (int c = 0; c < kComponents; ++c)
      for (int s = 0; s < width; ++s) out.write(s < n ? bar[s * kComponents + c] : V{});
    out.flush();
  }
}

template <class F>
std::int64_t invariants_scratch(int n) {
  return 3 * n * kComponents * std::int64_t(sizeof(Lanes<F>)) + 64;
}
