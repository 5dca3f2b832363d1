// The operators torch.ops.ubmd.*, and the differentiable one.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "operators.h"

namespace ubmd::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// A tensor that was computed without autograd: it depends on `sources`, but can't be differentiated any further.
class Undifferentiable : public Function<Undifferentiable> {
 public:
  static Tensor forward(AutogradContext *, const Tensor &value, const Tensor &, const Tensor &, const Tensor &,
                        const Tensor &) {
    return value.alias();
  }
  static variable_list backward(AutogradContext *, const variable_list &) {
    TORCH_CHECK(false,
                "this result of ubmd's operators can't be differentiated again: of ubmd::gaussian_moments only second "
                "derivatives with at most one with respect to radial are implemented, of ubmd::crystal_deviation only "
                "first ones; use a model without operators for others");
  }
};

Tensor end_of_derivatives(const Tensor &value, const variable_list &sources) {
  if (!value.defined() || !at::GradMode::is_enabled()) return value;
  return Undifferentiable::apply(value, sources[0], sources[1], sources[2], sources[3]);
}

Pairs pairs_of(const variable_list &saved, AutogradContext *context) {
  return Pairs(saved[0], saved[1], saved[2], saved[3], saved[4], context->saved_data["cutoff"].toDouble(),
               context->saved_data["r_min"].toDouble());
}

void save(AutogradContext *context, const variable_list &tensors, double cutoff, double r_min) {
  context->save_for_backward(tensors);
  context->saved_data["cutoff"] = cutoff;
  context->saved_data["r_min"] = r_min;
}

// Gradient of sum(cotangent * G) with respect to the vectors, [P, 3] in their type.
class VectorGradient : public Function<VectorGradient> {
 public:
  static Tensor forward(AutogradContext *context, const Tensor &species, const Tensor &first, const Tensor &neighbours,
                        const Tensor &vectors, const Tensor &radial, double cutoff, double r_min, const Tensor &moments,
                        const Tensor &cotangent) {
    save(context, {species, first, neighbours, vectors, radial, moments, cotangent}, cutoff, r_min);
    const Pairs pairs(species, first, neighbours, vectors, radial, cutoff, r_min);
    return moments_vjp(pairs, invariants_vjp(moments, radial.size(2), cotangent)).to(vectors.scalar_type());
  }

  // With q the cotangent of this gradient: q * gradient = cotangent * dG(q), which is differentiated.
  static variable_list backward(AutogradContext *context, const variable_list &outputs) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &q = outputs[0], &vectors = saved[3], &radial = saved[4], &moments = saved[5], &cotangent = saved[6];
    const bool want_vectors = context->needs_input_grad(3), want_radial = context->needs_input_grad(4),
               want_cotangent = context->needs_input_grad(6);  // counted among the tensors
    Tensor vectors_bar, radial_bar, cotangent_bar;
    {
      at::NoGradGuard no_grad;
      const std::int64_t n_radial = radial.size(2);
      const Pairs pairs = pairs_of(saved, context);
      const Tensor tangent = moments_jvp(pairs, q);
      if (want_cotangent) cotangent_bar = invariants_jvp(moments, n_radial, tangent);
      if (want_vectors || want_radial) {
        const Tensor first = invariants_second(moments, n_radial, tangent, at::zeros_like(cotangent), cotangent);
        const Tensor second = invariants_vjp(moments, n_radial, cotangent);
        std::tie(vectors_bar, radial_bar) = moments_second(pairs, q, first, second, want_vectors, want_radial);
      }
    }
    const variable_list sources = {q, vectors, radial, cotangent};
    if (want_vectors) vectors_bar = end_of_derivatives(vectors_bar.to(vectors.scalar_type()), sources);
    return {Variable(),
            Variable(),
            Variable(),
            want_vectors ? vectors_bar : Variable(),
            want_radial ? end_of_derivatives(radial_bar, sources) : Variable(),
            Variable(),
            Variable(),
            Variable(),
            want_cotangent ? end_of_derivatives(cotangent_bar, sources) : Variable()};
  }
};

class GaussianMoments : public Function<GaussianMoments> {
 public:
  static Tensor forward(AutogradContext *context, const Tensor &species, const Tensor &first, const Tensor &neighbours,
                        const Tensor &vectors, const Tensor &radial, double cutoff, double r_min) {
    const Tensor moments = ops::moments(Pairs(species, first, neighbours, vectors, radial, cutoff, r_min));
    save(context, {species, first, neighbours, vectors, radial, moments}, cutoff, r_min);
    return invariants(moments, radial.size(2));
  }

