// Operators of what a crystal's model file has beside force constants: functions of the true distance of pairs, and a
// wall where displacements of neighbours differ by more than in any label. Everything is float64.
//
// The functions of a pair of kind t are exp(-(r - centre_k)^2/2 width^2) f(r), k = 1 .. K, f(r) = (1 + cos(pi
// r/r_c))/2; `centres` and `weights` are [T, K].
#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.h"

namespace ubmd::ops {

namespace {

using at::Tensor;

const std::int64_t *integers(const Tensor &tensor, std::int64_t n) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_contiguous() && tensor.numel() == n,
              "ubmd operators: pairs of a crystal need a contiguous int64 tensor of ", n, " elements");
  return tensor.const_data_ptr<std::int64_t>();
}

const double *numbers(const Tensor &tensor, std::int64_t n) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.is_contiguous() && tensor.numel() == n,
              "ubmd operators: pairs of a crystal need a contiguous float64 tensor of ", n, " elements");
  return tensor.const_data_ptr<double>();
}

double *target(const Tensor &tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.is_contiguous(),
              "ubmd operators: results of a crystal's pairs are added to a contiguous float64 tensor");
  return tensor.mutable_data_ptr<double>();
}

// Values and derivatives of the functions of one pair.
class Radial {
 public:
  Radial(const Tensor &centres, double cutoff, double width)
      : kinds(centres.size(0)),
        count(centres.size(1)),
        centres_(numbers(centres, kinds * count)),
        cutoff_(cutoff),
        width_(width),
        value(count),
        slope(count) {}

  void compute(double distance, std::int64_t kind) {
    TORCH_CHECK_INDEX(kind >= 0 && kind < kinds, "ubmd operators: a pair has the kind ", kind, ", not one of ", kinds);
    const double wave = M_PI / cutoff_;
    const double f = 0.5 + 0.5 * std::cos(wave * distance), f1 = -0.5 * wave * std::sin(wave * distance);
    const double *centre = centres_ + kind * count;
    for (std::int64_t k = 0; k < count; ++k) {
      const double x = (distance - centre[k]) / width_, gauss = std::exp(-0.5 * x * x);
      value[k] = gauss * f;
      slope[k] = gauss * (f1 - x / width_ * f);
    }
  }

  const std::int64_t kinds, count;

 private:
  const double *centres_;
  const double cutoff_, width_;

 public:
  std::vector<double> value, slope;
};

double length(const double *v) {
  return std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
}

