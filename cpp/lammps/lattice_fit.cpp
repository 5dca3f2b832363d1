#include "lattice_fit.h"

#include <algorithm>
#include <cmath>

namespace ubmd {
namespace {

Vector cross(const Vector &a, const Vector &b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}
double determinant(const Matrix &m) {
  return dot(m[0], cross(m[1], m[2]));
}
Matrix inverse(const Matrix &m) {
  const double d = 1.0 / determinant(m);
  return transpose({d * cross(m[1], m[2]), d * cross(m[2], m[0]), d * cross(m[0], m[1])});
}
constexpr Matrix identity = {{{1.0, 0.0, 0.0}, {0.0, 1.0, 0.0}, {0.0, 0.0, 1.0}}};

// The orthogonal matrix next to a nearly orthogonal one (Newton iteration of the polar decomposition).
Matrix orthogonal(Matrix m) {
  for (int step = 0; step < 8; ++step) {
    const auto other = transpose(inverse(m));
    for (int i = 0; i < 3; ++i) m[i] = 0.5 * (m[i] + other[i]);
  }
  return m;
}

std::int64_t determinant(const std::array<Cell, 3> &n) {
  const auto minor = [&](int a, int b, int i, int k) {
    return static_cast<std::int64_t>(n[a][i]) * n[b][k] - static_cast<std::int64_t>(n[a][k]) * n[b][i];
  };
  return n[0][0] * minor(1, 2, 1, 2) - n[0][1] * minor(1, 2, 0, 2) + n[0][2] * minor(1, 2, 0, 1);
}

int rounded(double x) {
  return static_cast<int>(std::lround(x));
}

}  // namespace

// ---- translations ----

// Reduced by the shortest combinations of pairs and of all three vectors, so that the nearest translation is never more
// than one step away from the rounded one.
Translations::Translations(const Matrix &basis) : basis_(basis), inverse_(ubmd::inverse(basis)), reduced_(basis) {
  combination_ = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  for (bool changed = true; changed;) {
    changed = false;
    for (int i = 0; i < 3; ++i) {
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      double shortest = dot(reduced_[i], reduced_[i]) * (1.0 - 1e-12);
      Cell best{};
      const auto consider = [&](int a, int b) {
        const auto v = reduced_[i] + static_cast<double>(a) * reduced_[j] + static_cast<double>(b) * reduced_[k];
        if (dot(v, v) < shortest) {
          shortest = dot(v, v);
          best = {a, b, 1};
        }
      };
      consider(-rounded(dot(reduced_[i], reduced_[j]) / dot(reduced_[j], reduced_[j])), 0);
      consider(0, -rounded(dot(reduced_[i], reduced_[k]) / dot(reduced_[k], reduced_[k])));
      for (int a : {-1, 0, 1})
        for (int b : {-1, 0, 1}) consider(a, b);
      if (best[2] == 0) continue;
      changed = true;
      reduced_[i] =
          reduced_[i] + static_cast<double>(best[0]) * reduced_[j] + static_cast<double>(best[1]) * reduced_[k];
      for (int c = 0; c < 3; ++c) combination_[i][c] += best[0] * combination_[j][c] + best[1] * combination_[k][c];
    }
  }
  inverse_of_reduced_ = ubmd::inverse(reduced_);
  safe_ = 0.5 * std::min({norm(reduced_[0]), norm(reduced_[1]), norm(reduced_[2])});
}

Cell Translations::in_basis(const Cell &reduced) const {
  Cell cell{};
  for (int i = 0; i < 3; ++i)
    for (int c = 0; c < 3; ++c) cell[c] += reduced[i] * combination_[i][c];
  return cell;
}

Cell Translations::nearest(Vector &vector) const {
  const auto fraction = times(vector, inverse_of_reduced_);
  const Cell start = {rounded(fraction[0]), rounded(fraction[1]), rounded(fraction[2])};
  Vector rest = vector - times(start, reduced_);
  double shortest = dot(rest, rest);
  if (shortest < safe_ * safe_) {
    vector = rest;
    return in_basis(start);
  }
  Cell best = start;
  for (int a = -1; a <= 1; ++a)
    for (int b = -1; b <= 1; ++b)
      for (int c = -1; c <= 1; ++c) {
        const Cell cell = {start[0] + a, start[1] + b, start[2] + c};
        const auto trial = vector - times(cell, reduced_);
        if (dot(trial, trial) >= shortest) continue;
        shortest = dot(trial, trial);
        rest = trial;
        best = cell;
      }
  vector = rest;
  return in_basis(best);
}

std::vector<Cell> Translations::of_length(double shortest, double longest) const {
  int range[3];
  const auto columns = transpose(inverse_of_reduced_);
  for (int i = 0; i < 3; ++i) range[i] = static_cast<int>(longest * norm(columns[i]) + 1e-9);
  std::vector<Cell> cells;
  for (int a = -range[0]; a <= range[0]; ++a)
    for (int b = -range[1]; b <= range[1]; ++b)
      for (int c = -range[2]; c <= range[2]; ++c) {
        const Cell cell = {a, b, c};
        const auto v = times(cell, reduced_);
        const double square = dot(v, v);
        if (square >= shortest * shortest && square <= longest * longest) cells.push_back(in_basis(cell));
      }
  return cells;
}

// ---- the crystal in the box ----

bool Fit::is_turned() const {
  return largest_difference(rotation, identity) > 0.0;
}

namespace {

Fit make_fit(const std::array<Cell, 3> &multiple, const Matrix &rotation, const Matrix &box) {
  Matrix numbers;
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k) numbers[i][k] = multiple[i][k];
  return {multiple, rotation, product(inverse(numbers), box), std::abs(determinant(multiple))};
}

}  // namespace

std::vector<Fit> find_fits(const Lattice &lattice, const Matrix &box, double tolerance) {
  std::vector<Fit> fits;
  const auto exact = product(box, inverse(lattice.cell));
  std::array<Cell, 3> multiple;
  double deviation = 0.0;
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k) {
      multiple[i][k] = rounded(exact[i][k]);
      deviation = std::max(deviation, std::abs(exact[i][k] - multiple[i][k]));
    }
  if (deviation < tolerance && determinant(multiple) != 0) fits.push_back(make_fit(multiple, identity, box));

  // every rotation: combinations of lattice vectors with the lengths of the box's vectors and the angles between them
  const auto &c = lattice.cell;
  const double length = tolerance * std::max({norm(c[0]), norm(c[1]), norm(c[2])});
  const Translations translations(c);
  std::array<std::vector<Cell>, 3> rows;
  for (int i = 0; i < 3; ++i) rows[i] = translations.of_length(norm(box[i]) - length, norm(box[i]) + length);
  const auto angle_fits = [&](const Vector &a, const Vector &b, int i, int k) {
    return std::abs(dot(a, b) - dot(box[i], box[k])) < length * (norm(box[i]) + norm(box[k]));
  };
  for (const auto &first : rows[0]) {
    const auto a = times(first, c);
    for (const auto &second : rows[1]) {
      const auto b = times(second, c);
      if (!angle_fits(a, b, 0, 1)) continue;
      for (const auto &third : rows[2]) {
        const auto d = times(third, c);
        if (!angle_fits(a, d, 0, 2) || !angle_fits(b, d, 1, 2)) continue;
        const auto rotation = orthogonal(product(inverse({a, b, d}), box));
        if (largest_difference(rotation, identity) < 1e-4) continue;
        fits.push_back(make_fit({first, second, third}, rotation, box));
      }
    }
  }
  return fits;
}

}  // namespace ubmd
