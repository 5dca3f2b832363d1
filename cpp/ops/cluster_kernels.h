// Clusters of a crystal. Lanes are centres of one sublattice. Included by kernels.cpp only, inside the namespace of one
// instruction set.

namespace clusters {

using V = Lanes<double>;
constexpr int kCentres = kLanes<double>;
constexpr int kMostMonomials = count_monomials(kMaxDegree);
// Members that are added at once.
constexpr int kMembers = 16;

template <class W>
UBMD_INLINE double total(W x) {
  constexpr int n = sizeof(W) / sizeof(double);
  if constexpr (n == 8) {
    return total(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
  } else if constexpr (n == 4) {
    return total(__builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3));
  } else {
    return x[0] + x[1];
  }
}

// Monomials of degree m follow from those of degree m - 1: x times all of them, y times those without x (the last m),
// z times the last.
UBMD_INLINE void raise(int m, const V *lower, V x, V y, V z, V *out) {
  const int all = count_monomials(m - 1);
  for (int j = 0; j < all; ++j) out[j] = x * lower[j];
  for (int j = 0; j < m; ++j) out[all + j] = y * lower[all - m + j];
  out[all + m] = z * lower[all - 1];
}

// Derivatives by u of sum(slopes * monomials of the degrees 1 .. degree); destroys the slopes.
UBMD_INLINE void lower_all(int degree, const V *monomials, V *slopes, V (&gradient)[3]) {
  const V x = monomials[0], y = monomials[1], z = monomials[2];
  V gx{}, gy{}, gz{};
  for (int m = degree; m > 1; --m) {
    const int all = count_monomials(m - 1), begin = count_all_monomials(m - 1);
    const V *slope = slopes + begin, *below = monomials + begin - all;
    V *to = slopes + begin - all;
    for (int j = 0; j < all; ++j) {
      gx += slope[j] * below[j];
      to[j] += slope[j] * x;
    }
    for (int j = 0; j < m; ++j) {
      gy += slope[all + j] * below[all - m + j];
      to[all - m + j] += slope[all + j] * y;
    }
    gz += slope[all + m] * below[all - 1];
    to[all - 1] += slope[all + m] * z;
  }
  gradient[0] = gx + slopes[0];
  gradient[1] = gy + slopes[1];
  gradient[2] = gz + slopes[2];
}

// Monomials of all sites that are needed; lanes without a centre are zero.
UBMD_INLINE void all_monomials(const ClusterProgram &program, const Centres &centres, V *out) {
  const double *from[kCentres] = {};
  for (int l = 0; l < centres.n; ++l) from[l] = centres.displacement + 3 * centres.first[centres.indices[l]];
  for (int k = 0; k < program.n_sites; ++k) {
    if (program.degree[k] == 0) continue;
    V *u = out + program.place[k];
    u[0] = u[1] = u[2] = V{};
    for (int l = 0; l < centres.n; ++l)
      for (int a = 0; a < 3; ++a) u[a][l] = from[l][3 * k + a];
    V *lower = u;
    for (int m = 2; m <= program.degree[k]; ++m) {
      V *next = lower + count_monomials(m - 1);
      raise(m, lower, u[0], u[1], u[2], next);
      lower = next;
    }
  }
}

// Products of the monomials of all bodies but the last, one row after the other. Partial products (of the first 2, 3,
// ... bodies) are kept in `scratch`; the result is the last of them.
UBMD_INLINE const V *product_of(const ClusterGroup &group, const V *monomials, V *scratch, const V *(&partial)[6]) {
  partial[0] = monomials + group.others[0];
  int rows = group.dims[0];
  for (int k = 1; k < group.n_others; ++k) {
    const V *factor = monomials + group.others[k], *left = partial[k - 1];
    const int columns = group.dims[k];
    V *to = scratch;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) to[i * columns + j] = left[i] * factor[j];
    partial[k] = to;
    rows *= columns;
    scratch += rows;
  }
  return partial[group.n_others - 1];
}

