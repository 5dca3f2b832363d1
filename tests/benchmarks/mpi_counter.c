// Counts what a rank sends and reduces through MPI: preloaded before LAMMPS's library (lammps_runs.mpi_counter).
#include <mpi.h>

static long counts[4];  // messages sent, their bytes; reductions of all ranks, their bytes

void mpi_counts(long *to) {
  for (int k = 0; k < 4; ++k) to[k] = counts[k];
}

static void count(int what, int n, MPI_Datatype type) {
  int size;
  PMPI_Type_size(type, &size);
  counts[what] += 1;
  counts[what + 1] += (long)n * size;
}

int MPI_Send(const void *data, int n, MPI_Datatype type, int to, int tag, MPI_Comm comm) {
  count(0, n, type);
  return PMPI_Send(data, n, type, to, tag, comm);
}

int MPI_Allreduce(const void *data, void *result, int n, MPI_Datatype type, MPI_Op operation, MPI_Comm comm) {
  count(2, n, type);
  return PMPI_Allreduce(data, result, n, type, operation, comm);
}
