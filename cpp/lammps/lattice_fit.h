// How an ideal crystal lies in a box: vectors and 3 x 3 matrices, translations, all ways to lay a lattice into a box.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "metadata.h"

namespace ubmd {

using Vector = std::array<double, 3>;
using Cell = std::array<int, 3>;  // combination of three lattice vectors

// ---- algebra: defined here, because every step uses it for every atom ----

inline Vector operator+(const Vector &a, const Vector &b) {
  return {a[0] + b[0], a[1] + b[1], a[2] + b[2]};
}
inline Vector operator-(const Vector &a, const Vector &b) {
  return {a[0] - b[0], a[1] - b[1], a[2] - b[2]};
}
inline Vector operator*(double s, const Vector &a) {
  return {s * a[0], s * a[1], s * a[2]};
}
inline double dot(const Vector &a, const Vector &b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}
inline double norm(const Vector &a) {
  return std::sqrt(dot(a, a));
}

// Row vector (of numbers or integers) times matrix.
template <typename Row>
Vector times(const Row &v, const Matrix &m) {
  return static_cast<double>(v[0]) * m[0] + static_cast<double>(v[1]) * m[1] + static_cast<double>(v[2]) * m[2];
}
template <typename Rows>
Matrix product(const Rows &a, const Matrix &b) {
  return {times(a[0], b), times(a[1], b), times(a[2], b)};
}
inline Matrix transpose(const Matrix &m) {
  Matrix t;
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k) t[i][k] = m[k][i];
  return t;
}
inline double largest_difference(const Matrix &a, const Matrix &b) {
  double largest = 0.0;
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k) largest = std::max(largest, std::abs(a[i][k] - b[i][k]));
  return largest;
}

// The translations along three vectors (rows of `basis`), however skewed.
class Translations {
 public:
  Translations() = default;
  explicit Translations(const Matrix &basis);

  const Matrix &basis() const { return basis_; }
  const Matrix &inverse() const { return inverse_; }
  // The translation that is nearest to a vector; leaves in `vector` what remains.
  Cell nearest(Vector &vector) const;
  // All translations with a length in [shortest, longest].
  std::vector<Cell> of_length(double shortest, double longest) const;

 private:
  Cell in_basis(const Cell &reduced) const;

  Matrix basis_{}, inverse_{}, reduced_{}, inverse_of_reduced_{};
  std::array<Cell, 3> combination_{};  // reduced = combination · basis
  double safe_ = 0.0;                  // half the shortest translation
};

// A way to lay a crystal into a box: box = multiple · lattice cell · rotation, vectors in rows.
struct Fit {
  std::array<Cell, 3> multiple{};
  Matrix rotation{};  // orthogonal; may be a mirror, because programs turn left-handed cells into right-handed ones
  Matrix cell{};      // the primitive cell in the box: box = multiple · cell without any deviation
  std::int64_t n_cells = 0;

  bool is_turned() const;
};

// All ways, the one without rotation first. `tolerance` is a fraction of the longest primitive vector.
std::vector<Fit> find_fits(const Lattice &lattice, const Matrix &box, double tolerance = 1e-3);

}  // namespace ubmd