// The slopes of the bodies of a product from those of the product [rows]; `scratch` takes two arrays of that size.
UBMD_INLINE void spread(const ClusterGroup &group, const V *monomials, const V *const (&partial)[6], const V *slope,
                        V *slopes, V *scratch) {
  int rows = group.rows;
  V *next = scratch;
  for (int k = group.n_others - 1; k > 0; --k) {
    const int columns = group.dims[k];
    rows /= columns;
    const V *factor = monomials + group.others[k], *left = partial[k - 1];
    V *to = slopes + group.others[k];
    for (int i = 0; i < rows; ++i) {
      V sum{};
      for (int j = 0; j < columns; ++j) sum += slope[i * columns + j] * factor[j];
      next[i] = sum;
    }
    for (int j = 0; j < columns; ++j) {
      V sum = to[j];
      for (int i = 0; i < rows; ++i) sum += slope[i * columns + j] * left[i];
      to[j] = sum;
    }
    slope = next;
    next += rows;
  }
  V *to = slopes + group.others[0];
  for (int j = 0; j < group.dims[0]; ++j) to[j] += slope[j];
}

// `width` columns of one cluster: t_r += sum_j c_rj v_j and g_j += sum_r a_r c_rj; gives v·g of this cluster. (Sums are
// kept in variables: the compiler can't know that arrays don't overlap.)
template <int width>
UBMD_INLINE V contract_columns(int rows, int stride, const double *c, const V *a, V *t, const V *v, V *g) {
  V factor[width], sum[width] = {};
  for (int j = 0; j < width; ++j) factor[j] = v[j];
  for (int r = 0; r < rows; ++r, c += stride) {
    const V left = a[r];
    V right = t[r];
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) {
      right += c[j] * factor[j];
      sum[j] += c[j] * left;
    }
    t[r] = right;
  }
  V energy{};
  for (int j = 0; j < width; ++j) {
    energy += factor[j] * sum[j];
    g[j] += sum[j];
  }
  return energy;
}

template <int width>
V contract_group(const ClusterGroup &group, const double *c, const V *a, V *t, const V *monomials, V *slopes) {
  V energy{};
  for (int k = 0; k < group.n_clusters; ++k, c += std::int64_t(group.rows) * group.columns)
    for (int j = 0; j < group.columns; j += width)
      energy += contract_columns<width>(group.rows, group.columns, c + j, a, t, monomials + group.last[k] + j,
                                        slopes + group.last[k] + j);
  return energy;
}

// Calls run.template operator()<width>() with the width that suits the number of columns, a divisor of it.
template <class Run>
UBMD_INLINE void with_width(int columns, Run run) {
  switch (columns) {
    case 3:
      return run.template operator()<3>();
    case 6:
      return run.template operator()<6>();
    case 10:
      return run.template operator()<10>();
    case 15:
      return run.template operator()<5>();
    default:
      return run.template operator()<7>();  // 21, 28
  }
}

std::int64_t scratch(const ClusterProgram &program) {
  const std::int64_t energies = 2 * program.n_monomials + 5 * program.largest_rows;
  // of the members at most: turned monomials, among them three of the centre, and products
  const std::int64_t deviations = program.n_monomials + 3 * kMostMonomials * (kMaxDegree + 1) +
                                  3 * program.largest_dimension +
                                  kMembers * ((kMaxBodies + 2) * kMostMonomials + program.largest_dimension);
  return energies > deviations ? energies : deviations;
}

