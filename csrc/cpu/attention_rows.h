// What forward and backward share of attention: scratch memory, packed heads, logits and their
// masks, and which weights dropout keeps.
#pragma once

#include "attention_problem.h"
#include "matrix.h"
#include "philox.h"

namespace fastguard {
namespace {

// Cuts scratch memory into arrays. On a null pointer it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : first_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t n) {
    char* const at = first_ == nullptr ? nullptr : first_ + used_;
    used_ += rounded_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }

  int64_t used() const { return used_; }

 private:
  char* first_;
  int64_t used_ = 0;
};

template <class Type>
inline const typename Type::storage* row_at(const Heads& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<const typename Type::storage*>(x.data) + b * x.batch + h * x.head +
      row * x.row;
}

// Elements as wide as sums of T are.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, Float64, Float32>;

template <class Type, class T>
inline void write_row(
    const Heads& x, int64_t b, int64_t h, int64_t row, const T* from, int64_t n, T factor) {
  auto* to = const_cast<typename Type::storage*>(row_at<Type>(x, b, h, row));
  int64_t i = 0;
  for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) {
    store_as<Type>(Vec<T>::load(from + i) * Vec<T>::all(factor), to + i);
  }
  for (; i < n; ++i) {
    to[i] = Type::narrow(from[i] * factor);
  }
}

template <class Type>
inline void zero_row(const Heads& x, int64_t b, int64_t h, int64_t row, int64_t n) {
  std::memset(
      const_cast<typename Type::storage*>(row_at<Type>(x, b, h, row)),
      0,
      n * sizeof(typename Type::storage));
}

inline int64_t row_of(const AttentionProblem& p, int64_t b, int64_t h, int64_t row) {
  return (b * p.heads + h) * p.queries + row;
}

// --- 64 rows as words
// -------------------------------------------------------------------------------

// Up to 64 rows of a head, of which `keep` says which are read; the others are zeros, so that what
// stands in padded keys, a NaN even, reaches nothing.
template <class Type, class In>
struct Rows {
  const typename Type::storage* first;
  int64_t row;
  int64_t columns;
  uint64_t keep;

  bool kept(int64_t i) const { return keep >> i & 1; }
  const typename Type::storage* at(int64_t i) const {
    static constexpr typename Type::storage zeros[most_columns] = {};
    return kept(i) ? first + i * row : zeros;
  }
};

// The first `count` rows as `a` of a product along the columns: count x width.
template <class Type, class In>
inline void pack_rows(
    const Rows<Type, In>& rows, int64_t count, typename In::Word* to, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (In::pairs == 2) {
      pair_in_row(rows.at(i), rows.columns, to + i * width, width);
    } else {
      widen_row<Type>(rows.at(i), rows.columns, to + i * width, width);
    }
  }
}

// The first `count` rows as `b` of a product along the rows: (count / pairs) x width.
template <class Type, class In>
inline void pack_below(
    const Rows<Type, In>& rows, int64_t count, typename In::Word* to, int64_t width) {
  if constexpr (In::pairs == 2) {
    for (int64_t i = 0; i < count; i += 2) {
      pair_rows(rows.at(i), rows.at(i + 1), rows.columns, to + i / 2 * width, width);
    }
  } else {
    pack_rows(rows, count, to, width);
  }
}

// --- masks and logits
// -------------------------------------------------------------------------------

struct Place {
  int64_t b, h, row;
};

inline uint64_t first_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

inline bool seen(const AttentionProblem& p, const Panel& panel, int64_t last_row) {
  return !p.is_causal || panel.first <= last_row;
}

// Address of the mask's element for a row and the first key of a panel.
template <class Element>
inline const Element* mask_at(const AttentionProblem& p, const Panel& panel, const Place& at) {
  return static_cast<const Element*>(p.mask.data) + at.b * p.mask.batch + at.h * p.mask.head +
      at.row * p.mask.row + panel.first * p.mask.column;
}

// A bit for each of n bytes, 64 at most: whether it is not 0.
inline uint64_t nonzero_bytes(const uint8_t* x, int64_t n) {
#ifdef __AVX512BW__
  const __m512i bytes = _mm512_maskz_loadu_epi8(first_bits(n), x);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
  uint64_t bits = 0;
  int64_t i = 0;
#ifdef __AVX2__
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    bits |= uint64_t{~static_cast<uint32_t>(_mm256_movemask_epi8(zero))} << i;
  }
#endif
  for (; i < n; ++i) {
    bits |= uint64_t{x[i] != 0} << i;
  }
  return bits;
#endif
}

