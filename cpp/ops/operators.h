// The operators as functions on tensors; see operators.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ubmd::ops {

// A graph of directed pairs, checked and contiguous, with the coefficients B in the layouts of the kernels.
// species [n], first [n + 1], neighbours [P] (elements) are int64; vectors [P, 3] float64 or float32; radial is
// B [Z, Z, N_r, N_b] and gives the type in which everything is computed.
struct Pairs {
  Pairs(const at::Tensor &species, const at::Tensor &first, const at::Tensor &neighbours, const at::Tensor &vectors,
        const at::Tensor &radial, double cutoff, double r_min);

  at::Tensor species, first, neighbours, vectors, radial;
  double cutoff, r_min;

  std::int64_t n_centres() const { return species.size(0); }
  std::int64_t n_pairs() const { return vectors.size(0); }
};

at::Tensor moments(const Pairs &pairs);
at::Tensor moments_vjp(const Pairs &pairs, const at::Tensor &cotangent);
at::Tensor moments_jvp(const Pairs &pairs, const at::Tensor &tangent);
std::tuple<at::Tensor, at::Tensor> moments_second(const Pairs &pairs, const at::Tensor &tangent,
                                                  const at::Tensor &cotangent, const at::Tensor &tangent_cotangent,
                                                  bool want_vectors, bool want_radial);
at::Tensor invariants(const at::Tensor &moments, std::int64_t n_radial);
at::Tensor invariants_vjp(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &cotangent);
at::Tensor invariants_jvp(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &tangent);
at::Tensor invariants_second(const at::Tensor &moments, std::int64_t n_radial, const at::Tensor &tangent,
                             const at::Tensor &cotangent, const at::Tensor &tangent_cotangent);
std::vector<at::Tensor> activation(const at::Tensor &z, std::int64_t order);
at::Tensor product(const at::Tensor &left, const at::Tensor &right, const std::optional<at::Tensor> &add);
// Two hidden layers and one output: of x0 [n, F], weights [d, d below], biases [d] and dE/dy = delta3 [n, 1] these
// results: y [n], dE/dx0 [n, F], and to `keep` x1, x2, s1, s2, delta1, delta2, curvature1, curvature2 [n, d]: values
// and slopes of the layers, dE/dz, and the activation's second derivative times dE/dx; `for_bias`: z2 in place of s2,
// and no curvature2.
std::vector<at::Tensor> network(const at::Tensor &x0, const at::Tensor &delta3, const at::Tensor &weight1,
                                const at::Tensor &bias1, const at::Tensor &weight2, const at::Tensor &bias2,
                                const at::Tensor &weight3, const at::Tensor &bias3, bool keep, bool for_bias);
// s2 and curvature2 of that network from z2 [n, d], dE/dy = delta3 [n, 1] and weight3 [1, d].
std::vector<at::Tensor> second_layer(const at::Tensor &z2, const at::Tensor &delta3, const at::Tensor &weight3);
// Sketched features of that network, with projections inner1 [p, F], inner2, inner3 [p, d] and their biases [p],
// outer1, outer2 [p, d]: phi [n, p] and its factors inner1, outer1, inner2, outer2 [n, p].
std::vector<at::Tensor> sketch_features(const at::Tensor &x0, const at::Tensor &x1, const at::Tensor &x2,
                                        const at::Tensor &delta1, const at::Tensor &delta2, const at::Tensor &delta3,
                                        const std::vector<at::Tensor> &projections);
// d(sum_i w·phi_i)/dx0 [n, F] from the network's kept results, the features' factors [n, p], w [1, p] or [n, p], `last`
// = w inner3 [1, d] or [n, d], the projections outer1, inner1, outer2, inner2 and the weights of both hidden layers.
at::Tensor sketch_gradient(const std::vector<at::Tensor> &layers, const std::vector<at::Tensor> &factors,
                           const at::Tensor &w, const at::Tensor &last, const std::vector<at::Tensor> &projections,
                           const at::Tensor &weight1, const at::Tensor &weight2);