void contract_some(const ClusterProgram &program, const Centres &centres, const double *coefficients, double *energies,
                   double *gradient, char *scratch) {
  V *monomials = reinterpret_cast<V *>(scratch), *slopes = monomials + program.n_monomials;
  V *products = slopes + program.n_monomials, *t = products + 2 * program.largest_rows;
  all_monomials(program, centres, monomials);
  for (int k = 0; k < program.n_monomials; ++k) slopes[k] = V{};
  V energy{};
  const V one = V{} + 1.;
  for (int n = 0; n < program.n_groups; ++n) {
    const ClusterGroup &group = program.groups[n];
    const double *c = coefficients + group.coefficient;
    const V *partial[6] = {}, *left = &one;
    V *right = t;
    if (group.n_others == 1) {
      left = monomials + group.others[0];
      right = slopes + group.others[0];
    } else {
      if (group.n_others > 1) left = product_of(group, monomials, products, partial);
      for (int r = 0; r < group.rows; ++r) t[r] = V{};
    }
    with_width(group.columns,
               [&]<int width>() { energy += contract_group<width>(group, c, left, right, monomials, slopes); });
    if (group.n_others > 1) spread(group, monomials, partial, t, slopes, t + group.rows);
  }
  double *to[kCentres] = {};
  for (int l = 0; l < centres.n; ++l) {
    to[l] = gradient + 3 * centres.first[centres.indices[l]];
    energies[centres.indices[l]] = energy[l];
  }
  for (int k = 0; k < program.n_sites; ++k) {
    V g[3] = {};
    const int place = program.place[k];
    if (program.degree[k] > 0) lower_all(program.degree[k], monomials + place, slopes + place, g);
    for (int l = 0; l < centres.n; ++l)
      for (int a = 0; a < 3; ++a) to[l][3 * k + a] = g[a][l];
  }
}

// The function for each set of at most kCentres centres.
template <class Run>
UBMD_INLINE void for_lanes(Centres centres, Run run) {
  for (std::int64_t rest = centres.n; rest > 0; rest -= kCentres, centres.indices += kCentres) {
    centres.n = rest < kCentres ? rest : kCentres;
    run(centres);
  }
}

void contract(const ClusterProgram &program, const Centres &centres, const double *coefficients, double *energy,
              double *gradient, char *scratch) {
  for_lanes(centres,
            [&](const Centres &some) { contract_some(program, some, coefficients, energy, gradient, scratch); });
}

void monomials(const ClusterProgram &program, const Centres &centres, char *out) {
  all_monomials(program, centres, reinterpret_cast<V *>(out));
}

// out[r, j] += sum over tiles and lanes of left[r] * right[j] for `width` columns and `height` rows at a time.
template <int width, int height>
UBMD_INLINE void moments_of(const ClusterGroup &group, int n_tiles, const V *left, int left_stride, const V *right,
                            int right_stride, double *out) {
  for (int r = 0; r < group.rows; r += height) {
    V sum[height][width] = {};
    for (int k = 0; k < n_tiles; ++k) {
      const V *a = left + k * std::int64_t(left_stride) + r, *v = right + k * std::int64_t(right_stride);
#pragma GCC unroll 16
      for (int j = 0; j < width; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < height; ++i) sum[i][j] += a[i] * v[j];
      }
    }
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < width; ++j) out[(r + i) * group.columns + j] += total(sum[i][j]);
  }
}

std::int64_t moments_scratch(const ClusterProgram &program, int n_tiles) {
  return (2 + std::int64_t(n_tiles)) * program.largest_rows + 1;
}