// Which keys of a panel a bool mask shows to a row.
inline uint64_t shown_keys(const AttentionProblem& p, const Panel& panel, const Place& at) {
  const auto* mask = mask_at<uint8_t>(p, panel, at);
  const int64_t n = std::min(panel_keys, p.keys - panel.first);
  if (p.mask.column == 1) {
    return nonzero_bytes(mask, n);
  }
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; ++j) {
    bits |= uint64_t{mask[j * p.mask.column] != 0} << j;
  }
  return bits;
}

// Which keys of a panel a row sees.
inline uint64_t keys_of_row(const AttentionProblem& p, const Panel& panel, const Place& at) {
  uint64_t bits = panel.keep;
  if (p.is_causal) {
    bits &= first_bits(std::max<int64_t>(0, at.row - panel.first + 1));
  }
  if (p.mask.kind == MaskKind::shown) {
    bits &= shown_keys(p, panel, at);
  }
  return bits;
}

inline bool is_additive(const AttentionProblem& p) {
  return p.mask.kind == MaskKind::wide || p.mask.kind == MaskKind::narrow;
}

// What is added to the logits of a row and a panel's keys, widened.
template <class Type, class T>
inline void read_added(
    const AttentionProblem& p, const Panel& panel, const Place& at, T (&added)[panel_keys]) {
  const auto* mask = mask_at<typename Type::storage>(p, panel, at);
  const int64_t n = std::min(panel_keys, p.keys - panel.first);
  int64_t j = 0;
  if (p.mask.column == 1) {
    for (; j + Vec<T>::lanes <= n; j += Vec<T>::lanes) {
      load_as<T, Type>(mask + j).store(added + j);
    }
  }
  for (; j < n; ++j) {
    added[j] = static_cast<T>(Type::widen(mask[j * p.mask.column]));
  }
}

// Whether the logits are the products times the scale, and no more.
inline bool is_plain(const AttentionProblem& p) { return p.softcap == 0.0 && !is_additive(p); }

// Products of a row with the keys of a panel become logits where they are more than plain. `slope`,
// if not null, gets the derivative of the softcap.
template <class Type, class T>
inline void finish_logits(
    const AttentionProblem& p, const Panel& panel, const Place& at, T* x, T* slope) {
  using V = Vec<T>;
  alignas(64) T added[panel_keys] = {};
  if (p.mask.kind == MaskKind::wide) {
    read_added<Wide<T>>(p, panel, at, added);
  }
  if constexpr (!std::is_same_v<Type, Wide<T>>) {
    if (p.mask.kind == MaskKind::narrow) {
      read_added<Type>(p, panel, at, added);
    }
  }
  const bool capped = p.softcap != 0.0;
  const V scale = V::all(static_cast<T>(capped ? p.scale / p.softcap : p.scale));
  const V cap = V::all(static_cast<T>(p.softcap)), one = V::all(1);
  for (int64_t j = 0; j < panel.columns; j += V::lanes) {
    V v = V::load(x + j) * scale;
    if (capped) {
      const V bent = tanh(v);
      v = bent * cap;
      if (slope != nullptr) {
        (one - bent * bent).store(slope + j);
      }
    }
    (V::load(added + j) + v).store(x + j);
  }
}

// --- dropout
// ----------------------------------------------------------------------------------------

