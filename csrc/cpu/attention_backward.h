// Attention's backward pass for one chunk of the keys of one of their heads: five products for each
// tile of 64 rows and 64 keys (Dao 2023, algorithm 2). The gradients of keys and values are summed
// up transposed: so the weights, rows of which are rows of the query, are always `b` of a product,
// and never need to be transposed themselves.
#pragma once

#include "attention_rows.h"

namespace fastguard {
namespace {

template <class Type, class In>
class AttentionBackward {
 public:
  using T = typename In::Sum;
  using Word = typename In::Word;
  using V = Vec<T>;

  AttentionBackward(const AttentionProblem& problem, void* scratch)
      : p_(problem),
        arena_(scratch),
        depth_(rounded_up((p_.head_dim + In::pairs - 1) / In::pairs, unit)),
        value_depth_(rounded_up((p_.value_dim + In::pairs - 1) / In::pairs, unit)),
        width_(rounded_up(p_.head_dim, unit)),
        value_width_(rounded_up(p_.value_dim, unit)),
        chunk_keys_(keys_of_chunk(p_)),
        dropout_(dropout_of(p_.dropout_p)) {
    const int64_t panels = chunk_keys_ / panel_keys;
    key_ = arena_.take<Word>(panels * panel_keys * depth_);
    key_below_ = arena_.take<Word>(panels * below * width_);
    value_ = arena_.take<Word>(panels * panel_keys * value_depth_);
    grad_key_ = arena_.take<T>(panels * panel_keys * width_);
    grad_value_ = arena_.take<T>(panels * panel_keys * value_width_);
    query_ = arena_.take<Word>(row_block * depth_);
    query_turned_ = arena_.take<Word>(width_ * below);
    grad_output_ = arena_.take<Word>(row_block * value_depth_);
    grad_output_turned_ = arena_.take<Word>(value_width_ * below);
    const int64_t widest = std::max(width_, value_width_);
    packing_ = arena_.take<Word>(row_block * widest);
    passed_ = arena_.take<typename Type::storage>(row_block * widest);
    grad_query_ = arena_.take<T>(row_block * width_);
    turned_ = arena_.take<T>(panel_keys * widest);
    weights_ = arena_.take<T>(row_block * panel_keys);
    grad_weights_ = arena_.take<T>(row_block * panel_keys);
    slope_ = arena_.take<T>(panel_keys);
    delta_ = arena_.take<T>(row_block);
    logsumexp_ = arena_.take<T>(row_block);
    kept_ = arena_.take<uint64_t>(row_block);
    if constexpr (In::pairs == 2) {
      weights_below_ = arena_.take<Word>(below * panel_keys);
      grad_logits_below_ = arena_.take<Word>(below * panel_keys);
      grad_logits_ = arena_.take<Word>(row_block * panel_keys / In::pairs);
    } else {
      weights_below_ = weights_;
      grad_logits_below_ = grad_logits_ = grad_weights_;
    }
  }

  int64_t scratch() const { return arena_.used(); }

  void run(const BackwardTask& task) {
    [[maybe_unused]] const Tiles tiles;
    const int64_t begin = task.chunk * chunk_keys_;
    const int64_t end = std::min(p_.keys, begin + chunk_keys_);
    const PanelList& all = p_.panels[task.b];
    const auto before = [](const Panel& panel, int64_t key) { return panel.first < key; };
    const Panel* const first = std::lower_bound(all.first, all.first + all.count, begin, before);
    list_ = {first, std::lower_bound(first, all.first + all.count, end, before) - first};
    pack_keys(task);
    for (int64_t i = 0; i < list_.count; ++i) {
      clear(grad_key_ + i * panel_keys * width_, width_, list_.first[i].columns);
      clear(grad_value_ + i * panel_keys * value_width_, value_width_, list_.first[i].columns);
    }
    const int64_t group = p_.heads / p_.kv_heads;
    for (int64_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
      for (int64_t row = 0; row < p_.queries; row += row_block) {
        rows_of(task, {task.b, h, row}, std::min(row_block, p_.queries - row));
      }
    }
    write_keys(task, begin, end);
  }

 private:
  static constexpr int64_t below = 64 / In::pairs;  // words that 64 rows are

  static int64_t keys_of_chunk(const AttentionProblem& p) {
    return rounded_up((p.keys + p.chunks - 1) / p.chunks, panel_keys);
  }

