// Attention's forward pass over some rows of one head: tiles of 64 rows and up to 128 keys, softmax
// as in Dao 2023 (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "attention_rows.h"

namespace fastguard {
namespace {

constexpr int block_panels = 2;

template <class Type, class In>
class AttentionForward {
 public:
  using T = typename In::Sum;
  using Word = typename In::Word;
  using V = Vec<T>;

  AttentionForward(const AttentionProblem& problem, void* scratch)
      : p_(problem),
        arena_(scratch),
        depth_(rounded_up((p_.head_dim + In::pairs - 1) / In::pairs, unit)),
        width_(rounded_up(p_.value_dim, unit)),
        dropout_(dropout_of(p_.dropout_p)) {
    const int64_t panels = (p_.keys + panel_keys - 1) / panel_keys;
    packed_ = arena_.take<int64_t>(2);  // of which utterance and which head of the keys
    key_ = arena_.take<Word>(panels * depth_ * panel_keys);
    value_ = arena_.take<Word>(panels * panel_keys / In::pairs * width_);
    query_ = arena_.take<Word>(std::max(row_block, panel_keys) * depth_);
    logits_ = arena_.take<T>(row_block * logits_row);
    weights_ = In::pairs == 1 ? reinterpret_cast<Word*>(logits_)
                              : arena_.take<Word>(row_block * logits_row / In::pairs);
    output_ = arena_.take<T>(row_block * width_);
    most_ = arena_.take<T>(row_block);
    sum_ = arena_.take<T>(row_block);
    moment_ = arena_.take<T>(row_block);
    kept_ = arena_.take<uint64_t>(block_panels * row_block);
  }

  int64_t scratch() const { return arena_.used(); }

  void run(const ForwardTask& task) {
    [[maybe_unused]] const Tiles tiles;
    const int64_t kv_head = task.h / (p_.heads / p_.kv_heads);
    const PanelList& panels = p_.panels[task.b];
    few_values_ = panels.count == 1 && are_few_words(p_.value_dim, p_.keys, panels.first[0].keep);
    if (packed_[0] != task.b || packed_[1] != kv_head) {
      pack(task.b, kv_head);
      packed_[0] = task.b;
      packed_[1] = kv_head;
    }
    for (int64_t row = task.begin; row < task.end; row += row_block) {
      rows_of({task.b, task.h, row}, std::min(row_block, task.end - row));
    }
  }

 private:
  struct WordRows {
    const Word* first;
    int64_t row;
  };
  static constexpr int64_t logits_row = block_panels * panel_keys;

  void pack(int64_t b, int64_t kv_head) {
    for (int64_t i = 0; i < p_.panels[b].count; ++i) {
      const Panel& panel = p_.panels[b].first[i];
      const auto* key = row_at<Type>(p_.key, b, kv_head, panel.first);
      const auto* value = row_at<Type>(p_.value, b, kv_head, panel.first);
      const Rows<Type, In> keys{key, p_.key.row, p_.head_dim, panel.keep};
      const Rows<Type, In> values{value, p_.value.row, p_.value_dim, panel.keep};
      pack_rows(keys, panel.columns, query_, depth_);
      transpose(query_, depth_, panel.columns, depth_, key_of(i), panel_keys);
      if (!few_values_) {
        pack_below(values, panel.columns, value_of(i), width_);
      }
    }
  }

  // Whether `count` rows, all that there are, are read where they lie. Copies of many are faster.
  static bool are_few_words(int64_t columns, int64_t count, uint64_t keep) {
    return std::is_same_v<typename Type::storage, Word> && count <= unit && columns % unit == 0 &&
        keep == first_bits(count);
  }

  Word* key_of(int64_t i) const { return key_ + i * depth_ * panel_keys; }
  Word* value_of(int64_t i) const { return value_ + i * panel_keys / In::pairs * width_; }

  void rows_of(const Place& first, int64_t rows) {
    const auto* query = row_at<Type>(p_.query, first.b, first.h, first.row);
    queries_ = {query_, depth_};
    if (are_few_words(p_.head_dim, rows, first_bits(rows))) {
      queries_ = {reinterpret_cast<const Word*>(query), p_.query.row};
    } else {
      const Rows<Type, In> queries{query, p_.query.row, p_.head_dim, first_bits(rows)};
      pack_rows(queries, rounded_up(rows, unit), query_, depth_);
    }
    std::fill(most_, most_ + rows, -std::numeric_limits<T>::infinity());
    std::fill(sum_, sum_ + rows, T{0});
    std::fill(moment_, moment_ + rows, T{0});
    std::fill(output_, output_ + rounded_up(rows, unit) * width_, T{0});
    const PanelList& list = p_.panels[first.b];
    int64_t end = 0;
    while (end < list.count && seen(p_, list.first[end], first.row + rows - 1)) {
      ++end;
    }
    for (int64_t i = 0; i < end; i += block_panels) {
      block(first, rows, i, std::min(end, i + block_panels));
    }
    for (int64_t r = 0; r < rows; ++r) {
      write({first.b, first.h, first.row + r}, r);
    }
  }