#ifdef __AVX2__
#ifdef __AVX512F__
constexpr int drawn_together = 16;
using Counters = __m512i;
inline Counters counters(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Counters from_zero() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline Counters plus(Counters a, Counters b) { return _mm512_add_epi32(a, b); }
inline Counters exclusive_or(Counters a, Counters b) { return _mm512_xor_si512(a, b); }
inline void multiply_wide(Counters x, uint32_t by, Counters& high, Counters& low) {
  const Counters factor = counters(by);
  const Counters even = _mm512_mul_epu32(x, factor);
  const Counters odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
// A bit for each 16-bit number that is at most `bound`.
inline uint32_t at_most(Counters numbers, uint16_t bound) {
  return _mm512_cmple_epu16_mask(numbers, _mm512_set1_epi16(static_cast<short>(bound)));
}
#else
constexpr int drawn_together = 8;
using Counters = __m256i;
inline Counters counters(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Counters from_zero() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Counters plus(Counters a, Counters b) { return _mm256_add_epi32(a, b); }
inline Counters exclusive_or(Counters a, Counters b) { return _mm256_xor_si256(a, b); }
inline void multiply_wide(Counters x, uint32_t by, Counters& high, Counters& low) {
  const Counters factor = counters(by);
  const Counters even = _mm256_mul_epu32(x, factor);
  const Counters odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline uint32_t at_most(Counters numbers, uint16_t bound) {
  const __m256i most = _mm256_set1_epi16(static_cast<short>(bound));
  const __m256i kept = _mm256_cmpeq_epi16(_mm256_min_epu16(numbers, most), numbers);
  const auto bytes =
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(kept, _mm256_setzero_si256())));
  return (bytes & 0xff) | (bytes >> 8 & 0xff00);
}
#endif

// philox of csrc/philox.h for calls `call` to `call + drawn_together - 1` of a tile.
inline void draw(
    const int64_t* seed,
    int64_t head,
    int64_t row_tile,
    int64_t column_tile,
    int call,
    Counters (&words)[4]) {
  const auto start = static_cast<uint32_t>(row_tile * dropout_calls + call);
  Counters c[4] = {
      plus(counters(start), from_zero()),
      counters(static_cast<uint32_t>(column_tile)),
      counters(static_cast<uint32_t>(head)),
      counters(static_cast<uint32_t>(seed[1]))};
  auto key0 = static_cast<uint32_t>(seed[0]);
  auto key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed[0]) >> 32);
  for (int round = 0; round < philox_rounds; ++round) {
    Counters high0, low0, high1, low1;
    multiply_wide(c[0], philox_m0, high0, low0);
    multiply_wide(c[2], philox_m1, high1, low1);
    c[0] = exclusive_or(exclusive_or(high1, c[1]), counters(key0));
    c[1] = low1;
    c[2] = exclusive_or(exclusive_or(high0, c[3]), counters(key1));
    c[3] = low0;
    key0 += philox_w0;
    key1 += philox_w1;
  }
  std::copy(c, c + 4, words);
}
#endif

template <class T>
inline T rescale_of(const Dropout& dropout) {
  return T{65536} / static_cast<T>(dropout.threshold);
}

// For each row of a tile of 16 x 16 weights a bit for each weight that is kept.
inline void kept_in_tile(
    const int64_t* seed,
    uint32_t threshold,
    int64_t head,
    int64_t row_tile,
    int64_t column_tile,
    uint16_t (&rows)[dropout_tile]) {
  std::fill(rows, rows + dropout_tile, uint16_t{0});
#ifdef __AVX2__
  for (int call = 0; call < dropout_calls; call += drawn_together) {
    Counters words[4];
    draw(seed, head, row_tile, column_tile, call, words);
    for (int word = 0; word < 4; ++word) {
      // Words of four calls side by side are 8 numbers of one row: a byte of `kept`.
      const uint32_t kept = at_most(words[word], static_cast<uint16_t>(threshold - 1));
      for (int g = 0; g < drawn_together / 4; ++g) {
        rows[word % 2 * 8 + call / 4 + g] |=
            static_cast<uint16_t>((kept >> (8 * g) & 0xff) << (word / 2 * 8));
      }
    }
  }
#else
  for (int call = 0; call < dropout_calls; ++call) {
    const Random128 drawn = dropout_draw(seed, head, row_tile, column_tile, call);
    for (int number = 0; number < 8; ++number) {
      const int word = number / 2, half = number % 2;
      const uint32_t value = drawn.at[word] >> (16 * half) & 0xffff;
      rows[word % 2 * 8 + call / 4] |= static_cast<uint16_t>(
          uint32_t{value < threshold} << (word / 2 * 8 + call % 4 * 2 + half));
    }
  }
#endif
}

// The same for `rows` rows from a multiple of 16 on and the keys of a panel.
inline void kept_in_panel(
    const AttentionProblem& p,
    uint32_t threshold,
    const Place& first,
    int64_t rows,
    const Panel& panel,
    uint64_t* kept) {
  const int64_t head = first.b * p.heads + first.h;
  for (int64_t r = 0; r < rows; r += dropout_tile) {
    std::fill(kept + r, kept + r + dropout_tile, uint64_t{0});
    for (int64_t c = 0; c < panel.columns; c += dropout_tile) {
      uint16_t bits[dropout_tile];
      kept_in_tile(
          p.seed,
          threshold,
          head,
          (first.row + r) / dropout_tile,
          (panel.first + c) / dropout_tile,
          bits);
      for (int i = 0; i < dropout_tile; ++i) {
        kept[r + i] |= uint64_t{bits[i]} << c;
      }
    }
  }
}

// Bound on the output as its type holds it: what is compared with saved outputs.
template <class Type, class T>
inline T bound_of(double clamp) {
  return static_cast<T>(Type::widen(Type::narrow(clamp)));
}

}  // namespace
}  // namespace fastguard
