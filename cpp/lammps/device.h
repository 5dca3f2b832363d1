// Which GPU an MPI rank uses.
#pragma once

#include <string>

namespace ubmd {

// `cuda` means a GPU of the node for each of its ranks, in turn; anything else is taken as it is. Throws Error for
// a GPU that isn't there; n_devices = number of GPUs that torch sees.
std::string device_of_rank(const std::string &device, int local_rank, int n_devices);

// Rank among those of this node, which MPI launchers tell in the environment; 0 if they don't. Asking MPI would need
// all ranks at once, also those of other partitions.
int local_rank();

}  // namespace ubmd
