// Marks functions that the CPU and a GPU compile from the same source.
#pragma once

#ifdef __CUDACC__
#define FASTGUARD_HOST_DEVICE __host__ __device__
#else
#define FASTGUARD_HOST_DEVICE
#endif
