// The network of a model in one operator: block after block of atoms through all its products, so that what is only
// needed in between stays in the cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

#include "matrices.h"
#include "operators.h"

namespace ubmd::ops {

using at::Tensor;

namespace {

Tensor expect(const Tensor &tensor, const char *name, const Tensor &like, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.sizes() == shape, "ubmd operators: network needs ",
              name, " of type ", like.scalar_type(), " and shape ", shape, ", not ", tensor.scalar_type(), " and ",
              tensor.sizes());
  return tensor.contiguous();
}

// What one call computes, for n atoms: y [n], dE/dx0 [n, F]; and unless these are only needed in between x, slopes,
// delta and curvatures [n, d] of both hidden layers. For a bias, z of the second layer is in the place of its slopes,
// and its curvatures are left out.
enum Result { y, slope, x1, x2, s1, s2, delta1, delta2, curvature1, curvature2, n_results };

using Widths = std::array<std::int64_t, n_results>;

template <class F>
struct Network {
  std::shared_ptr<const Packed> forward1, forward2, backward2, backward1;
  const F *bias1, *bias2, *weight3, *x0, *delta3;
  F bias3;
  std::int64_t n_inputs, n_hidden1, n_hidden2;
  bool for_bias;
};

// Atoms begin .. begin + n - 1, whose results start at the pointers; curvatures may be null, slopes may share their
// memory with delta.
template <class F>
void run_block(const Network<F> &net, std::int64_t begin, std::int64_t n, F *const (&out)[n_results]) {
  auto layer1 = product_of(n, net.x0 + begin * net.n_inputs, *net.forward1);
  layer1.add = net.bias1;
  layer1.finish = Finish::activate;
  layer1.out[0] = out[x1], layer1.out[1] = out[s1], layer1.out[2] = out[curvature1];
  multiply(layer1);
  auto layer2 = product_of(n, static_cast<const F *>(out[x1]), *net.forward2);
  layer2.add = net.bias2;
  if (net.for_bias) {
    layer2.out[0] = out[s2];
    multiply(layer2);
    kernels<F>().activation(n * net.n_hidden2, out[s2], out[x2], out[delta2], nullptr);
  } else {
    layer2.finish = Finish::activate;
    layer2.out[0] = out[x2], layer2.out[1] = out[delta2], layer2.out[2] = out[curvature2];
    multiply(layer2);
    if (out[s2] != out[delta2]) std::copy_n(out[delta2], n * net.n_hidden2, out[s2]);
  }
  kernels<F>().last_layer(n, net.n_hidden2, out[x2], net.weight3, net.bias3, net.delta3 + begin, out[y], out[delta2],
                          out[curvature2]);
  auto back2 = product_of(n, static_cast<const F *>(out[delta2]), *net.backward2);
  back2.finish = Finish::scale;
  back2.factors[0] = out[s1], back2.factors[1] = out[curvature1];
  back2.out[0] = out[delta1], back2.out[1] = out[curvature1];
  multiply(back2);
  auto back1 = product_of(n, static_cast<const F *>(out[delta1]), *net.backward1);
  back1.out[0] = out[slope];
  multiply(back1);
}

// Rows of the results from atom `begin` on; without `keep` hidden layers are in scratch memory of one block.
template <class F>
void run_blocks(const Network<F> &net, std::vector<Tensor> &results, const Widths &widths, bool keep,
                std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = std::min(kRows, end - begin), size = rows * std::max(net.n_hidden1, net.n_hidden2);
  const Tensor scratch = keep ? Tensor() : at::empty({4 * size}, results[y].options());
  for (; begin < end; begin += rows) {
    F *out[n_results] = {};
    for (std::size_t k = 0; k < results.size(); ++k)
      out[k] = results[k].template mutable_data_ptr<F>() + begin * widths[k];
    if (!keep) {
      F *memory = scratch.mutable_data_ptr<F>();
      out[x1] = memory;
      out[s1] = out[delta1] = memory + size;
      out[x2] = memory + 2 * size;
      out[s2] = out[delta2] = memory + 3 * size;
    }
    run_block(net, begin, std::min(rows, end - begin), out);
  }
}

// Some of the results [n, width], one after the other in memory: what is freed at the same time leaves no gaps.
void allocate(std::vector<Tensor> &results, std::initializer_list<Result> which, const Widths &widths, std::int64_t n,
              const Tensor &like) {
  std::int64_t size = 0, offset = 0;
  for (Result k : which) size += n * widths[k];
  const Tensor memory = at::empty({size}, like.options());
  for (Result k : which) {
    results[k] = memory.narrow(0, offset, n * widths[k]).view({n, widths[k]});
    offset += n * widths[k];
  }
}

}  // namespace

