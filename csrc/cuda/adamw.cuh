// adamw_: one Adam or AdamW step of all parameters in one launch, which reads verdict and
// coefficient itself. On a skip it reads no gradient and writes nothing. Reference: adamw_ref_ in
// fastguard/ops/adamw.py. The rounding is that of csrc/cpu/adamw_kernel.cpp: only operations that
// are written as fma are contracted.
#pragma once

#include "adamw_update.h"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "decide.h"

#include <cmath>

namespace fastguard {

// The packed state of csrc/packed.h.
struct AdamwState {
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* steps;  // (tensors,)
  float* master_param;  // null without masters
};

struct AdamwDecision {
  const double* grad_coef;  // () or (tensors,)
  int32_t next_coef;  // 0 or 1
  const int64_t* verdict;
};

// The power by squaring. std::pow would be a call, and the kernel would spill its registers. The
// relative error after t steps is below 2^-53 t, which float32 does not show. (This is the only
// difference from the CPU for float64 parameters: 1e-14 after 10,000 steps.)
__device__ inline double power(double base, double exponent) {
  double result = 1.0;
  for (auto n = static_cast<uint32_t>(exponent); n > 0; n /= 2) {
    result *= n % 2 == 1 ? base : 1.0;
    base *= base;
  }
  return result;
}

// lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t). One thread computes them for the whole block, and
// only if t changes.
struct BiasCorrections {
  double t = -1.0;
  BiasCorrection of_t = {};

  __device__ void at(double next, const AdamwOptions& options) {
    if (next == t) {
      return;
    }
    FASTGUARD_SHARED(double, shared, 2);
    if (threadIdx.x == 0) {
      const BiasCorrection of_next =
          bias_correction_of(options, power(options.beta1, next), power(options.beta2, next));
      shared[0] = of_next.step_size;
      shared[1] = of_next.root_factor;
    }
    __syncthreads();
    t = next;
    of_t = {shared[0], shared[1]};
    __syncthreads();  // the next call writes them
  }
};

// A gradient times its factor. The product is computed in float64, which holds gradients of 1e38
// and factors of 1e-43. This takes three instructions of the fp64 units. The time to move the 28
// bytes of an element hides them, except on GPUs with very few fp64 units.
template <class Real, class T>
__device__ inline Real scaled(T grad, double factor) {
  return static_cast<Real>(widened(grad) * factor);
}

// The value of a parameter in the moments' precision. The parameter of a master is the rounded
// master, unless something else than this kernel wrote it: its new value counts then. Reference:
// current_master in fastguard/ops/adamw.py.
template <bool masters, class Real, class P>
__device__ inline Real value_of(P param, [[maybe_unused]] Real master) {
  if constexpr (masters) {
    if (narrowed<P>(master).bits == param.bits) {
      return master;
    }
  }
  return static_cast<Real>(widened(param));
}

// Steps `width` elements, moved in one instruction per array. Consecutive threads have consecutive
// elements.
template <bool amsgrad, bool masters, int width, class P, class G, class Real>
__device__ inline void step_elements(
    const AdamwRule<Real>& rule,
    P* p,
    const G* g,
    Real* m,
    Real* v,
    Real* largest,
    Real* master,
    int n) {
  using Ps = Vector<P, width>;
  using Gs = Vector<G, width>;
  using Reals = Vector<Real, width>;
  for (int i = threadIdx.x; within(i, n / width); i += threads) {
    Ps params = load(reinterpret_cast<const Ps*>(p) + i);
    const Gs grads = load_once(reinterpret_cast<const Gs*>(g) + i);
    Reals ms = load_once(reinterpret_cast<const Reals*>(m) + i);
    Reals vs = load_once(reinterpret_cast<const Reals*>(v) + i);
    Reals most = {};
    if constexpr (amsgrad) {
      most = load_once(reinterpret_cast<const Reals*>(largest) + i);
    }
    Reals wide = {};
    if constexpr (masters) {
      wide = load_once(reinterpret_cast<const Reals*>(master) + i);
    }
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const Real grad = scaled<Real>(grads.at[j], rule.grad_coef);
      const Real param = value_of<masters>(params.at[j], wide.at[j]);
      wide.at[j] =
          adamw_update<amsgrad>(rule, rule.coupled, param, grad, ms.at[j], vs.at[j], most.at[j]);
      params.at[j] = narrowed<P>(wide.at[j]);
    }
    store(reinterpret_cast<Ps*>(p) + i, params);
    store_once(reinterpret_cast<Reals*>(m) + i, ms);
    store_once(reinterpret_cast<Reals*>(v) + i, vs);
    if constexpr (amsgrad) {
      store_once(reinterpret_cast<Reals*>(largest) + i, most);
    }
    if constexpr (masters) {
      store_once(reinterpret_cast<Reals*>(master) + i, wide);
    }
  }
}