void add(double *to, double factor, const double *v) {
  for (int a = 0; a < 3; ++a) to[a] += factor * v[a];
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> crystal_near(const Tensor &species, const Tensor &first,
                                                                const Tensor &displacement, const Tensor &counts,
                                                                const Tensor &places, const Tensor &kinds,
                                                                double cutoff) {
  const std::int64_t n = species.size(0), sublattices = counts.size(0), sites = kinds.size(0);
  const std::int64_t *s = integers(species, n), *edge = integers(first, n + 1), *count = integers(counts, sublattices);
  const std::int64_t *kind = integers(kinds, sites);
  const double *u = numbers(displacement, 3 * edge[n]), *place = numbers(places, 3 * sites);
  std::vector<std::int64_t> begin(sublattices + 1, 0);
  for (std::int64_t k = 0; k < sublattices; ++k) begin[k + 1] = begin[k] + count[k];
  std::vector<std::int64_t> edges, owns, atoms, found;
  std::vector<double> vectors;
  for (std::int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(s[i] >= 0 && s[i] < sublattices && edge[i + 1] - edge[i] == count[s[i]],
                      "A centre of the crystal doesn't have one edge for each of its relative sites.");
    const double *own = u + 3 * edge[i];
    for (std::int64_t k = 0; k < count[s[i]]; ++k) {
      const std::int64_t site = begin[s[i]] + k;
      const double *other = own + 3 * k;
      double v[3], square = 0.;
      for (int a = 0; a < 3; ++a) {
        v[a] = place[3 * site + a] + (other[a] - own[a]);
        square += v[a] * v[a];
      }
      if (kind[site] < 0 || !(square < cutoff * cutoff)) continue;
      edges.push_back(edge[i] + k);
      owns.push_back(edge[i]);
      atoms.push_back(i);
      found.push_back(kind[site]);
      vectors.insert(vectors.end(), v, v + 3);
    }
  }
  const auto whole = [](std::vector<std::int64_t> &values) { return at::tensor(values, at::kLong); };
  const Tensor vector = at::tensor(vectors, at::kDouble).view({-1, 3});
  return {whole(edges), whole(owns), whole(atoms), vector, whole(found)};
}

void crystal_pair_energies(const Tensor &edges, const Tensor &owns, const Tensor &atoms, const Tensor &vectors,
                           const Tensor &kinds, const Tensor &centres, const Tensor &weights, const Tensor &core,
                           double cutoff, double width, double strength, const Tensor &energy, const Tensor &gradient) {
  Radial radial(centres, cutoff, width);
  const std::int64_t n = kinds.size(0);
  const std::int64_t *edge = integers(edges, n), *own = integers(owns, n), *atom = integers(atoms, n),
                     *kind = integers(kinds, n);
  const double *vector = numbers(vectors, 3 * n), *weight = numbers(weights, radial.kinds * radial.count);
  const double *radius = numbers(core, radial.kinds);
  double *e = target(energy), *g = target(gradient);
  for (std::int64_t p = 0; p < n; ++p) {
    const double *v = vector + 3 * p, r = length(v);
    radial.compute(r, kind[p]);
    const double *w = weight + kind[p] * radial.count;
    double value = 0., slope = 0.;
    for (std::int64_t k = 0; k < radial.count; ++k) {
      value += w[k] * radial.value[k];
      slope += w[k] * radial.slope[k];
    }
    const double excess = std::max(radius[kind[p]] / r - 1., 0.);
    value += strength * excess * excess * excess;
    slope -= 3. * strength * excess * excess * radius[kind[p]] / (r * r);
    e[atom[p]] += 0.5 * value;
    add(g + 3 * edge[p], 0.5 * slope / r, v);
    add(g + 3 * own[p], -0.5 * slope / r, v);
  }
}

Tensor crystal_pair_sums(const Tensor &vectors, const Tensor &kinds, const Tensor &centres, double cutoff,
                         double width) {
  Radial radial(centres, cutoff, width);
  const std::int64_t n = kinds.size(0), *kind = integers(kinds, n);
  const double *vector = numbers(vectors, 3 * n);
  Tensor result = at::zeros_like(centres);
  double *sums = target(result);
  for (std::int64_t p = 0; p < n; ++p) {
    radial.compute(length(vector + 3 * p), kind[p]);
    for (std::int64_t k = 0; k < radial.count; ++k) sums[kind[p] * radial.count + k] += 0.5 * radial.value[k];
  }
  return result;
}

Tensor crystal_pair_rows(const Tensor &atoms, const Tensor &vectors, const Tensor &kinds, const Tensor &centres,
                         double cutoff, double width, std::int64_t n_centres) {
  Radial radial(centres, cutoff, width);
  const std::int64_t n = kinds.size(0), *atom = integers(atoms, n), *kind = integers(kinds, n);
  const double *vector = numbers(vectors, 3 * n);
  const std::int64_t row = radial.kinds * radial.count;
  Tensor result = at::zeros({n_centres, 3, row}, centres.options());
  double *out = target(result);
  for (std::int64_t p = 0; p < n; ++p) {
    const double *v = vector + 3 * p, r = length(v);
    radial.compute(r, kind[p]);
    for (int a = 0; a < 3; ++a) {
      double *to = out + (3 * atom[p] + a) * row + kind[p] * radial.count;
      for (std::int64_t k = 0; k < radial.count; ++k) to[k] -= v[a] / r * radial.slope[k];
    }
  }
  return result;
}

void crystal_wall(const Tensor &species, const Tensor &first, const Tensor &displacement, const Tensor &counts,
                  const Tensor &columns, const Tensor &limits, std::int64_t power, double height, const Tensor &energy,
                  const Tensor &gradient) {
  const std::int64_t n = species.size(0), sublattices = counts.size(0), sites = columns.size(0);
  const std::int64_t *s = integers(species, n), *edge = integers(first, n + 1), *count = integers(counts, sublattices);
  const std::int64_t *column = integers(columns, sites);
  const double *u = numbers(displacement, 3 * edge[n]), *limit = numbers(limits, sites);
  double *e = target(energy), *g = target(gradient);
  std::vector<std::int64_t> begin(sublattices + 1, 0);
  for (std::int64_t k = 0; k < sublattices; ++k) begin[k + 1] = begin[k] + count[k];
  for (std::int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(s[i] >= 0 && s[i] < sublattices, "ubmd operators: a centre of the crystal has no sublattice");
    for (std::int64_t k = begin[s[i]]; k < begin[s[i] + 1]; ++k) {
      const std::int64_t other = edge[i] + column[k];
      double v[3];
      for (int a = 0; a < 3; ++a) v[a] = u[3 * other + a] - u[3 * edge[i] + a];
      const double size = length(v), excess = size / limit[k] - 1.;
      if (!(excess > 0.)) continue;
      const double steep = std::pow(excess, double(power - 1));
      e[i] += 0.5 * height * steep * excess;
      const double slope = 0.5 * height * double(power) * steep / limit[k] / size;
      add(g + 3 * other, slope, v);
      add(g + 3 * edge[i], -slope, v);
    }
  }
}

}  // namespace ubmd::ops
