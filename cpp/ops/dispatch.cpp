// Chooses the copy of the kernels for this processor. The environment variable UBMD_ISA (v4, v3 or base), read once,
// selects a lower one; it is meant for tests.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "clusters.h"
#include "kernels.h"

namespace ubmd::ops {

#define UBMD_DECLARE(isa)                        \
  namespace isa {                                \
  extern const Kernels<float> single_precision;  \
  extern const Kernels<double> double_precision; \
  extern const ClusterKernels cluster_table;     \
  }

UBMD_DECLARE(base)
#ifdef UBMD_X86
UBMD_DECLARE(v3)
UBMD_DECLARE(v4)
#endif

namespace {

struct Choice {
  const char *name;
  bool runs;
  const Kernels<float> *single_precision;
  const Kernels<double> *double_precision;
  const ClusterKernels *clusters;
};

const Choice &best() {
  static const Choice choices[] = {
#ifdef UBMD_X86
      {"v4",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma"),
       &v4::single_precision, &v4::double_precision, &v4::cluster_table},
      {"v3",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2"),
       &v3::single_precision, &v3::double_precision, &v3::cluster_table},
#endif
      {"base", true, &base::single_precision, &base::double_precision, &base::cluster_table}};
  const char *variable = std::getenv("UBMD_ISA");
  const std::string asked = variable ? variable : "";
  for (const Choice &choice : choices)
    if (choice.runs && (asked.empty() || asked == choice.name)) return choice;
  throw std::runtime_error("UBMD_ISA=" + asked + " is not an instruction set of this processor: unset it");
}

const Choice &chosen() {
  static const Choice &choice = best();
  return choice;
}

}  // namespace

bool library_is_wide() {
#ifdef UBMD_X86
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

template <>
const Kernels<float> &kernels<float>() {
  return *chosen().single_precision;
}
template <>
const Kernels<double> &kernels<double>() {
  return *chosen().double_precision;
}
const ClusterKernels &cluster_kernels() {
  return *chosen().clusters;
}

}  // namespace ubmd::ops