  // Panels begin to end.
  void block(const Place& first, int64_t rows, int64_t begin, int64_t end) {
    const Panel* list = p_.panels[first.b].first + begin;
    const int n = static_cast<int>(end - begin);
    for (int i = 0; i < n; ++i) {
      multiply<In>(
          {queries_.first,
           queries_.row,
           key_of(begin + i),
           panel_keys,
           logits_ + i * panel_keys,
           logits_row},
          rows,
          list[i].columns,
          depth_,
          false);
      if (p_.seed != nullptr) {
        kept_in_panel(p_, dropout_.threshold, first, rows, list[i], kept_ + i * row_block);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Place at{first.b, first.h, first.row + r};
      p_.stats != nullptr ? softmax<true>(at, r, list, n) : softmax<false>(at, r, list, n);
    }
    for (int i = 0; i < n; ++i) {
      if constexpr (In::pairs == 2) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = r * logits_row + i * panel_keys;
          pair_in_row(logits_ + at, list[i].columns, weights_ + at / 2);
        }
      }
      WordRows values{value_of(begin + i), width_};
      int64_t depth = list[i].columns / In::pairs;
      if (few_values_) {
        const int64_t kv_head = first.h / (p_.heads / p_.kv_heads);
        const auto* value = row_at<Type>(p_.value, first.b, kv_head, 0);
        values = {reinterpret_cast<const Word*>(value), p_.value.row};
        depth = p_.keys;
      }
      multiply<In>(
          {weights_ + i * panel_keys / In::pairs,
           logits_row / In::pairs,
           values.first,
           values.row,
           output_,
           width_},
          rows,
          width_,
          depth,
          true);
    }
  }

  // Row r of the products becomes weights; what was summed up before follows the new maximum.
  template <bool with_stats>
  void softmax(const Place& at, int64_t r, const Panel* list, int n) {
    T* const x = logits_ + r * logits_row;
    const V scale = V::all(is_plain(p_) ? static_cast<T>(p_.scale) : T{1});
    const V hidden = V::all(-std::numeric_limits<T>::infinity()), zero = V::all(0);
    uint64_t bits[block_panels];
    V most = hidden;
    for (int i = 0; i < n; ++i) {
      bits[i] = keys_of_row(p_, list[i], at);
      T* const panel = x + i * panel_keys;
      if (!is_plain(p_)) {
        finish_logits<Type, T>(p_, list[i], at, panel, nullptr);
      }
      for (int64_t j = 0; j < list[i].columns; j += V::lanes) {
        const V logit = V::load(panel + j) * scale;
        most = max(select(static_cast<Bits>(bits[i] >> j), logit, hidden), most);
      }
    }
    const T before = most_[r], now = std::max(before, reduce_max(most));
    const T origin = now == -std::numeric_limits<T>::infinity() ? T{0} : now;
    const V below = V::all(-origin);
    V sum = zero, moment = zero;
    for (int i = 0; i < n; ++i) {
      const uint64_t kept = p_.seed == nullptr ? ~uint64_t{0} : kept_[i * row_block + r];
      T* const panel = x + i * panel_keys;
      for (int64_t j = 0; j < list[i].columns; j += V::lanes) {
        // Rounded as the largest was: with one rounding less, the largest of 2e9 lies 100 above
        // itself.
        const V distance = V::load(panel + j) * scale + below;
        const V weight = select(static_cast<Bits>(bits[i] >> j), exp(distance), zero);
        sum = sum + weight;
        if constexpr (with_stats) {
          // No weight, however far away, has 0 * inf; nor has a NaN that is hidden.
          const V near = select(less(V::all(T{-1e4}), distance), distance, zero);
          moment = fma(weight, near, moment);
        }
        select(static_cast<Bits>(kept >> j), weight, zero).store(panel + j);
      }
    }
    // Nothing was summed up before the first maximum.
    const bool first = before == -std::numeric_limits<T>::infinity();
    const T shrink = first || before == now ? T{1} : std::exp(before - origin);
    if (shrink != T{1}) {
      T* const output = output_ + r * width_;
      for (int64_t j = 0; j < width_; j += V::lanes) {
        (V::load(output + j) * V::all(shrink)).store(output + j);
      }
    }
    if constexpr (with_stats) {
      const T moved = first ? T{0} : before - origin;
      moment_[r] = shrink * (moment_[r] + moved * sum_[r]) + reduce_add(moment);
    }
    sum_[r] = sum_[r] * shrink + reduce_add(sum);
    most_[r] = now;
  }

  void write(const Place& at, int64_t r) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    T* const output = output_ + r * width_;
    const bool dead = most_[r] == -inf && sum_[r] == T{0};  // no key at all; a NaN is not
    if (dead) {
      std::fill(output, output + width_, T{0});
    } else {
      const V factor = V::all((p_.seed == nullptr ? T{1} : rescale_of<T>(dropout_)) / sum_[r]);
      const V bound = V::all(static_cast<T>(p_.clamp)), below = V::all(static_cast<T>(-p_.clamp));
      for (int64_t j = 0; j < width_; j += V::lanes) {
        min(bound, max(below, V::load(output + j) * factor)).store(output + j);
      }
    }
    write_row<Type>(p_.output, at.b, at.h, at.row, output, p_.value_dim, T{1});
    if (p_.unrounded.data != nullptr) {
      write_row<Wide<T>>(p_.unrounded, at.b, at.h, at.row, output, p_.value_dim, T{1});
    }
    const int64_t row = row_of(p_, at.b, at.h, at.row);
    const T log_sum = std::log(sum_[r]);
    static_cast<T*>(p_.logsumexp)[row] = dead ? inf : most_[r] + log_sum;
    if (p_.stats != nullptr) {
      T* const stats = static_cast<T*>(p_.stats);
      stats[row] = std::isnan(sum_[r]) ? sum_[r] : most_[r];
      stats[p_.batch * p_.heads * p_.queries + row] = dead ? T{0} : log_sum - moment_[r] / sum_[r];
    }
  }

  const AttentionProblem& p_;
  Arena arena_;
  const int64_t depth_, width_;  // words of a query's row, elements of a value's, rounded up
  const Dropout dropout_;
  int64_t* packed_;
  Word *key_, *value_, *query_, *weights_;
  WordRows queries_{};
  bool few_values_ = false;
  T *logits_, *output_, *most_, *sum_, *moment_;
  uint64_t* kept_;
};

}  // namespace
}  // namespace fastguard
