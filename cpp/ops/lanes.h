// Vectors of numbers (GCC's vector extension), dual numbers of them, and the few functions that the kernels need.
// Included by kernels.cpp only, inside the namespace of one instruction set.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F, int n>
struct VectorOf {
  typedef F type __attribute__((vector_size(n * sizeof(F))));
};
template <class F, int n>
struct UnalignedVectorOf {
  typedef F type __attribute__((vector_size(n * sizeof(F)), aligned(sizeof(F)), may_alias));
};

template <class F>
constexpr int kLanes = kVectorBytes / int(sizeof(F));
template <class F>
constexpr int kGroupLanes = kLanes<F> < kPadding ? kLanes<F> : kPadding;
// A full vector register (lanes are pairs or atoms), and one of at most 8 numbers (lanes are radial functions).
template <class F>
using Lanes = typename VectorOf<F, kLanes<F>>::type;
template <class F>
using Group = typename VectorOf<F, kGroupLanes<F>>::type;

#define UBMD_INLINE inline __attribute__((always_inline))

template <class F, int n>
UBMD_INLINE typename VectorOf<F, n>::type load(const F *from) {
  return *reinterpret_cast<const typename UnalignedVectorOf<F, n>::type *>(from);
}
template <class F, int n>
UBMD_INLINE void store(F *to, typename VectorOf<F, n>::type value) {
  *reinterpret_cast<typename UnalignedVectorOf<F, n>::type *>(to) = value;
}

// Value and derivative along one direction: every kernel that is written for a number type gives its tangent this way.
template <class V>
struct Dual {
  V a, b;
};