  // Zeros in the sums of a panel, which lie transposed.
  static void clear(T* sums, int64_t width, int64_t columns) {
    for (int64_t j = 0; j < width; ++j) {
      std::fill(sums + j * panel_keys, sums + j * panel_keys + columns, T{0});
    }
  }

  void pack_keys(const BackwardTask& task) {
    for (int64_t i = 0; i < list_.count; ++i) {
      const Panel& panel = list_.first[i];
      const auto* key = row_at<Type>(p_.key, task.b, task.kv_head, panel.first);
      const auto* value = row_at<Type>(p_.value, task.b, task.kv_head, panel.first);
      const Rows<Type, In> keys{key, p_.key.row, p_.head_dim, panel.keep};
      const Rows<Type, In> values{value, p_.value.row, p_.value_dim, panel.keep};
      Word* const below_each_other = key_below_ + i * below * width_;
      pack_below(keys, panel.columns, below_each_other, width_);
      Word* rows = below_each_other;  // the same where a word is an element
      if constexpr (In::pairs == 2) {
        rows = packing_;
        pack_rows(keys, panel.columns, rows, depth_);
      }
      transpose(rows, depth_, panel.columns, depth_, key_ + i * panel_keys * depth_, panel_keys);
      pack_rows(values, panel.columns, packing_, value_depth_);
      transpose(
          packing_,
          value_depth_,
          panel.columns,
          value_depth_,
          value_ + i * panel_keys * value_depth_,
          panel_keys);
    }
  }

  // Along the columns, and turned: `a` of a product along the rows.
  void pack_both(
      const Rows<Type, In>& rows,
      int64_t count,
      int64_t depth,
      int64_t width,
      Word* to,
      Word* turned) {
    pack_rows(rows, count, to, depth);
    const Word* below_each_other = to;  // the same where a word is an element
    if constexpr (In::pairs == 2) {
      pack_below(rows, count, packing_, width);
      below_each_other = packing_;
    }
    transpose(below_each_other, width, count / In::pairs, width, turned, below);
  }

  // The gradient of the output as it passes the clamp, and what the softmax subtracts from it. It
  // does not pass where a row has no key; returns a bit for each that has one.
  template <class Saved>
  uint64_t pass_clamp(const Heads& outputs, const Place& first, int64_t rows) {
    uint64_t alive = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const auto* grad = row_at<Type>(p_.grad_output, first.b, first.h, first.row + r);
      const auto* output = row_at<Saved>(outputs, first.b, first.h, first.row + r);
      auto* const passed = passed_ + r * value_width_;
      const T logsumexp =
          static_cast<const T*>(p_.logsumexp)[row_of(p_, first.b, first.h, first.row + r)];
      logsumexp_[r] = logsumexp;
      if (logsumexp == std::numeric_limits<T>::infinity()) {
        std::fill(passed, passed + value_width_, typename Type::storage{0});
        delta_[r] = 0;
        continue;
      }
      alive |= uint64_t{1} << r;
      V sum = V::all(0);
      int64_t j = 0;
      for (; j + V::lanes <= p_.value_dim; j += V::lanes) {
        sum = pass_clamp<Saved>(grad + j, output + j, passed + j, sum);
      }
      if (j < p_.value_dim) {
        typename Type::storage last_grad[V::lanes] = {};
        typename Saved::storage last_output[V::lanes] = {};
        std::copy(grad + j, grad + p_.value_dim, last_grad);
        std::copy(output + j, output + p_.value_dim, last_output);
        sum = pass_clamp<Saved>(last_grad, last_output, passed + j, sum);
      }
      delta_[r] = reduce_add(sum);
    }
    return alive;
  }

  // As torch compares an element with a number: in the element's type.
  template <class Saved>
  V pass_clamp(
      const typename Type::storage* grad,
      const typename Saved::storage* output,
      typename Type::storage* passed,
      V sum) const {
    const V bound = V::all(bound_of<Type, T>(p_.clamp));
    const V value = load_as<T, Saved>(output), back = load_as<T, Type>(grad);
    V rounded = value;
    if constexpr (!std::is_same_v<Saved, Type>) {
      typename Type::storage narrow[V::lanes];
      store_as<Type>(value, narrow);
      rounded = load_as<T, Type>(narrow);
    }
    const bool bounded = p_.clamp != std::numeric_limits<double>::infinity();
    const Bits passes = bounded ? less(abs(rounded), bound) : ~Bits{0};
    store_as<Type>(select(passes, back, V::all(0)), passed);
    return select(passes, fma(value, back, sum), sum);
  }

