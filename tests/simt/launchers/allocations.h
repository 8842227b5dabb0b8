// What torch has allocated on the CPU, byte for byte: the memory of the GPU that is emulated.
#pragma once

#include "simt/global_memory.h"

namespace simt {

// From now on; what was allocated before is no kernel's to touch.
void follow_allocations();

// What a launch may touch.
Memory allocations();

// What is freed while a graph is captured stays, as in the graph's own pool, until the graph goes.
void keep_freed(bool keep);
void let_go();

}  // namespace simt