template <class T>
__device__ inline bool is_aligned(const T* x, int width) {
  return reinterpret_cast<uintptr_t>(x) % (width * sizeof(T)) == 0;
}

// Steps a chunk in vectors if all arrays are aligned, else element by element. Both are coalesced.
template <bool amsgrad, bool masters, class P, class G, class Real>
__device__ inline void step_chunk(
    const Chunk& chunk, const AdamwRule<Real>& rule, const AdamwState& state) {
  constexpr int width = 16 / sizeof(Real);
  const int64_t place = int64_t{chunk.place} * packed_alignment;
  P* p = reinterpret_cast<P*>(chunk.data);
  const G* g = reinterpret_cast<const G*>(chunk.other);
  Real* m = static_cast<Real*>(state.exp_avg) + place;
  Real* v = static_cast<Real*>(state.exp_avg_sq) + place;
  Real* largest = amsgrad ? static_cast<Real*>(state.max_exp_avg_sq) + place : nullptr;
  Real* master = nullptr;
  if constexpr (masters) {
    master = state.master_param + place;
  }
  int done = 0;
  if (is_aligned(p, width) && is_aligned(g, width) && is_aligned(m, width) &&
      is_aligned(v, width) && (!amsgrad || is_aligned(largest, width)) &&
      (!masters || is_aligned(master, width))) {
    done = chunk.size() / width * width;
    step_elements<amsgrad, masters, width>(rule, p, g, m, v, largest, master, done);
  }
  Real* rest = amsgrad ? largest + done : nullptr;
  Real* rest_of_masters = masters ? master + done : nullptr;
  step_elements<amsgrad, masters, 1>(
      rule, p + done, g + done, m + done, v + done, rest, rest_of_masters, chunk.size() - done);
}

// Calls f with null pointers to the types of a parameter and its gradient. Parameters with masters
// have 16 bits.
template <bool masters, class F>
__device__ inline void with_types(const Chunk& chunk, const F& f) {
  const auto with_grad = [&](auto* p) {
    if constexpr (sizeof(*p) == 2) {
      if (chunk.other_type() == Type::float32) {
        f(p, static_cast<float*>(nullptr));
        return;
      }
    }
    f(p, p);
  };
  if constexpr (!masters) {
    with_type(chunk.type(), with_grad);
  } else if (chunk.type() == Type::bfloat16) {
    with_grad(static_cast<BFloat16*>(nullptr));
  } else {
    with_grad(static_cast<Float16*>(nullptr));
  }
}

template <bool amsgrad, bool masters>
__global__ __launch_bounds__(threads, amsgrad || masters ? 2 : 3) void adamw_kernel(
    Plan plan, AdamwState state, AdamwDecision decision, AdamwOptions options) {
  const int64_t verdict = load(decision.verdict);
  if (verdict != static_cast<int64_t>(Verdict::apply) &&
      verdict != static_cast<int64_t>(Verdict::clip)) {
    return;
  }
  BiasCorrections bias;
  // From the last chunk to the first: L2 still has the gradients that were measured last.
  for (int c = plan.n_chunks - 1 - static_cast<int>(blockIdx.x); c >= 0; c -= gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    bias.at(static_cast<double>(load(state.steps + chunk.tensor)) + 1.0, options);
    const double coef = load(decision.grad_coef + int64_t{decision.next_coef} * chunk.tensor);
    with_types<masters>(chunk, [&](auto* p, auto* g) {
      using P = std::remove_pointer_t<decltype(p)>;
      using G = std::remove_pointer_t<decltype(g)>;
      using Real = std::conditional_t<std::is_same_v<P, double>, double, float>;
      step_chunk<amsgrad, masters, P, G>(
          chunk, adamw_rule_of<Real>(options, bias.of_t, coef), state);
    });
  }
  // The last block updates the steps: no other block needs the old values then.
  __syncthreads();
  if (arrives_last(plan.arrived + plan.tensors, gridDim.x)) {
    for (int tensor = threadIdx.x; within(tensor, plan.tensors); tensor += threads) {
      store(state.steps + tensor, load(state.steps + tensor) + 1.0f);
    }
  }
}

}  // namespace fastguard
