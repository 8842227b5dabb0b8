// Marks what the CPU and a GPU compute with the same source.
#pragma once

#ifdef __CUDACC__
#define FASTGUARD_HOST_DEVICE __host__ __device__
#else
#define FASTGUARD_HOST_DEVICE
#endif