  static variable_list backward(AutogradContext *context, const variable_list &outputs) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &cotangent = outputs[0], &vectors = saved[3], &radial = saved[4], &moments = saved[5];
    const double cutoff = context->saved_data["cutoff"].toDouble(), r_min = context->saved_data["r_min"].toDouble();
    Tensor vectors_bar, radial_bar;
    if (context->needs_input_grad(3))
      vectors_bar =
          VectorGradient::apply(saved[0], saved[1], saved[2], vectors, radial, cutoff, r_min, moments, cotangent);
    if (context->needs_input_grad(4)) {
      {
        at::NoGradGuard no_grad;
        const Tensor bar = invariants_vjp(moments, radial.size(2), cotangent);
        radial_bar =
            std::get<1>(moments_second(pairs_of(saved, context), at::empty({0}), bar, at::empty({0}), false, true));
      }
      radial_bar = end_of_derivatives(radial_bar, {cotangent, vectors, radial, radial});
    }
    return {Variable(), Variable(), Variable(), vectors_bar, radial_bar, Variable(), Variable()};
  }
};

Tensor gaussian_moments(const Tensor &species, const Tensor &first, const Tensor &neighbours, const Tensor &vectors,
                        const Tensor &radial, double cutoff, double r_min) {
  return GaussianMoments::apply(species, first, neighbours, vectors, radial, cutoff, r_min);
}

Tensor gaussian_moments_plain(const Tensor &species, const Tensor &first, const Tensor &neighbours,
                              const Tensor &vectors, const Tensor &radial, double cutoff, double r_min) {
  return invariants(moments(Pairs(species, first, neighbours, vectors, radial, cutoff, r_min)), radial.size(2));
}

class Deviation : public Function<Deviation> {
 public:
  static Tensor forward(AutogradContext *context, const Tensor &phi, const Tensor &factor, bool triangular,
                        double tiny) {
    const auto [deviation, z] = crystal_deviation(phi, factor, triangular, tiny);
    context->save_for_backward({phi, factor, deviation, z});
    context->saved_data["triangular"] = triangular;
    return deviation;
  }

  static variable_list backward(AutogradContext *context, const variable_list &outputs) {
    const variable_list saved = context->get_saved_variables();
    Tensor gradient;
    {
      at::NoGradGuard no_grad;
      const bool triangular = context->saved_data["triangular"].toBool();
      gradient = crystal_deviation_gradient(saved[1], triangular, saved[2], saved[3]).mul_(outputs[0]);
    }
    return {end_of_derivatives(gradient, {saved[0], saved[0], saved[0], outputs[0]}), Variable(), Variable(),
            Variable()};
  }
};

Tensor deviation(const Tensor &phi, const Tensor &factor, bool triangular, double tiny) {
  return Deviation::apply(phi, factor, triangular, tiny);
}
Tensor deviation_plain(const Tensor &phi, const Tensor &factor, bool triangular, double tiny) {
  return std::get<0>(crystal_deviation(phi, factor, triangular, tiny));
}

// Plain torch for what the kernels are not made for: derivatives, and tensors that are not on the processor.
Tensor product_plain(const Tensor &left, const Tensor &right, const std::optional<Tensor> &add) {
  return add ? at::addmm(*add, left, right) : at::mm(left, right);
}
std::vector<Tensor> activation_plain(const Tensor &z, std::int64_t order) {
  constexpr double scale = 1.6765324703310907;
  const Tensor sigmoid = at::sigmoid(z), x = z * sigmoid, rest = 1.0 - sigmoid;
  std::vector<Tensor> results = {scale * x, scale * (sigmoid + x * rest)};
  if (order > 1) results.push_back((scale * sigmoid * rest) * (2.0 + z * (1.0 - 2.0 * sigmoid)));
  return results;
}

bool differentiated(const Tensor &tensor) {
  return tensor.requires_grad() && at::GradMode::is_enabled();
}
Tensor product_autograd(const Tensor &left, const Tensor &right, const std::optional<Tensor> &add) {
  if (differentiated(left) || differentiated(right) || (add && differentiated(*add)))
    return product_plain(left, right, add);
  const at::AutoDispatchBelowADInplaceOrView below;
  return product(left, right, add);
}
std::vector<Tensor> activation_autograd(const Tensor &z, std::int64_t order) {
  if (differentiated(z)) return activation_plain(z, order);
  const at::AutoDispatchBelowADInplaceOrView below;
  return activation(z, order);
}

