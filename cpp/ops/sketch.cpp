// Sketched features of a network and their gradient (python/ubmd/potentials/gmnn/sketch.py), block after block of
// atoms: what is only needed in between stays in the cache.
#include <ATen/Parallel.h>

#include <algorithm>

#include "matrices.h"
#include "operators.h"

namespace ubmd::ops {

using at::Tensor;

namespace {

using Right = std::shared_ptr<const Packed>;

void check(const Tensor &tensor, const char *name, const Tensor &like, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.sizes() == shape && tensor.is_contiguous(),
              "ubmd operators: the sketch needs ", name, " contiguous, of type ", like.scalar_type(), " and shape ",
              shape, ", not ", tensor.scalar_type(), " and ", tensor.sizes());
}

void check_count(std::size_t found, std::size_t wanted, const char *name) {
  TORCH_CHECK(found == wanted, "ubmd operators: the sketch needs ", wanted, " ", name, ", not ", found);
}

// Calls run(begin, rows) for blocks of atoms, in several threads.
template <class Run>
void for_blocks(std::int64_t n, Run run) {
  at::parallel_for(0, n, 8, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin += kRows) run(begin, std::min(kRows, end - begin));
  });
}

// A matrix [n, columns] of which a block begins at row `begin`; one row for all atoms has no step.
template <class F>
struct Rows {
  explicit Rows(const Tensor &tensor, std::int64_t n)
      : data(tensor.const_data_ptr<F>()), columns(tensor.size(1)), step(tensor.size(0) == n ? columns : 0) {}
  const F *at(std::int64_t begin) const { return data + begin * step; }

  const F *data;
  std::int64_t columns, step;
};

// out [rows, columns] = a b, elementwise; b may be one row for all.
template <class F>
void times(std::int64_t begin, std::int64_t rows, const Rows<F> &a, const Rows<F> &b, F *out) {
  const std::int64_t n = rows * a.columns;
  kernels<F>().multiply_elements(n, b.step == 0 ? b.columns : std::max<std::int64_t>(n, 1), a.at(begin), b.at(begin),
                                 out);
}

// out [rows, columns] = left right + add (one row, or one for each, or null).
template <class F>
void product_into(std::int64_t rows, const F *left, const Right &right, const F *add, bool add_rows, F *out) {
  auto task = product_of(rows, left, *right);
  task.add = add;
  task.add_row = add_rows ? right->columns : 0;
  task.out[0] = out;
  multiply(task);
}

// out[k] = (left right + add) factors[k], plus `plus` for k = 0.
template <class F>
void scaled_into(std::int64_t rows, const F *left, const Right &right, const F *add, const F *factor0, const F *factor1,
                 const F *plus, F *out0, F *out1) {
  auto task = product_of(rows, left, *right);
  task.add = add;
  task.add_row = right->columns;
  task.finish = Finish::scale;
  task.factors[0] = factor0, task.factors[1] = factor1, task.plus = plus;
  task.out[0] = out0, task.out[1] = out1;
  multiply(task);
}

}  // namespace

std::vector<Tensor> sketch_features(const Tensor &x0, const Tensor &x1, const Tensor &x2, const Tensor &delta1,
                                    const Tensor &delta2, const Tensor &delta3,
                                    const std::vector<Tensor> &projections) {
  check_count(projections.size(), 8, "projections and biases");
  const Tensor &inner1 = projections[0], &bias1 = projections[1], &outer1 = projections[2], &inner2 = projections[3],
               &bias2 = projections[4], &outer2 = projections[5], &inner3 = projections[6], &bias3 = projections[7];
  TORCH_CHECK(x0.dim() == 2 && x1.dim() == 2 && x2.dim() == 2 && inner1.dim() == 2,
              "ubmd operators: the sketch needs matrices x0, x1, x2 and projections");
  const std::int64_t n = x0.size(0), p = inner1.size(0), n0 = x0.size(1), n1 = x1.size(1), n2 = x2.size(1);
  check(x0, "x0", x0, {n, n0}), check(x1, "x1", x0, {n, n1}), check(x2, "x2", x0, {n, n2});
  check(delta1, "delta1", x0, {n, n1}), check(delta2, "delta2", x0, {n, n2}), check(delta3, "delta3", x0, {n, 1});
  check(inner1, "inner1", x0, {p, n0}), check(inner2, "inner2", x0, {p, n1}), check(inner3, "inner3", x0, {p, n2});
  check(outer1, "outer1", x0, {p, n1}), check(outer2, "outer2", x0, {p, n2});
  for (const Tensor *bias : {&bias1, &bias2, &bias3}) check(*bias, "a bias", x0, {p});
  // the factors, which a bias keeps, in one piece of memory
  std::vector<Tensor> out = at::empty({4, n, p}, x0.options()).unbind();
  out.insert(out.begin(), at::empty({n, p}, x0.options()));
  AT_DISPATCH_FLOATING_TYPES(x0.scalar_type(), "ubmd::sketch_features", [&] {
    using F = scalar_t;
    const Right right[5] = {packed(inner1.t()), packed(outer1.t()), packed(inner2.t()), packed(outer2.t()),
                            packed(inner3.t())};
    const Rows<F> left[5] = {Rows<F>(x0, n), Rows<F>(delta1, n), Rows<F>(x1, n), Rows<F>(delta2, n), Rows<F>(x2, n)};
    const F *bias[5] = {bias1.const_data_ptr<F>(), nullptr, bias2.const_data_ptr<F>(), nullptr,
                        bias3.const_data_ptr<F>()};
    const F *delta = delta3.const_data_ptr<F>();
    F *to[5];  // of phi last
    for (int k = 0; k < 5; ++k) to[k] = out[(k + 1) % 5].template mutable_data_ptr<F>();
    for_blocks(n, [&](std::int64_t begin, std::int64_t rows) {
      for (int k = 0; k < 5; ++k)
        product_into(rows, left[k].data + begin * left[k].columns, right[k], bias[k], false, to[k] + begin * p);
      for (std::int64_t i = begin; i < begin + rows; ++i)
        for (std::int64_t j = i * p; j < (i + 1) * p; ++j)
          to[4][j] = to[4][j] * delta[i] + to[0][j] * to[1][j] + to[2][j] * to[3][j];
    });
  });
  return out;
}