void moments(const ClusterProgram &program, int begin, int end, int n_tiles, const char *monomials_of_tiles,
             double *out, char *scratch) {
  const V *monomials = reinterpret_cast<const V *>(monomials_of_tiles);
  V *partials = reinterpret_cast<V *>(scratch), *products = partials + 2 * program.largest_rows;
  const V one = V{} + 1.;
  for (int n = begin; n < end; ++n) {
    const ClusterGroup &group = program.groups[n];
    const V *left = &one;
    int stride = 0;
    if (group.n_others == 1) {
      left = monomials + group.others[0];
      stride = program.n_monomials;
    } else if (group.n_others > 1) {
      left = products;
      stride = group.rows;
      for (int k = 0; k < n_tiles; ++k) {
        const V *partial[6] = {};
        const V *from = product_of(group, monomials + k * std::int64_t(program.n_monomials), partials, partial);
        for (int r = 0; r < group.rows; ++r) products[k * stride + r] = from[r];
      }
    }
    double *to = out + group.coefficient;
    for (int k = 0; k < group.n_clusters; ++k, to += std::int64_t(group.rows) * group.columns)
      with_width(group.columns, [&]<int width>() {
        for (int j = 0; j < group.columns; j += width) {
          const V *right = monomials + group.last[k] + j;
          constexpr int height = width < 10 ? 3 : 1;
          if (group.rows % height == 0) {
            moments_of<width, height>(group, n_tiles, left, stride, right, program.n_monomials, to + j);
          } else {
            moments_of<width, 1>(group, n_tiles, left, stride, right, program.n_monomials, to + j);
          }
        }
      });
  }
}

// Monomials [D] of a cluster's body in the frame of the prototype: sum_i monomials_i turn_ij.
UBMD_INLINE void turn_back(const ClusterTurns &turns, int degree, int operation, const V *monomials, V *out) {
  const int n = count_monomials(degree);
  const std::int64_t *first = turns.first + turns.start[degree] + std::int64_t(operation) * n;
  if (first[n] - first[0] == n) {  // axes of the crystal along those of the frame: monomials only change places
    const std::int64_t *column = turns.column + first[0];
    const double *value = turns.value + first[0];
    for (int i = 0; i < n; ++i) out[column[i]] = value[i] * monomials[i];
    return;
  }
  for (int j = 0; j < n; ++j) out[j] = V{};
  for (int i = 0; i < n; ++i) {
    const V value = monomials[i];
    for (std::int64_t e = first[i]; e < first[i + 1]; ++e) out[turns.column[e]] += turns.value[e] * value;
  }
}

// Derivatives [3, D] of the monomials of one degree of a site.
UBMD_INLINE void slopes_of(int degree, const V *monomials, V *out) {
  const V x = monomials[0], y = monomials[1], z = monomials[2];
  const V one = V{} + 1.;
  for (int a = 0; a < 3; ++a) {
    V buffer[2][count_monomials(kMaxDegree)];
    for (int j = 0; j < 3; ++j) buffer[0][j] = j == a ? one : V{};
    int now = 0;
    const V *lower = monomials;
    for (int m = 2; m <= degree; ++m, now = 1 - now) {
      const int all = count_monomials(m - 1);
      V *next = buffer[1 - now];
      raise(m, buffer[now], x, y, z, next);
      if (a == 0)
        for (int j = 0; j < all; ++j) next[j] += lower[j];
      if (a == 1)
        for (int j = 0; j < m; ++j) next[all + j] += lower[all - m + j];
      if (a == 2) next[all + m] += lower[all - 1];
      lower += all;
    }
    const int n = count_monomials(degree);
    for (int j = 0; j < n; ++j) out[a * n + j] = buffer[now][j];
  }
}

// What the sums of an orbit's members are made from: the turned monomials of their bodies (of the centre, the
// derivatives of its monomials for x, y, z), products of all bodies but the last, and the last one.
struct Factors {
  const V *factors[kMembers][kMaxBodies];
  const V *right[kMembers];
};

// sums [rows, columns] += sum over members of left[member][rows] right[member][columns], `width` columns at a time.
template <int width, int height>
UBMD_INLINE void add_products(int n_members, int rows, int columns, const V *left, const V *const *right, V *sums) {
  for (int j = 0; j < columns; j += width)
    for (int r = 0; r < rows; r += height) {
      V sum[height][width];
      for (int i = 0; i < height; ++i)
        for (int c = 0; c < width; ++c) sum[i][c] = sums[(r + i) * columns + j + c];
      for (int m = 0; m < n_members; ++m) {
        const V *a = left + m * rows + r, *v = right[m] + j;
#pragma GCC unroll 16
        for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
          for (int i = 0; i < height; ++i) sum[i][c] += a[i] * v[c];
        }
      }
      for (int i = 0; i < height; ++i)
        for (int c = 0; c < width; ++c) sums[(r + i) * columns + j + c] = sum[i][c];
    }
}