#define UBMD_PAIRS                                                                                                   \
  const Tensor &species, const Tensor &first, const Tensor &neighbours, const Tensor &vectors, const Tensor &radial, \
      double cutoff, double r_min
#define UBMD_PAIRS_GIVEN Pairs(species, first, neighbours, vectors, radial, cutoff, r_min)

Tensor call_moments(UBMD_PAIRS) {
  return moments(UBMD_PAIRS_GIVEN);
}
Tensor call_moments_vjp(UBMD_PAIRS, const Tensor &cotangent) {
  return moments_vjp(UBMD_PAIRS_GIVEN, cotangent);
}
Tensor call_moments_jvp(UBMD_PAIRS, const Tensor &tangent) {
  return moments_jvp(UBMD_PAIRS_GIVEN, tangent);
}
std::tuple<Tensor, Tensor> call_moments_second(UBMD_PAIRS, const Tensor &tangent, const Tensor &cotangent,
                                               const Tensor &tangent_cotangent, bool want_vectors, bool want_radial) {
  return moments_second(UBMD_PAIRS_GIVEN, tangent, cotangent, tangent_cotangent, want_vectors, want_radial);
}

std::string on_pairs(const std::string &name, const std::string &more, const std::string &result) {
  return name + "(Tensor species, Tensor first, Tensor neighbours, Tensor vectors, Tensor radial, float cutoff, " +
         "float r_min" + more + ") -> " + result;
}

std::vector<Tensor> call_sketch_features(const Tensor &x0, const Tensor &x1, const Tensor &x2, const Tensor &delta1,
                                         const Tensor &delta2, const Tensor &delta3, at::TensorList projections) {
  return sketch_features(x0, x1, x2, delta1, delta2, delta3, projections.vec());
}
Tensor call_sketch_gradient(at::TensorList layers, at::TensorList factors, const Tensor &w, const Tensor &last,
                            at::TensorList projections, const Tensor &weight1, const Tensor &weight2) {
  return sketch_gradient(layers.vec(), factors.vec(), w, last, projections.vec(), weight1, weight2);
}

#define UBMD_SITES const Tensor &species, const Tensor &first, const Tensor &displacement

std::tuple<Tensor, Tensor> call_crystal_energies(UBMD_SITES, const Tensor &coefficients, at::TensorList tables) {
  return crystal_energies(species, first, displacement, coefficients, tables.vec());
}
Tensor call_crystal_moments(UBMD_SITES, at::TensorList tables) {
  return crystal_moments(species, first, displacement, tables.vec());
}
Tensor call_crystal_deviations(UBMD_SITES, const Tensor &factor, bool triangular, at::TensorList tables,
                               const std::optional<Tensor> &others) {
  return crystal_deviations(species, first, displacement, factor, triangular, tables.vec(), others);
}
Tensor call_crystal_expand(const Tensor &parameters, at::TensorList tables) {
  return crystal_expand(parameters, tables.vec());
}
Tensor call_crystal_reduce(const Tensor &moments, at::TensorList tables) {
  return crystal_reduce(moments, tables.vec());
}

}  // namespace