Tensor sketch_gradient(const std::vector<Tensor> &layers, const std::vector<Tensor> &factors, const Tensor &w,
                       const Tensor &last, const std::vector<Tensor> &projections, const Tensor &weight1,
                       const Tensor &weight2) {
  check_count(layers.size(), 5, "layers");
  check_count(factors.size(), 4, "factors");
  check_count(projections.size(), 4, "projections");
  const Tensor &s1 = layers[0], &s2 = layers[1], &curvature1 = layers[2], &curvature2 = layers[3], &delta3 = layers[4];
  const Tensor &outer1 = projections[0], &inner1 = projections[1], &outer2 = projections[2], &inner2 = projections[3];
  TORCH_CHECK(weight1.dim() == 2 && weight2.dim() == 2 && outer1.dim() == 2 && w.dim() == 2 && last.dim() == 2,
              "ubmd operators: the sketch needs matrices w, last, weights and projections");
  const std::int64_t n = s1.size(0), p = outer1.size(0), n0 = weight1.size(1), n1 = weight1.size(0),
                     n2 = weight2.size(0);
  check(s1, "s1", weight1, {n, n1}), check(curvature1, "curvature1", weight1, {n, n1});
  check(s2, "s2", weight1, {n, n2}), check(curvature2, "curvature2", weight1, {n, n2});
  check(delta3, "delta3", weight1, {n, 1}), check(weight2, "weight2", weight1, {n2, n1});
  check(outer1, "outer1", weight1, {p, n1}), check(inner1, "inner1", weight1, {p, n0});
  check(outer2, "outer2", weight1, {p, n2}), check(inner2, "inner2", weight1, {p, n1});
  for (const Tensor &factor : factors) check(factor, "a factor", weight1, {n, p});
  check(w, "w", weight1, {w.size(0) == n ? n : 1, p});
  check(last, "last", weight1, {last.size(0) == n ? n : 1, n2});
  Tensor out = at::empty({n, n0}, weight1.options());
  AT_DISPATCH_FLOATING_TYPES(weight1.scalar_type(), "ubmd::sketch_gradient", [&] {
    using F = scalar_t;
    const Right to_z1 = packed(outer1), to_z2 = packed(outer2), to_x1 = packed(inner2), to_x0 = packed(inner1),
                forward2 = packed(weight2.t()), backward2 = packed(weight2), backward1 = packed(weight1);
    const Rows<F> inner1_(factors[0], n), outer1_(factors[1], n), inner2_(factors[2], n), outer2_(factors[3], n),
        weights(w, n), lasts(last, n), slopes2(s2, n);
    const F *slope1 = s1.const_data_ptr<F>(), *bend1 = curvature1.const_data_ptr<F>(),
            *bend2 = curvature2.const_data_ptr<F>(), *delta = delta3.const_data_ptr<F>();
    F *result = out.mutable_data_ptr<F>();
    const std::int64_t widest = std::max({p, n0, n1, n2});
    for_blocks(n, [&](std::int64_t begin, std::int64_t rows) {
      const Tensor scratch = at::empty({5 * rows * widest}, weight1.options());
      F *weighted = scratch.mutable_data_ptr<F>(), *a = weighted + rows * widest, *b = a + rows * widest,
        *c = b + rows * widest, *base = c + rows * widest;
      // a = s1 zdot1, b = t1 dE/dx1 zdot1 with zdot1 = (inner1 w) P_out^1
      times(begin, rows, inner1_, weights, weighted);
      scaled_into<F>(rows, weighted, to_z1, nullptr, slope1 + begin * n1, bend1 + begin * n1, nullptr, a, b);
      // c = zbar2 = (W2 a + base2) t2 dE/dx2 + s2 delta3 last
      times(begin, rows, slopes2, lasts, c);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = i * n2; j < (i + 1) * n2; ++j) c[j] *= delta[begin + i];
      times(begin, rows, inner2_, weights, weighted);
      product_into<F>(rows, weighted, to_z2, nullptr, false, base);
      scaled_into<F>(rows, a, forward2, base, bend2 + begin * n2, nullptr, c, c, nullptr);
      // b = zbar1 = s1 (W2^T zbar2 + base1) + b
      times(begin, rows, outer2_, weights, weighted);
      product_into<F>(rows, weighted, to_x1, nullptr, false, base);
      scaled_into<F>(rows, c, backward2, base, slope1 + begin * n1, nullptr, b, b, nullptr);
      // W1^T zbar1 + base0
      times(begin, rows, outer1_, weights, weighted);
      product_into<F>(rows, weighted, to_x0, nullptr, false, base);
      product_into<F>(rows, b, backward1, base, true, result + begin * n0);
    });
  });
  return out;
}

}  // namespace ubmd::ops