// Turned monomials of the bodies of a member; returns the memory behind them.
UBMD_INLINE V *turn_member(const ClusterOrbit &orbit, const ClusterMember &member, const ClusterTurns &turns,
                           const V *monomials, const V *centre_slopes, const V *(&factors)[kMaxBodies], V *scratch) {
  for (int k = 0; k < orbit.n_bodies; ++k) {
    const int degree = orbit.degrees[k], n = count_monomials(degree);
    const bool centre = k == member.centre;
    const V *from = centre ? centre_slopes + 3 * kMostMonomials * degree : monomials + member.places[k];
    factors[k] = scratch;
    for (int a = 0; a < (centre ? 3 : 1); ++a, scratch += n)
      turn_back(turns, degree, member.operation, from + a * n, scratch);
  }
  return scratch;
}

// Product of all factors but the last; each step writes from the end, so that it works in place.
UBMD_INLINE void product_of_factors(const ClusterOrbit &orbit, const ClusterMember &member,
                                    const V *const (&factors)[kMaxBodies], int axis, V *out) {
  out[0] = V{} + 1.;
  int size = 1;
  for (int k = 0; k + 1 < orbit.n_bodies; ++k) {
    const int n = count_monomials(orbit.degrees[k]);
    const V *factor = factors[k] + (k == member.centre ? axis * n : 0);
    for (int i = size - 1; i >= 0; --i) {
      const V left = out[i];
      for (int j = n - 1; j >= 0; --j) out[i * n + j] = left * factor[j];
    }
    size *= n;
  }
}

// Adds to sums [3, dimension] the derivatives of the products of the monomials of at most kMembers members.
UBMD_INLINE void add_members(const ClusterOrbit &orbit, const ClusterMember *members, int n_members,
                             const ClusterTurns &turns, const V *monomials, const V *centre_slopes, V *sums,
                             V *scratch) {
  const int last = orbit.n_bodies - 1, columns = count_monomials(orbit.degrees[last]), rows = orbit.dimension / columns;
  Factors all;
  for (int m = 0; m < n_members; ++m)
    scratch = turn_member(orbit, members[m], turns, monomials, centre_slopes, all.factors[m], scratch);
  for (int a = 0; a < 3; ++a, sums += orbit.dimension) {
    for (int m = 0; m < n_members; ++m) {
      product_of_factors(orbit, members[m], all.factors[m], a, scratch + m * rows);
      all.right[m] = all.factors[m][last] + (last == members[m].centre ? a * columns : 0);
    }
    with_width(columns, [&]<int width>() {
      constexpr int height = width < 10 ? 3 : 1;
      if (rows % height == 0) {
        add_products<width, height>(n_members, rows, columns, scratch, all.right, sums);
      } else {
        add_products<width, 1>(n_members, rows, columns, scratch, all.right, sums);
      }
    });
  }
}

// Calls run.template operator()<columns>() for 1 to 8 columns.
template <class Run>
UBMD_INLINE void with_columns(int columns, Run run) {
  switch (columns) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
    case 7:
      return run.template operator()<7>();
    default:
      return run.template operator()<8>();
  }
}

// out [3][n_raw] (indexed by centre first) from sums [3, D] and raw [D, n_raw].
UBMD_INLINE void to_raw(const ClusterOrbit &orbit, std::int64_t all_raw, const V *sums, const Centres &centres,
                        double *out) {
  constexpr int width = 8;
  for (int begin = 0; begin < orbit.n_raw; begin += width)
    with_columns(orbit.n_raw - begin, [&]<int columns>() {
      for (int a = 0; a < 3; ++a) {
        V result[columns] = {};
        const V *from = sums + a * orbit.dimension;
        const double *row = orbit.raw + begin;
        for (int d = 0; d < orbit.dimension; ++d, row += orbit.n_raw) {
#pragma GCC unroll 8
          for (int p = 0; p < columns; ++p) result[p] += row[p] * from[d];
        }
        for (int l = 0; l < centres.n; ++l) {
          double *to = out + (centres.indices[l] * 3 + a) * all_raw + orbit.raw_place + begin;
          for (int p = 0; p < columns; ++p) to[p] = result[p][l];
        }
      }
    });
}