template <class A, class B>
UBMD_INLINE auto operator*(Dual<A> x, Dual<B> y) -> Dual<decltype(x.a * y.a)> {
  return {x.a * y.a, x.a * y.b + x.b * y.a};
}
template <class A, class B>
UBMD_INLINE auto operator*(A x, Dual<B> y) -> Dual<decltype(x * y.a)> {
  return {x * y.a, x * y.b};
}
template <class A, class B>
UBMD_INLINE auto operator*(Dual<A> x, B y) -> Dual<decltype(x.a * y)> {
  return {x.a * y, x.b * y};
}
template <class V>
UBMD_INLINE Dual<V> operator+(Dual<V> x, Dual<V> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class V>
UBMD_INLINE Dual<V> operator-(Dual<V> x, Dual<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class V, class F>
UBMD_INLINE Dual<V> operator-(Dual<V> x, F y) {
  return {x.a - y, x.b};
}
template <class V, class F>
UBMD_INLINE Dual<V> operator-(F x, Dual<V> y) {
  return {x - y.a, -y.b};
}
template <class N, class M>
UBMD_INLINE Dual<N> &operator+=(Dual<N> &x, M y) {
  return x = x + y;
}

// What a kernel hands back: the number itself, or of a dual number the derivative.
template <class V>
UBMD_INLINE V wanted(V x) {
  return x;
}
template <class V>
UBMD_INLINE V wanted(Dual<V> x) {
  return x.b;
}

// One lane of a number in memory.
template <class V>
UBMD_INLINE auto lane(const V &x, int k) {
  return x[k];
}
template <class V>
UBMD_INLINE auto lane(const Dual<V> &x, int k) {
  auto a = x.a[k], b = x.b[k];
  return Dual<decltype(a)>{a, b};
}

template <class N>
struct Parts;  // F: the real type, V: the vector, kDual
template <>
struct Parts<Lanes<float>> {
  using F = float;
  using G = Group<float>;
  static constexpr bool dual = false;
};
template <>
struct Parts<Lanes<double>> {
  using F = double;
  using G = Group<double>;
  static constexpr bool dual = false;
};
template <class V>
struct Parts<Dual<V>> {
  using F = typename Parts<V>::F;
  using G = Dual<typename Parts<V>::G>;
  static constexpr bool dual = true;
};

template <class V, class F, int n>
UBMD_INLINE V polynomial(V x, const F (&coefficients)[n]) {
  V sum = V{} + coefficients[n - 1];
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) sum = sum * x + coefficients[k];
  return sum;
}

// Chebyshev fits (relative error below half an ulp): exp on +-ln(2)/2; sin(pi/2 y)/y and cos(pi/2 y)/(1 - y^2) as
// polynomials in y^2 on 0..1.
template <class F>
struct Fit;
template <>
struct Fit<float> {
  using Bits = unsigned;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 12582912.f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.f, highest = 88.f;
  static constexpr float exp[] = {1.f,           1.00000003794f, 0.500000004740f, 0.166664147072f,
                                  0.0416663516f, 0.00837521020f, 0.00139412131f};
  static constexpr float sin[] = {1.57079632004f, -0.645963759584f, 0.0796899183290f, -0.00467414383815f,
                                  1.51671703664e-4f};
  static constexpr float cos[] = {0.999999999123f, -0.233700506255f, 0.0199686062068f, -8.93535501463e-4f,
                                  2.36006895819e-5f};
};
template <>
struct Fit<double> {
  using Bits = unsigned long long;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744., ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708., highest = 709.;
  static constexpr double exp[] = {1.,
                                   1.,
                                   0.50000000000000185703,
                                   0.16666666666666680948,
                                   0.041666666666486661223,
                                   0.0083333333333194903177,
                                   0.0013888888952696515657,
                                   0.00019841269890340665299,
                                   2.4801485074105116705e-5,
                                   2.7557240604663895823e-6,
                                   2.7632790542117181015e-7,
                                   2.5110153646928931396e-8};
  static constexpr double sin[] = {1.5707963267948966189,     -0.64596409750624620097,   0.079692626246165639827,
                                   -0.0046817541353042553228, 1.6044118471309159184e-4,  -3.5988430204672575218e-6,
                                   5.6921364280986252458e-8,  -6.684416831856084348e-10, 5.8729757447999501384e-12};
  static constexpr double cos[] = {1.,
                                   -0.23370055013616982323,
                                   0.019968957764878076237,
                                   -8.9452299847363444473e-4,
                                   2.473727635883673087e-5,
                                   -4.6476599159529776762e-7,
                                   6.3214409042583574486e-9,
                                   -6.5105291567976846068e-11,
                                   5.1084696854224100029e-13};
};

// exp(x), below 2 ulp: 2^n exp(rest). Zero below `lowest` (no slow subnormal numbers); NaN stays NaN.
template <class V>
UBMD_INLINE V exponential(V x) {
  using F = typename Parts<V>::F;
  using Bits = typename VectorOf<typename Fit<F>::Bits, kLanes<F>>::type;
  V clipped = x < Fit<F>::lowest ? V{} + Fit<F>::lowest : x;
  clipped = clipped > Fit<F>::highest ? V{} + Fit<F>::highest : clipped;
  const V shifted = clipped * F(1.44269504088896340736) + Fit<F>::round;
  const V n = shifted - Fit<F>::round;
  const V rest = (clipped - n * Fit<F>::ln2_high) - n * Fit<F>::ln2_low;
  const Bits power = (reinterpret_cast<Bits>(shifted) + Fit<F>::bias) << Fit<F>::mantissa;
  const V value = polynomial(rest, Fit<F>::exp) * reinterpret_cast<V>(power);
  return x < Fit<F>::lowest ? V{} : value;
}
template <class V>
UBMD_INLINE Dual<V> exponential(Dual<V> x) {
  const V value = exponential(x.a);
  return {value, value * x.b};
}

// sin and cos of pi/2 y, 0 <= y <= 1.
template <class N>
struct SineCosine {
  N sine, cosine;
};
template <class V>
UBMD_INLINE SineCosine<V> quarter_turn(V y) {
  using F = typename Parts<V>::F;
  const V square = y * y;
  return {y * polynomial(square, Fit<F>::sin), (F(1) - square) * polynomial(square, Fit<F>::cos)};
}
template <class V>
UBMD_INLINE SineCosine<Dual<V>> quarter_turn(Dual<V> y) {
  using F = typename Parts<V>::F;
  const auto [sine, cosine] = quarter_turn(y.a);
  const V slope = F(1.57079632679489661923) * y.b;
  return {{sine, cosine * slope}, {cosine, -(sine * slope)}};
}

template <class V>
UBMD_INLINE V square_root(V x) {
  V root;
  for (int k = 0; k < kLanes<typename Parts<V>::F>; ++k) {
    if constexpr (sizeof(x[0]) == 4) {
      root[k] = __builtin_sqrtf(x[k]);
    } else {
      root[k] = __builtin_sqrt(x[k]);
    }
  }
  return root;
}
template <class V>
UBMD_INLINE Dual<V> square_root(Dual<V> x) {
  const V root = square_root(x.a);
  return {root, typename Parts<V>::F(0.5) * x.b / root};
}

template <class V>
UBMD_INLINE V reciprocal(V x) {
  return typename Parts<V>::F(1) / x;
}
template <class V>
UBMD_INLINE Dual<V> reciprocal(Dual<V> x) {
  const V inverse = reciprocal(x.a);
  return {inverse, -(inverse * inverse * x.b)};
}

// Zero where r >= limit (also the derivative), x elsewhere; a distance that is NaN keeps x.
template <class V>
UBMD_INLINE V zero_from(V r, typename Parts<V>::F limit, V x) {
  return r >= limit ? V{} : x;
}
template <class V>
UBMD_INLINE Dual<V> zero_from(Dual<V> r, typename Parts<V>::F limit, Dual<V> x) {
  return {zero_from(r.a, limit, x.a), zero_from(r.a, limit, x.b)};
}