  void rows_of(const BackwardTask& task, const Place& first, int64_t rows) {
    const uint64_t alive = p_.unrounded.data != nullptr
        ? pass_clamp<Wide<T>>(p_.unrounded, first, rows)
        : pass_clamp<Type>(p_.output, first, rows);
    const int64_t count = rounded_up(rows, unit * In::pairs);
    pack_both(
        {row_at<Type>(p_.query, first.b, first.h, first.row), p_.query.row, p_.head_dim, alive},
        count,
        depth_,
        width_,
        query_,
        query_turned_);
    pack_both(
        {passed_, value_width_, p_.value_dim, alive},
        count,
        value_depth_,
        value_width_,
        grad_output_,
        grad_output_turned_);
    std::fill(grad_query_, grad_query_ + count * width_, T{0});
    for (int64_t i = 0; i < list_.count; ++i) {
      if (seen(p_, list_.first[i], first.row + rows - 1)) {
        tile(first, rows, i);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = grad_query_ + r * width_;
      if (p_.partial_grad_query == nullptr) {
        write_row<Type>(
            p_.grad_query,
            first.b,
            first.h,
            first.row + r,
            from,
            p_.head_dim,
            static_cast<T>(p_.scale));
      } else {
        const int64_t row = row_of(p_, task.chunk * p_.batch + first.b, first.h, first.row + r);
        std::copy(
            from, from + p_.head_dim, static_cast<T*>(p_.partial_grad_query) + row * p_.head_dim);
      }
    }
  }

  void tile(const Place& first, int64_t rows, int64_t i) {
    const Panel& panel = list_.first[i];
    multiply<In>(
        {query_, depth_, key_ + i * panel_keys * depth_, panel_keys, weights_, panel_keys},
        rows,
        panel.columns,
        depth_,
        false);
    multiply<In>(
        {grad_output_,
         value_depth_,
         value_ + i * panel_keys * value_depth_,
         panel_keys,
         grad_weights_,
         panel_keys},
        rows,
        panel.columns,
        value_depth_,
        false);
    if (p_.seed != nullptr) {
      kept_in_panel(p_, dropout_.threshold, first, rows, panel, kept_);
    }
    for (int64_t r = 0; r < rows; ++r) {
      derive({first.b, first.h, first.row + r}, r, panel);
    }
    const int64_t depth = pair_up(rows, panel.columns);
    multiply<In>(
        {grad_logits_,
         panel_keys / In::pairs,
         key_below_ + i * below * width_,
         width_,
         grad_query_,
         width_},
        rows,
        width_,
        panel.columns / In::pairs,
        true);
    multiply<In>(
        {query_turned_,
         below,
         grad_logits_below_,
         panel_keys,
         grad_key_ + i * panel_keys * width_,
         panel_keys},
        width_,
        panel.columns,
        depth,
        true);
    multiply<In>(
        {grad_output_turned_,
         below,
         weights_below_,
         panel_keys,
         grad_value_ + i * panel_keys * value_width_,
         panel_keys},
        value_width_,
        panel.columns,
        depth,
        true);
  }

  // Of row r: products become weights after dropout, their gradients those of the logits.
  void derive(const Place& at, int64_t r, const Panel& panel) {
    T* const x = weights_ + r * panel_keys;
    T* const grad = grad_weights_ + r * panel_keys;
    const uint64_t bits = keys_of_row(p_, panel, at);
    const bool plain = is_plain(p_), capped = p_.softcap != 0.0;
    if (!plain) {
      finish_logits<Type, T>(p_, panel, at, x, slope_);
    }
    const V scale = V::all(plain ? static_cast<T>(p_.scale) : T{1});
    const V origin = V::all(-logsumexp_[r]), delta = V::all(delta_[r]), zero = V::all(0);
    const uint64_t kept = p_.seed == nullptr ? ~uint64_t{0} : kept_[r];
    const V rescale = V::all(p_.seed == nullptr ? T{1} : rescale_of<T>(dropout_));
    for (int64_t j = 0; j < panel.columns; j += V::lanes) {
      const Bits shown = static_cast<Bits>(bits >> j), here = static_cast<Bits>(kept >> j);
      // Rounded before the difference, as in the forward pass: exp may get nothing far above 0.
      const V weight = select(shown, exp(V::load(x + j) * scale + origin), zero);
      const V back = select(here, V::load(grad + j) * rescale, zero);
      V derived = weight * (back - delta);
      if (capped) {
        derived = derived * V::load(slope_ + j);
      }
      select(here, weight * rescale, zero).store(x + j);
      select(shown, derived, zero).store(grad + j);
    }
  }

  // Weights and gradients of the logits as words; returns how many words deep their columns are.
  int64_t pair_up(int64_t rows, int64_t columns) {
    if constexpr (In::pairs == 1) {
      return rows;
    } else {
      const int64_t all = rounded_up(rows, unit * In::pairs);
      std::fill(weights_ + rows * panel_keys, weights_ + all * panel_keys, T{0});
      std::fill(grad_weights_ + rows * panel_keys, grad_weights_ + all * panel_keys, T{0});
      for (int64_t r = 0; r < all; r += 2) {
        const T* const x = weights_ + r * panel_keys;
        const T* const grad = grad_weights_ + r * panel_keys;
        pair_rows(x, x + panel_keys, columns, weights_below_ + r / 2 * panel_keys);
        pair_rows(grad, grad + panel_keys, columns, grad_logits_below_ + r / 2 * panel_keys);
        pair_in_row(grad, columns, grad_logits_ + r * panel_keys / 2);
        pair_in_row(grad + panel_keys, columns, grad_logits_ + (r + 1) * panel_keys / 2);
      }
      return all / In::pairs;
    }
  }

  void write_keys(const BackwardTask& task, int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      zero_row<Type>(p_.grad_key, task.b, task.kv_head, key, p_.head_dim);
      zero_row<Type>(p_.grad_value, task.b, task.kv_head, key, p_.value_dim);
    }
    for (int64_t i = 0; i < list_.count; ++i) {
      write_panel(
          task,
          list_.first[i],
          grad_key_ + i * panel_keys * width_,
          width_,
          p_.grad_key,
          p_.head_dim,
          static_cast<T>(p_.scale));
      write_panel(
          task,
          list_.first[i],
          grad_value_ + i * panel_keys * value_width_,
          value_width_,
          p_.grad_value,
          p_.value_dim,
          T{1});
    }
  }

