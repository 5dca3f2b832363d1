// What the vectorised kernels offer: plain functions on plain arrays, one table of them per number type.
//
// The kernels are compiled once per instruction set, each copy in a namespace of its own; kernels<F>() chooses the best
// one for this processor. Nothing here may define an inline function or template of the standard library, otherwise the
// linker could keep the copy that was compiled for a processor that this one isn't.
#pragma once

#include <cstdint>

namespace ubmd::ops {

// Packed components of the moments of rank 0 to 3: 1 | x y z | xx xy xz yy yz zz | xxx xxy xxz xyy xyz xzz yyy yyz yzz
// zzz
constexpr int kComponents = 20;
// Rows of moments [20, S] are padded to S = a multiple of this number of radial functions.
constexpr int kPadding = 8;

// Centres with their directed pairs, sorted by centre: the pairs of centre i are first[i] .. first[i + 1] - 1.
template <class F>
struct Graph {
  const std::int64_t *species;     // [n] elements of the centres
  const std::int64_t *first;       // [n + 1]
  const std::int64_t *neighbours;  // [P] elements of the neighbours
  const void *vectors;             // [P, 3] x_j - x_i
  const void *tangents;            // [P, 3] or null: direction in which the vectors move
  bool wide;                       // vectors and tangents are float64, otherwise float32
  const F *by_radial;              // B [Z, Z, N_r, N_b padded]
  const F *by_basis;               // the same transposed, [Z, Z, N_b, S]
  int n_elements, n_radial, n_basis;
  double cutoff, r_min;

  // always inlined: no copy of them may be compiled for one instruction set and used by all
  __attribute__((always_inline)) int padded_radial() const { return (n_radial + kPadding - 1) / kPadding * kPadding; }
  __attribute__((always_inline)) int padded_basis() const { return (n_basis + kPadding - 1) / kPadding * kPadding; }
};

// What becomes of the sums s of a product: out[0] = s; out[k] = s * factors[k] (+ plus, for k = 0) for those that are
// given; or the scaled SiLU of s, its first and (unless null) second derivative.
enum class Finish { store, scale, activate };

// s [rows, columns] = left [rows, depth] right [depth, columns] + add. The rows of left lie in tiles of `tile_rows`
// rows, left_tile numbers apart; the right matrix is packed. `add` is null, or has a row for all rows (add_row 0) or
// for each. Results and factors are contiguous.
template <class F>
struct MatrixProduct {
  std::int64_t rows, depth, columns;
  const F *left;
  std::int64_t left_tile, left_row, left_column;
  const F *panels;
  const F *add;
  std::int64_t add_row;
  Finish finish;
  F *out[3];
  const F *factors[2];
  const F *plus;
};

// Each function works on the centres begin .. end - 1; `scratch` is 64-byte aligned. False: a neighbour's element is
// not one of the model's.
template <class F>
struct Kernels {
  std::int64_t (*scratch_bytes)(const Graph<F> &);
  // Moments [n, 20, S], or with tangents their derivative.
  bool (*moments)(const Graph<F> &, std::int64_t begin, std::int64_t end, F *out, char *scratch);
  // Gradient of sum(cotangent * T) w.r.t. vectors [P, 3] and/or added to radial [Z, Z, N_b, S] (either may be null);
  // with tangents and `tangent_cotangent` of sum(cotangent * T + tangent_cotangent * dT).
  bool (*moments_gradient)(const Graph<F> &, std::int64_t begin, std::int64_t end, const F *cotangent,
                           const F *tangent_cotangent, double *vectors, double *radial, char *scratch);
  // Invariants [n, F] of the moments, or with tangents of the moments their derivative.
  void (*invariants)(std::int64_t begin, std::int64_t end, int n_radial, const F *moments, const F *tangents, F *out,
                     char *scratch);
  // Gradient [n, 20, S] of sum(cotangent * G), or of sum(cotangent * G + tangent_cotangent * dG), w.r.t. the moments.
  void (*invariants_gradient)(std::int64_t begin, std::int64_t end, int n_radial, const F *moments, const F *tangents,
                              const F *cotangent, const F *tangent_cotangent, F *out, char *scratch);
  std::int64_t (*invariants_scratch_bytes)(int n_radial);
  // Scaled SiLU of z [n], its first and (unless null) second derivative.
  void (*activation)(std::int64_t n, const F *z, F *value, F *first, F *second);
  int lanes;  // atoms that the invariants handle at once
  // Panels begin .. end - 1 of a right matrix [depth, columns], each of `panel` columns (the last one: of fewer, a
  // multiple of `lanes`), to where all of them lie one after the other.
  void (*pack)(const F *from, std::int64_t row, std::int64_t column, std::int64_t depth, std::int64_t columns,
               std::int64_t begin, std::int64_t end, F *panels);
  int panel;
  // Tiles begin .. end - 1 of a left matrix [rows, depth] whose columns are contiguous: [tile][depth][tile_rows].
  void (*pack_tiles)(const F *from, std::int64_t column, std::int64_t depth, std::int64_t rows, std::int64_t begin,
                     std::int64_t end, F *tiles);
  int tile_rows;
  // Some rows of one panel of a product.
  void (*panel_product)(const MatrixProduct<F> &, std::int64_t row, std::int64_t last, std::int64_t panel);
  // y [rows] = x [rows, width] weight + bias; slopes and (unless null) curvatures [rows, width] times delta weight.
  void (*last_layer)(std::int64_t rows, std::int64_t width, const F *x, const F *weight, F bias, const F *delta, F *y,
                     F *slopes, F *curvatures);
  // out[k] = a[k] * b[k % period]
  void (*multiply_elements)(std::int64_t n, std::int64_t period, const F *a, const F *b, F *out);
};

__attribute__((always_inline)) constexpr int count_invariants(int n) {
  return n + (3 + 2 * n) * n * (n + 1) / 2 + n * (n + 1) * (n + 2) / 6 + n * n * n;
}

template <class F>
const Kernels<F> &kernels();

// Whether oneMKL, which does torch's products, uses the whole vector registers: all that an Intel processor has.
bool library_is_wide();

}  // namespace ubmd::ops