TORCH_LIBRARY(ubmd, library) {
  library.def(on_pairs("moments", "", "Tensor").c_str());
  library.def(on_pairs("moments_vjp", ", Tensor cotangent", "Tensor").c_str());
  library.def(on_pairs("moments_jvp", ", Tensor tangent", "Tensor").c_str());
  library.def(
      on_pairs("moments_second",
               ", Tensor tangent, Tensor cotangent, Tensor tangent_cotangent, bool want_vectors, bool want_radial",
               "(Tensor, Tensor)")
          .c_str());
  library.def(on_pairs("gaussian_moments", "", "Tensor").c_str());
  library.def("invariants(Tensor moments, int n_radial) -> Tensor");
  library.def("invariants_vjp(Tensor moments, int n_radial, Tensor cotangent) -> Tensor");
  library.def("invariants_jvp(Tensor moments, int n_radial, Tensor tangent) -> Tensor");
  library.def(
      "invariants_second(Tensor moments, int n_radial, Tensor tangent, Tensor cotangent, Tensor tangent_cotangent) -> "
      "Tensor");
  library.def("activation(Tensor z, int order) -> Tensor[]");
  library.def("product(Tensor left, Tensor right, Tensor? add=None) -> Tensor");
  library.def(
      "network(Tensor x0, Tensor delta3, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3, "
      "Tensor bias3, bool keep, bool for_bias=False) -> Tensor[]");
  library.def("second_layer(Tensor z2, Tensor delta3, Tensor weight3) -> Tensor[]");
  library.def(
      "sketch_features(Tensor x0, Tensor x1, Tensor x2, Tensor delta1, Tensor delta2, Tensor delta3, "
      "Tensor[] projections) -> Tensor[]");
  library.def(
      "sketch_gradient(Tensor[] layers, Tensor[] factors, Tensor w, Tensor last, Tensor[] projections, Tensor weight1, "
      "Tensor weight2) -> Tensor");
  const std::string sites = "(Tensor species, Tensor first, Tensor displacement, ";
  library.def(("crystal_energies" + sites + "Tensor coefficients, Tensor[] tables) -> (Tensor, Tensor)").c_str());
  library.def(("crystal_moments" + sites + "Tensor[] tables) -> Tensor").c_str());
  library.def(
      ("crystal_deviations" + sites + "Tensor factor, bool triangular, Tensor[] tables, Tensor? others=None) -> Tensor")
          .c_str());
  library.def("crystal_expand(Tensor parameters, Tensor[] tables) -> Tensor");
  library.def("crystal_reduce(Tensor moments, Tensor[] tables) -> Tensor");
  library.def("crystal_deviation(Tensor phi, Tensor factor, bool triangular, float tiny) -> Tensor");
  library.def(("crystal_near" + sites +
               "Tensor counts, Tensor places, Tensor kinds, float cutoff) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
                  .c_str());
  library.def(
      "crystal_pair_energies(Tensor edges, Tensor owns, Tensor atoms, Tensor vectors, Tensor kinds, Tensor centres, "
      "Tensor weights, Tensor core, float cutoff, float width, float strength, Tensor(a!) energy, Tensor(b!) gradient) "
      "-> ()");
  library.def("crystal_pair_sums(Tensor vectors, Tensor kinds, Tensor centres, float cutoff, float width) -> Tensor");
  library.def(
      "crystal_pair_rows(Tensor atoms, Tensor vectors, Tensor kinds, Tensor centres, float cutoff, float width, "
      "int n_centres) -> Tensor");
  library.def(("crystal_wall" + sites +
               "Tensor counts, Tensor columns, Tensor limits, int power, float height, Tensor(a!) energy, "
               "Tensor(b!) gradient) -> ()")
                  .c_str());
}

TORCH_LIBRARY_IMPL(ubmd, CPU, library) {
  library.impl("moments", call_moments);
  library.impl("moments_vjp", call_moments_vjp);
  library.impl("moments_jvp", call_moments_jvp);
  library.impl("moments_second", call_moments_second);
  library.impl("gaussian_moments", gaussian_moments_plain);
  library.impl("invariants", invariants);
  library.impl("invariants_vjp", invariants_vjp);
  library.impl("invariants_jvp", invariants_jvp);
  library.impl("invariants_second", invariants_second);
  library.impl("activation", activation);
  library.impl("product", product);
  library.impl("network", network);
  library.impl("second_layer", second_layer);
  library.impl("sketch_features", call_sketch_features);
  library.impl("sketch_gradient", call_sketch_gradient);
  library.impl("crystal_energies", call_crystal_energies);
  library.impl("crystal_moments", call_crystal_moments);
  library.impl("crystal_deviations", call_crystal_deviations);
  library.impl("crystal_expand", call_crystal_expand);
  library.impl("crystal_reduce", call_crystal_reduce);
  library.impl("crystal_deviation", deviation_plain);
  library.impl("crystal_near", crystal_near);
  library.impl("crystal_pair_energies", crystal_pair_energies);
  library.impl("crystal_pair_sums", crystal_pair_sums);
  library.impl("crystal_pair_rows", crystal_pair_rows);
  library.impl("crystal_wall", crystal_wall);
}

TORCH_LIBRARY_IMPL(ubmd, CompositeImplicitAutograd, library) {
  library.impl("product", product_plain);
  library.impl("activation", activation_plain);
}

TORCH_LIBRARY_IMPL(ubmd, AutogradCPU, library) {
  library.impl("product", product_autograd);
  library.impl("activation", activation_autograd);
}

TORCH_LIBRARY_IMPL(ubmd, Autograd, library) {
  library.impl("gaussian_moments", gaussian_moments);
  library.impl("crystal_deviation", deviation);
}

}  // namespace ubmd::ops
