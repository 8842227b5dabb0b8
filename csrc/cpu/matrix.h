// Products of small matrices, c += a b, and what brings matrices into the form for them.
//
// Everything is made of words: a float, a double, or two bf16 that are neighbours along the
// contraction. With that a, b and c are the same three arrays whatever the arithmetic:
//   a: rows x depth words, the depth contiguous;  b: depth x columns words, the columns contiguous;
//   c: rows x columns sums.
#pragma once

#include "vector.h"

#include <algorithm>
#include <cstring>

namespace fastguard {
namespace {

template <class T>
struct InWide {
  using Word = T;
  using Sum = T;
  static constexpr int pairs = 1;  // elements to a word
};
using InFloat = InWide<float>;
using InDouble = InWide<double>;

// Products exact, sums in float; denormals are zeros to the instructions.
struct InBFloat16 {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int pairs = 2;
};

constexpr int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Depth and columns are multiples of it, rows of a are there up to one: what a tile of AMX holds.
constexpr int64_t unit = 16;

// --- products
// ---------------------------------------------------------------------------------------

#ifdef __AVX512BF16__
inline __m512bh as_bf16(__m512i words) {
  __m512bh pairs;
  std::memcpy(&pairs, &words, sizeof(pairs));
  return pairs;
}
#endif

template <class In>
struct Words {
  using Type = Vec<typename In::Word>;
  static Type load(const typename In::Word* x) { return Type::load(x); }
  static Type all(typename In::Word x) { return Type::all(x); }
  static Vec<typename In::Sum> dot(Type a, Type b, Vec<typename In::Sum> c) { return fma(a, b, c); }
};

#ifdef __AVX512BF16__
template <>
struct Words<InBFloat16> {
  using Type = __m512i;
  static Type load(const uint32_t* x) { return _mm512_loadu_si512(x); }
  static Type all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Floats dot(Type a, Type b, Floats c) {
    return {_mm512_dpbf16_ps(c.v, as_bf16(a), as_bf16(b))};
  }
};
#endif

template <class In>
struct Matrices {
  const typename In::Word* a;
  int64_t a_row;
  const typename In::Word* b;
  int64_t b_row;
  typename In::Sum* c;
  int64_t c_row;
};

// R x V vectors of c stay in registers; of AVX-512's 32 that leaves 8 for b and a. They start at
// zero also where c is added to: errors grow with the length of a sum.
#ifdef __AVX512F__
constexpr int most_vectors = 4;
// One vector alone needs more rows: a core starts two products in a cycle, and a sum is ready four
// cycles later.
constexpr int most_rows(int vectors) { return vectors == 1 ? 16 : 6; }
#else
constexpr int most_vectors = 2;
constexpr int most_rows(int) { return 6; }
#endif

template <class In, int R, int V>
inline void multiply_in_registers(const Matrices<In>& m, int64_t depth, bool add) {
  using Sums = Vec<typename In::Sum>;
  using W = Words<In>;
  Sums c[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      c[r][v] = Sums::all(0);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename W::Type b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      b[v] = W::load(m.b + k * m.b_row + v * Sums::lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename W::Type a = W::all(m.a[r * m.a_row + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        c[r][v] = W::dot(a, b[v], c[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      auto* const to = m.c + r * m.c_row + v * Sums::lanes;
      (add ? Sums::load(to) + c[r][v] : c[r][v]).store(to);
    }
  }
}

template <class In, int V, int R = most_rows(V)>
inline void multiply_rows(const Matrices<In>& m, int64_t rows, int64_t depth, bool add) {
  if constexpr (R > 0) {
    if (rows == R) {
      multiply_in_registers<In, R, V>(m, depth, add);
    } else {
      multiply_rows<In, V, R - 1>(m, rows, depth, add);
    }
  }
}

template <class In, int V>
inline void multiply_columns(Matrices<In> m, int64_t rows, int64_t depth, bool add) {
  constexpr int most = most_rows(V);
  for (int64_t r = 0; r < rows; r += most) {
    multiply_rows<In, V>(m, std::min<int64_t>(most, rows - r), depth, add);
    m.a += most * m.a_row;
    m.c += most * m.c_row;
  }
}

// c = a b, or c += a b. Columns are a multiple of `unit`.
template <class In>
void multiply(Matrices<In> m, int64_t rows, int64_t columns, int64_t depth, bool add) {
  constexpr int64_t lanes = Vec<typename In::Sum>::lanes;
  for (int64_t left = columns / lanes; left > 0;) {
    const int64_t vectors = std::min<int64_t>(left, most_vectors);
    if (vectors == 1) {
      multiply_columns<In, 1>(m, rows, depth, add);
    } else if (vectors == 2) {
      multiply_columns<In, 2>(m, rows, depth, add);
    }
#ifdef __AVX512F__
    else if (vectors == 3) {
      multiply_columns<In, 3>(m, rows, depth, add);
    } else {
      multiply_columns<In, 4>(m, rows, depth, add);
    }
#endif
    left -= vectors;
    m.b += vectors * lanes;
    m.c += vectors * lanes;
  }
}

#ifdef __AMX_BF16__

// Eight tiles of 16 rows of 64 bytes, as long as this lives; what another library had set up,
// oneDNN for one, is there again afterwards.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    see(before_);
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    see(config);
    _tile_loadconfig(config);
  }
  ~Tiles() {
    see(before_);
    _tile_loadconfig(before_);
  }
  Tiles(const Tiles&) = delete;

  // gcc 12 does not know that the instructions read and write all of the memory at an address (its
  // bug 114098).
  static void see(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

 private:
  alignas(64) uint8_t before_[64];
};

// Tiles of c: 0 to 3, of a: 4 and 5, of b: 6 and 7. Which tile is part of an instruction.
template <int R, int V>
inline void multiply_in_tiles(const Matrices<InBFloat16>& m, int64_t depth, bool add) {
  Tiles::see(m.a);
  const int64_t a_bytes = m.a_row * 4, b_bytes = m.b_row * 4, c_bytes = m.c_row * 4;
  float* const c[4] = {m.c, m.c + 16, m.c + 16 * m.c_row, m.c + 16 * m.c_row + 16};
#define FASTGUARD_EACH_OF_C(What) \
  {                               \
    What(0);                      \
    if constexpr (V > 1)          \
      What(1);                    \
    if constexpr (R > 1)          \
      What(2);                    \
    if constexpr (R > 1 && V > 1) \
      What(3);                    \
  }
#define FASTGUARD_LOAD_C(tile) _tile_loadd(tile, c[tile], c_bytes)
#define FASTGUARD_ZERO_C(tile) _tile_zero(tile)
#define FASTGUARD_STORE_C(tile) _tile_stored(tile, c[tile], c_bytes)
  if (add) {
    FASTGUARD_EACH_OF_C(FASTGUARD_LOAD_C)
  } else {
    FASTGUARD_EACH_OF_C(FASTGUARD_ZERO_C)
  }
  for (int64_t k = 0; k < depth; k += unit) {
    _tile_loadd(4, m.a + k, a_bytes);
    _tile_loadd(6, m.b + k * m.b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V > 1) {
      _tile_loadd(7, m.b + k * m.b_row + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, m.a + 16 * m.a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (V > 1)
        _tile_dpbf16ps(3, 5, 7);
    }
  }
  FASTGUARD_EACH_OF_C(FASTGUARD_STORE_C)
  Tiles::see(m.c);
#undef FASTGUARD_EACH_OF_C
#undef FASTGUARD_LOAD_C
#undef FASTGUARD_ZERO_C
#undef FASTGUARD_STORE_C
}

// Whole tiles: rows of a and c beyond `rows` are there, up to a multiple of `unit`.
template <>
inline void multiply<InBFloat16>(
    Matrices<InBFloat16> m, int64_t rows, int64_t columns, int64_t depth, bool add) {
  for (int64_t r = 0; r < rows; r += 2 * unit) {
    const bool two = rows - r > unit;
    for (int64_t n = 0; n < columns; n += 2 * unit) {
      const bool wide = columns - n > unit;
      const Matrices<InBFloat16> at{
          m.a + r * m.a_row, m.a_row, m.b + n, m.b_row, m.c + r * m.c_row + n, m.c_row};
      if (two) {
        wide ? multiply_in_tiles<2, 2>(at, depth, add) : multiply_in_tiles<2, 1>(at, depth, add);
      } else {
        wide ? multiply_in_tiles<1, 2>(at, depth, add) : multiply_in_tiles<1, 1>(at, depth, add);
      }
    }
  }
}

#else

class Tiles {
 public:
  Tiles() {}  // not trivial: nobody warns that it is not used
};

#endif

// --- forms of a matrix
// ------------------------------------------------------------------------------

#ifdef __AVX512F__
// 16 x 16 words: pairs of rows, of pairs, of quarters and of halves change places.
inline void transpose_16(const void* from, int64_t from_row, void* to, int64_t to_row) {
  const auto* x = static_cast<const uint32_t*>(from);
  auto* y = static_cast<uint32_t*>(to);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    a[i] = _mm512_loadu_si512(x + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(y + i * to_row, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(y + (4 + i) * to_row, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_si512(y + (8 + i) * to_row, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_si512(y + (12 + i) * to_row, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
  }
}
#endif

// to (columns x rows) = from (rows x columns); both are multiples of `unit`.
template <class Word>
inline void transpose(
    const Word* from, int64_t from_row, int64_t rows, int64_t columns, Word* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += unit) {
    for (int64_t c = 0; c < columns; c += unit) {
      const Word* x = from + r * from_row + c;
      Word* y = to + c * to_row + r;
#ifdef __AVX512F__
      if constexpr (sizeof(Word) == 4) {
        transpose_16(x, from_row, y, to_row);
        continue;
      }
#endif
      for (int64_t i = 0; i < unit; ++i) {
        for (int64_t j = 0; j < unit; ++j) {
          y[j * to_row + i] = x[i * from_row + j];
        }
      }
    }
  }
}

// n elements as words of their own (floats, doubles); zeros up to `width` words.
template <class Type, class T>
inline void widen_row(const typename Type::storage* from, int64_t n, T* to, int64_t width) {
  int64_t i = 0;
  for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) {
    load_as<T, Type>(from + i).store(to + i);
  }
  for (; i < n; ++i) {
    to[i] = static_cast<T>(Type::widen(from[i]));
  }
  std::fill(to + n, to + std::max(n, width), T{0});
}

// Two bf16 to a word, neighbours in the row.
inline void pair_in_row(const uint16_t* from, int64_t n, uint32_t* to, int64_t width) {
  std::memcpy(to, from, n * 2);
  std::memset(reinterpret_cast<uint16_t*>(to) + n, 0, width * 4 - n * 2);
}

// Two bf16 to a word, one below the other.
inline void pair_rows(
    const uint16_t* upper, const uint16_t* lower, int64_t n, uint32_t* to, int64_t width) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = upper[i] | uint32_t{lower[i]} << 16;
  }
  std::fill(to + n, to + width, 0u);
}

#ifdef __AVX512BF16__
inline __m512i narrowed(Floats low, Floats high) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(high.v, low.v);
  __m512i words;
  std::memcpy(&words, &pairs, sizeof(words));
  return words;
}

// The same of floats, rounded; n is a multiple of 2 `unit`.
inline void pair_in_row(const float* from, int64_t n, uint32_t* to) {
  for (int64_t i = 0; i < n; i += 32) {
    _mm512_storeu_si512(to + i / 2, narrowed(Floats::load(from + i), Floats::load(from + i + 16)));
  }
}

inline void pair_rows(const float* upper, const float* lower, int64_t n, uint32_t* to) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) {
    order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  }
  const __m512i interleaved = _mm512_load_si512(order);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i words = narrowed(Floats::load(upper + i), Floats::load(lower + i));
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(interleaved, words));
  }
}
#endif

}  // namespace
}  // namespace fastguard