  // Of the keys that are not padded: an Inf in the gradient of the output would make a NaN of
  // those.
  void write_panel(
      const BackwardTask& task,
      const Panel& panel,
      const T* grad,
      int64_t width,
      const Heads& to,
      int64_t n,
      T factor) {
    transpose(grad, panel_keys, width, panel.columns, turned_, width);
    for (int64_t j = 0; j < panel.columns; ++j) {
      if (panel.keep >> j & 1) {
        write_row<Type>(to, task.b, task.kv_head, panel.first + j, turned_ + j * width, n, factor);
      }
    }
  }

  const AttentionProblem& p_;
  Arena arena_;
  // Words of a row of query or key, of value or output; their elements; all rounded up.
  const int64_t depth_, value_depth_, width_, value_width_;
  const int64_t chunk_keys_;
  const Dropout dropout_;
  PanelList list_;
  Word *key_, *key_below_, *value_, *query_, *query_turned_, *grad_output_, *grad_output_turned_;
  Word *packing_, *weights_below_, *grad_logits_below_, *grad_logits_;
  typename Type::storage* passed_;
  T *grad_key_, *grad_value_, *grad_query_, *turned_, *weights_, *grad_weights_, *slope_, *delta_;
  T* logsumexp_;
  uint64_t* kept_;
};

template <class Type, class T>
void add_partials(const AttentionProblem& p, int64_t b, int64_t h) {
  T sums[most_columns];
  for (int64_t row = 0; row < p.queries; ++row) {
    std::fill(sums, sums + p.head_dim, T{0});
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const T* const from = static_cast<const T*>(p.partial_grad_query) +
          row_of(p, chunk * p.batch + b, h, row) * p.head_dim;
      for (int64_t j = 0; j < p.head_dim; ++j) {
        sums[j] += from[j];
      }
    }
    write_row<Type>(p.grad_query, b, h, row, sums, p.head_dim, static_cast<T>(p.scale));
  }
}

}  // namespace
}  // namespace fastguard