// Crystals: species [n] are sublattices, displacement [P, 3] those of each centre's relative sites; clusters.cpp lists
// the tables. Energies [n] and the gradient of their sum [P, 3] for coefficients [C]; the derivatives of the energies'
// sum by all coefficients [C]; coefficients of parameters [p], and the transposed map; the largest standard deviation
// [n] of each centre's force components for parameters with the covariance W W^T. The last rows of W may belong to
// parameters of another part of the energy: `others` [n, 3, P] are its derivatives by each centre's displacement.
std::tuple<at::Tensor, at::Tensor> crystal_energies(const at::Tensor &species, const at::Tensor &first,
                                                    const at::Tensor &displacement, const at::Tensor &coefficients,
                                                    const std::vector<at::Tensor> &tables);
at::Tensor crystal_moments(const at::Tensor &species, const at::Tensor &first, const at::Tensor &displacement,
                           const std::vector<at::Tensor> &tables);
at::Tensor crystal_expand(const at::Tensor &parameters, const std::vector<at::Tensor> &tables);
at::Tensor crystal_reduce(const at::Tensor &moments, const std::vector<at::Tensor> &tables);
at::Tensor crystal_deviations(const at::Tensor &species, const at::Tensor &first, const at::Tensor &displacement,
                              const at::Tensor &factor, bool triangular, const std::vector<at::Tensor> &tables,
                              const std::optional<at::Tensor> &others);
// sqrt(|z|^2 + tiny^2) and z = W^T phi; and its gradient by phi.
std::tuple<at::Tensor, at::Tensor> crystal_deviation(const at::Tensor &phi, const at::Tensor &factor, bool triangular,
                                                     double tiny);
at::Tensor crystal_deviation_gradient(const at::Tensor &factor, bool triangular, const at::Tensor &deviation,
                                      const at::Tensor &z);

// Pairs of a crystal by their true distance. Relative sites of all sublattices, one after the other, counts [S] of
// each: places [N, 3] from the centre and kinds of pair [N] (-1: none). Near pairs, each seen from both atoms: edges to
// the other atom and to the centre itself [E], centre [E], vector [E, 3], kind [E]. Energies [n] and gradient [P, 3]
// are added to what is there; core [T] are radii of a repulsion strength (radius/r - 1)^3, 0 for none. Sums [T, K] of
// the functions; derivatives [n, 3, T K] of the energy by each centre's displacement and the weights.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> crystal_near(
    const at::Tensor &species, const at::Tensor &first, const at::Tensor &displacement, const at::Tensor &counts,
    const at::Tensor &places, const at::Tensor &kinds, double cutoff);
void crystal_pair_energies(const at::Tensor &edges, const at::Tensor &owns, const at::Tensor &atoms,
                           const at::Tensor &vectors, const at::Tensor &kinds, const at::Tensor &centres,
                           const at::Tensor &weights, const at::Tensor &core, double cutoff, double width,
                           double strength, const at::Tensor &energy, const at::Tensor &gradient);
at::Tensor crystal_pair_sums(const at::Tensor &vectors, const at::Tensor &kinds, const at::Tensor &centres,
                             double cutoff, double width);
at::Tensor crystal_pair_rows(const at::Tensor &atoms, const at::Tensor &vectors, const at::Tensor &kinds,
                             const at::Tensor &centres, double cutoff, double width, std::int64_t n_centres);
// Adds height (|u_j - u_i|/limit - 1)^power, half of it to each atom, for relative sites at some columns; counts [S],
// columns and limits [N] as above.
void crystal_wall(const at::Tensor &species, const at::Tensor &first, const at::Tensor &displacement,
                  const at::Tensor &counts, const at::Tensor &columns, const at::Tensor &limits, std::int64_t power,
                  double height, const at::Tensor &energy, const at::Tensor &gradient);

}  // namespace ubmd::ops