std::vector<Tensor> network(const Tensor &x0, const Tensor &delta3, const Tensor &weight1, const Tensor &bias1,
                            const Tensor &weight2, const Tensor &bias2, const Tensor &weight3, const Tensor &bias3,
                            bool keep, bool for_bias) {
  TORCH_CHECK(x0.dim() == 2 && weight1.dim() == 2 && weight2.dim() == 2,
              "ubmd operators: network needs matrices x0, weight1 and weight2");
  const std::int64_t n = x0.size(0), n_inputs = x0.size(1), n1 = weight1.size(0), n2 = weight2.size(0);
  expect(weight1, "weight1", x0, {n1, n_inputs});
  expect(weight2, "weight2", x0, {n2, n1});
  const Tensor inputs = x0.contiguous(), above = expect(delta3, "delta3", x0, {n, 1}),
               b1 = expect(bias1, "bias1", x0, {n1}), b2 = expect(bias2, "bias2", x0, {n2}),
               w3 = expect(weight3, "weight3", x0, {1, n2}), b3 = expect(bias3, "bias3", x0, {1});
  std::vector<Tensor> results = {at::empty({n}, x0.options()), at::empty({n, n_inputs}, x0.options())};
  const Widths widths = {1, n_inputs, n1, n2, n1, n2, n1, n2, n1, n2};
  if (keep) {
    results.resize(for_bias ? curvature2 : n_results);
    allocate(results, {s1, s2, curvature1}, widths, n, x0);  // what every bias keeps
    allocate(results, {x1, delta1, delta2}, widths, n, x0);  // and one by structure
    allocate(results, {x2}, widths, n, x0);
    if (!for_bias) allocate(results, {curvature2}, widths, n, x0);
  }
  AT_DISPATCH_FLOATING_TYPES(x0.scalar_type(), "ubmd::network", [&] {
    const Network<scalar_t> net{packed(weight1.t()),
                                packed(weight2.t()),
                                packed(weight2),
                                packed(weight1),
                                b1.const_data_ptr<scalar_t>(),
                                b2.const_data_ptr<scalar_t>(),
                                w3.const_data_ptr<scalar_t>(),
                                inputs.const_data_ptr<scalar_t>(),
                                above.const_data_ptr<scalar_t>(),
                                *b3.const_data_ptr<scalar_t>(),
                                n_inputs,
                                n1,
                                n2,
                                keep && for_bias};
    at::parallel_for(0, n, 8,
                     [&](std::int64_t begin, std::int64_t end) { run_blocks(net, results, widths, keep, begin, end); });
  });
  return results;
}

std::vector<Tensor> second_layer(const Tensor &z2, const Tensor &delta3, const Tensor &weight3) {
  TORCH_CHECK(z2.dim() == 2, "ubmd operators: network needs a matrix z2");
  const std::int64_t n = z2.size(0), width = z2.size(1);
  const Tensor z = z2.contiguous(), delta = expect(delta3, "delta3", z2, {n, 1}),
               weight = expect(weight3, "weight3", z2, {1, width});
  const Tensor slopes = at::empty_like(z), curvatures = at::empty_like(z);
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "ubmd::second_layer", [&] {
    const scalar_t *from = z.const_data_ptr<scalar_t>(), *d = delta.const_data_ptr<scalar_t>(),
                   *w = weight.const_data_ptr<scalar_t>();
    scalar_t *s = slopes.mutable_data_ptr<scalar_t>(), *t = curvatures.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n, 32, [&](std::int64_t begin, std::int64_t end) {
      std::vector<scalar_t> values(width);  // of no use here
      for (std::int64_t i = begin; i < end; ++i) {
        kernels<scalar_t>().activation(width, from + i * width, values.data(), s + i * width, t + i * width);
        for (std::int64_t k = 0; k < width; ++k) t[i * width + k] *= d[i] * w[k];
      }
    });
  });
  return {slopes, curvatures};
}

}  // namespace ubmd::ops
