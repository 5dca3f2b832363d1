// Whether the plugin may run in the LAMMPS that loaded it. LAMMPS itself checks nothing.
#pragma once

#include <string>

namespace ubmd {

struct Versions {
  int lammps = 0;             // e.g. 20250722
  std::string torch;          // e.g. 2.13.0; empty if unknown
  std::string mpi;            // text of MPI_Get_library_version
  std::string integer_sizes;  // bytes of bigint, tagint, imageint
};

// Why a plugin built for one set of versions can't run with another, as a sentence; empty if it can.
std::string refusal(const Versions &built, const Versions &found);

}  // namespace ubmd