void site_moments(const ClusterProgram &program, const ClusterTurns &turns, const Centres &all, double *out,
                  char *scratch) {
  V *monomials = reinterpret_cast<V *>(scratch), *centre_slopes = monomials + program.n_monomials;
  V *sums = centre_slopes + 3 * kMostMonomials * (kMaxDegree + 1), *rest = sums + 3 * program.largest_dimension;
  for_lanes(all, [&](const Centres &centres) {
    all_monomials(program, centres, monomials);
    for (int m = 1; m <= program.degree[0]; ++m)
      slopes_of(m, monomials + program.place[0], centre_slopes + 3 * kMostMonomials * m);
    for (int n = 0; n < program.n_orbits; ++n) {
      const ClusterOrbit &orbit = program.orbits[n];
      for (int k = 0; k < 3 * orbit.dimension; ++k) sums[k] = V{};
      for (int k = 0; k < orbit.n_members; k += kMembers) {
        const int count = orbit.n_members - k < kMembers ? orbit.n_members - k : kMembers;
        add_members(orbit, orbit.members + k, count, turns, monomials, centre_slopes, sums, rest);
      }
      to_raw(orbit, program.n_raw, sums, centres, out);
    }
  });
}

// Column from which a row of a triangular matrix is read: a multiple of the lanes.
UBMD_INLINE std::int64_t first_column(std::int64_t row, bool triangular) {
  return triangular ? row / kCentres * kCentres : 0;
}

void multiply(std::int64_t rows, std::int64_t columns, const double *matrix, const double *x, double *y,
              bool triangular) {
  for (std::int64_t i = 0; i < rows; ++i, matrix += columns) {
    std::int64_t j = first_column(i, triangular);
    V sum[4] = {};
    for (; j + 4 * kCentres <= columns; j += 4 * kCentres)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        sum[k] += load<double, kCentres>(matrix + j + k * kCentres) * load<double, kCentres>(x + j + k * kCentres);
    double result = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; j < columns; ++j) result += matrix[j] * x[j];
    y[i] = result;
  }
}

void multiply_transposed(std::int64_t rows, std::int64_t columns, const double *matrix, const double *x, double *y,
                         bool triangular) {
  constexpr int height = 4;
  for (std::int64_t i = 0; i < rows; i += height) {
    const double *row[height];
    double factor[height];
    for (int k = 0; k < height; ++k) {
      const bool there = i + k < rows;
      row[k] = matrix + (there ? i + k : i) * columns;
      factor[k] = there ? x[i + k] : 0.;
    }
    std::int64_t j = first_column(i, triangular);
    for (; j + kCentres <= columns; j += kCentres) {
      V sum = load<double, kCentres>(y + j);
#pragma GCC unroll 4
      for (int k = 0; k < height; ++k) sum += factor[k] * load<double, kCentres>(row[k] + j);
      store<double, kCentres>(y + j, sum);
    }
    for (; j < columns; ++j)
      for (int k = 0; k < height; ++k) y[j] += factor[k] * row[k][j];
  }
}

}  // namespace clusters

extern const ClusterKernels cluster_table;
const ClusterKernels cluster_table = {clusters::kCentres,           sizeof(clusters::V),    clusters::scratch,
                                      clusters::contract,           clusters::monomials,    clusters::moments,
                                      clusters::moments_scratch,    clusters::site_moments, clusters::multiply,
                                      clusters::multiply_transposed};
