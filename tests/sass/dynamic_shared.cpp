// Prints the bytes of dynamic shared memory that the launches ask for: a kernel and a number a
// line.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/clip.cuh"

#include <cstdio>

namespace fastguard {
namespace {

template <class T>
void print(const char* type) {
  for (const int width : {32, 64, 96, 128}) {
    with_width<T>(width, [&](auto kernel_width) {
      constexpr int D = kernel_width;
      if (D == width) {
        constexpr int forward = ForwardTiles<T, D>::bytes, backward = BackwardTiles<T, D>::bytes;
        std::printf("attention_kernel<%s,%d> %d\n", type, D, forward);
        std::printf("attention_grad_query_kernel<%s,%d> %d\n", type, D, backward);
        std::printf("attention_grad_key_kernel<%s,%d> %d\n", type, D, backward);
      }
    });
  }
}

}  // namespace
}  // namespace fastguard

int main() {
  std::printf("clip_kernel %d\n", fastguard::kept_bytes);
  fastguard::print<fastguard::BFloat16>("BFloat16");
  fastguard::print<fastguard::Float16>("Float16");
  fastguard::print<float>("float");
}
