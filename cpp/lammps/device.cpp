#include "device.h"

#include <cstdlib>

#include "ubmd_error.h"

namespace ubmd {

std::string device_of_rank(const std::string &device, int local_rank, int n_devices) {
  if (device.rfind("cuda", 0) != 0) return device;
  if (n_devices == 0)
    throw Error("device " + device +
                " was requested but torch finds no GPU: use 'device cpu' or install torch with CUDA");
  if (device == "cuda") return "cuda:" + std::to_string(local_rank % n_devices);
  if (std::atoi(device.c_str() + 5) >= n_devices)
    throw Error("device " + device + " was requested but the last one is cuda:" + std::to_string(n_devices - 1) +
                ": use 'device cuda' to share the GPUs among the ranks");
  return device;
}

int local_rank() {
  // MPICH's launcher, Slurm, Intel MPI and others that follow PMI
  for (const char *name : {"MPI_LOCALRANKID", "SLURM_LOCALID", "PMI_LOCAL_RANK"})
    if (const char *value = std::getenv(name)) return std::atoi(value);
  return 0;
}

}  // namespace ubmd
