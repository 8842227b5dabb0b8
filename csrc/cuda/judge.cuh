// The decision by one block. The verdict stays on the device. The policy itself is in
// csrc/decide.h, for every device.
#pragma once

#include "cuda/reduce.cuh"
#include "decide.h"

namespace fastguard {

struct Deciding {
  Policy policy;
  const double* unscale;  // null for 1
  const double* loss;  // null if not known
  double* statistics;  // (4,), as struct Statistics
  double* seen_norms;  // (window,)
  double* accepted_norms;  // (window,)
  int64_t window;
  double* per_tensor;  // (4, columns), as struct TensorStatistics
  int64_t columns;  // n or 0
  double step;
  // A GradScaler's, null where there is none.
  float* scale;
  int32_t* growth_tracker;
  Growth growth;
  // Results.
  double* grad_coef;  // () or (n,)
  int64_t* verdict;
  double* record;  // as struct Record

  __host__ __device__ bool wanted() const { return verdict != nullptr; }
};

__device__ inline double load_or(const double* scalar, double otherwise) {
  return scalar == nullptr ? otherwise : load(scalar);
}

// Writes the two neighbours of a place among the first `size` norms in ascending order to
// found[first] and found[first + 1]. They are found by the rank of each norm.
template <class Found>
__device__ inline void find_by_rank(
    const double* norms, int64_t size, const Rank& place, Found& found, int first) {
  for (int64_t i = threadIdx.x; within(i, size); i += threads) {
    const double norm = load(norms + i);
    int64_t rank = 0;
    for (int64_t j = 0; j < size; ++j) {
      const double other = load(norms + j);
      rank += less(other, norm) || (!less(norm, other) && j < i);
    }
    if (rank == place.below) {
      found[first] = norm;
    }
    if (rank == place.above) {
      found[first + 1] = norm;
    }
  }
}

// After this returns, all threads have read the statistics, so they may be written.
__device__ inline Quantiles quantiles_in_block(const Deciding& given, const Statistics& known) {
  FASTGUARD_SHARED(double, found, 4);
  const int64_t seen = needs_seen(given.policy) ? held(known.seen, given.window) : 0;
  const int64_t accepted = needs_accepted(given.policy) ? held(known.accepted, given.window) : 0;
  const Rank median = Rank::of_median_with_a_larger(seen);
  const Rank chosen = Rank::of_quantile(accepted_quantile(given.policy), accepted);
  find_by_rank(given.seen_norms, seen, median, found, 0);
  find_by_rank(given.accepted_norms, accepted, chosen, found, 2);
  __syncthreads();
  return {
      seen == 0 ? 0.0 : median.between(found[0], found[1]),
      accepted == 0 ? 0.0 : chosen.between(found[2], found[3])};
}

__device__ inline TensorStatistics column(const Deciding& given, int64_t i) {
  const double* const first = given.per_tensor + i;
  return {
      load(first),
      load(first + given.columns),
      load(first + 2 * given.columns),
      load(first + 3 * given.columns)};
}

// Finds the smallest of AdaGC's coefficients and the largest clipped norm of n tensors.
__device__ inline void clip_each_in_block(
    const Deciding& given, Judgement& judged, const double* norms, int n) {
  double smallest = 1.0, applied = 0.0;
  for (int i = threadIdx.x; within(i, n); i += threads) {
    const double norm = load(norms + i) * judged.factor;
    const double coef = adagc_coef(
        given.policy, judged.warm, norm, judged.global_coef, given.step, column(given, i));
    smallest = coef < smallest ? coef : smallest;
    applied = norm * coef > applied ? norm * coef : applied;
  }
  const auto least = [](double a, double b) { return a < b ? a : b; };
  const auto most = [](double a, double b) { return a > b ? a : b; };
  smallest = block_reduce(smallest, least);
  applied = block_reduce(applied, most);
  apply_per_tensor(judged, smallest, applied);
}

// Updates the statistics of each tensor, and writes AdaGC's coefficients. Each thread has its own
// columns.
__device__ inline void remember_in_block(
    const Deciding& given, const Judgement& judged, const double* norms) {
  const bool adagc = given.policy.threshold == Threshold::adagc;
  for (int64_t i = threadIdx.x; within(i, given.columns); i += threads) {
    const double norm = load(norms + i) * judged.factor;
    double coef = 1.0;
    if (adagc) {
      coef = adagc_coef(
          given.policy, judged.warm, norm, judged.global_coef, given.step, column(given, i));
      store(given.grad_coef + i, judged.grad_coef(coef));
    }
    // A second read saves registers during the division.
    TensorStatistics known = column(given, i);
    remember(given.policy, judged, norm, coef, given.step, known);
    double* const first = given.per_tensor + i;
    store(first, known.ema);
    store(first + given.columns, known.clipped_since);
    store(first + 2 * given.columns, known.usual);
    store(first + 3 * given.columns, known.risen_since);
  }
}

__device__ inline void learn(const Deciding& given, const Judgement& judged, Statistics known) {
  if (!judged.seen) {
    return;
  }
  store(given.seen_norms + next_place(known.seen, given.window), judged.norm);
  store(given.statistics, known.seen + 1.0);
  if (judged.skipped()) {
    return;
  }
  store(given.accepted_norms + next_place(known.accepted, given.window), judged.norm);
  absorb(given.policy, known, judged.norm, judged.adaptive);
  store(given.statistics + 1, known.accepted);
  store(given.statistics + 2, known.mean);
  store(given.statistics + 3, known.variance);
}

__device__ inline void grow_scale(const Deciding& given, double total_norm) {
  float scale = load(given.scale);
  int32_t tracker = load(given.growth_tracker);
  grow(given.growth, !std::isfinite(total_norm), scale, tracker);
  store(given.scale, scale);
  store(given.growth_tracker, tracker);
}

// Called by one thread.
__device__ inline void write_decision(
    const Deciding& given, const Judgement& judged, const Statistics& known, double total_norm) {
  if (given.policy.threshold != Threshold::adagc) {
    store(given.grad_coef, judged.grad_coef(judged.global_coef));
  }
  learn(given, judged, known);
  store(given.verdict, static_cast<int64_t>(judged.decision.verdict));
  const Record record = record_of(judged, load_or(given.loss, NAN));
  store(given.record, record.verdict);
  store(given.record + 1, record.clip_coef);
  store(given.record + 2, record.total_norm);
  store(given.record + 3, record.limit);
  store(given.record + 4, record.loss);
  store(given.record + 5, record.outlier_above);
  if (given.scale != nullptr) {
    grow_scale(given, total_norm);
  }
}

// Called by all threads of one block.
__device__ inline void decide_in_block(
    const Deciding& given, double total_norm, const double* norms, int n) {
  const bool adagc = given.policy.threshold == Threshold::adagc;
  Statistics known = {
      load(given.statistics),
      load(given.statistics + 1),
      load(given.statistics + 2),
      load(given.statistics + 3)};
  const Quantiles quantiles = quantiles_in_block(given, known);
  Judgement judged = judge(
      given.policy,
      known,
      quantiles,
      total_norm,
      load_or(given.unscale, 1.0),
      std::isfinite(load_or(given.loss, 0.0)));
  if (adagc && !judged.skipped()) {
    clip_each_in_block(given, judged, norms, n);
  }
  reject_too_large(judged);
  if (threadIdx.x == 0) {
    write_decision(given, judged, known, total_norm);
  }
  remember_in_block(given, judged, norms);
}

}  // namespace fastguard
