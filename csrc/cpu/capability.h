// Which instruction set the kernels run with, chosen once per process.
#pragma once

namespace fastguard {

enum class Capability { basic, avx2, avx512, avx512_bf16, amx };

// The best that was compiled in and that this machine has. FASTGUARD_CPU_CAPABILITY=default|avx2|
// avx512|avx512_bf16|amx caps it (the words of torch's ATEN_CPU_CAPABILITY); tests use that to run
// every variant.
Capability cpu_capability();

const char* name(Capability capability);

}  // namespace fastguard
