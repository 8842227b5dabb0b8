// The entries of attention_kernel.h for one dtype and one arithmetic. Constant, for nothing of
// these files may run when the library is loaded: they are of instructions that a machine may not
// have.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_kernel.h"
#include "concat.h"

namespace fastguard {
namespace {

template <class Type, class In>
constexpr AttentionKernel attention_kernel_of() {
  return {
      unit * In::pairs,
      [](const AttentionProblem& p) { return AttentionForward<Type, In>(p, nullptr).scratch(); },
      [](const AttentionProblem& p) { return AttentionBackward<Type, In>(p, nullptr).scratch(); },
      [](const AttentionProblem& p, const ForwardTask& task, void* scratch) {
        AttentionForward<Type, In>(p, scratch).run(task);
      },
      [](const AttentionProblem& p, const BackwardTask& task, void* scratch) {
        AttentionBackward<Type, In>(p, scratch).run(task);
      },
      add_partials<Type, typename In::Sum>};
}

}  // namespace
}  // namespace fastguard
