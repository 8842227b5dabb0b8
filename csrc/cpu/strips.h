// Strips: at most `strip_channels` neighbouring channels of many frames, in vectors; and the
// activations of the speech models. Frames are rows of C channels.
//
// In an unnamed namespace for the same reason as elements.h.
#pragma once

#include "strip_channels.h"
#include "vector.h"

#include <algorithm>
#include <cstdint>

namespace fastguard {
namespace {

// The first n elements as a vector with zeros behind them; n may be anything.
template <class T, class Type>
inline Vec<T> load_part(const typename Type::storage* x, int64_t n) {
  constexpr int64_t lanes = Vec<T>::lanes;
  if (n >= lanes) {
    return load_as<T, Type>(x);
  }
  typename Type::storage part[lanes] = {};
  std::copy_n(x, std::max<int64_t>(0, n), part);
  return load_as<T, Type>(part);
}

// The first n elements of a vector.
template <class T, class Type>
inline void store_part(Vec<T> v, typename Type::storage* x, int64_t n) {
  constexpr int64_t lanes = Vec<T>::lanes;
  if (n >= lanes) {
    store_as<Type>(v, x);
    return;
  }
  typename Type::storage part[lanes];
  store_as<Type>(v, part);
  std::copy_n(part, std::max<int64_t>(0, n), x);
}

// The same for memory that has the type of the computation.
template <class T>
using Same = std::conditional_t<std::is_same_v<T, double>, Float64, Float32>;

// The channels of one strip: of a frame, or one number for each channel.
template <class T>
struct Strip {
  static constexpr int lanes = Vec<T>::lanes;
  static constexpr int vectors = strip_channels / lanes;
  Vec<T> at[vectors];

  static Strip all(T x) {
    Strip s;
    for (int v = 0; v < vectors; ++v)
      s.at[v] = Vec<T>::all(x);
    return s;
  }
  // Zeros where the strip_channels has fewer channels.
  template <class Type = Same<T>>
  static Strip load(const typename Type::storage* x, int64_t channels) {
    Strip s;
    for (int v = 0; v < vectors; ++v)
      s.at[v] = load_part<T, Type>(x + v * lanes, channels - v * lanes);
    return s;
  }
  template <class Type = Same<T>>
  void store(typename Type::storage* x, int64_t channels) const {
    for (int v = 0; v < vectors; ++v)
      store_part<T, Type>(at[v], x + v * lanes, channels - v * lanes);
  }
  template <class F>
  static Strip map(const F& f) {
    Strip s;
    for (int v = 0; v < vectors; ++v)
      s.at[v] = f(v);
    return s;
  }
  friend Strip operator+(const Strip& a, const Strip& b) {
    return map([&](int v) { return a.at[v] + b.at[v]; });
  }
  friend Strip operator-(const Strip& a, const Strip& b) {
    return map([&](int v) { return a.at[v] - b.at[v]; });
  }
  friend Strip operator*(const Strip& a, const Strip& b) {
    return map([&](int v) { return a.at[v] * b.at[v]; });
  }
};

template <class T>
inline Strip<T> fma(const Strip<T>& a, const Strip<T>& b, const Strip<T>& c) {
  return Strip<T>::map([&](int v) { return fma(a.at[v], b.at[v], c.at[v]); });
}

// Sums over many frames: a few in the type of the computation, their sums in double.
template <class T>
class StripSum {
 public:
  void add(const Strip<T>& x) {
    few_ = few_ + x;
    if (++added_ == most_added) {
      flush();
    }
  }
  const double* total() {
    flush();
    return total_;
  }

 private:
  static constexpr int most_added = 32;

  void flush() {
    T few[strip_channels];
    few_.store(few, strip_channels);
    for (int64_t c = 0; c < strip_channels; ++c) {
      total_[c] += few[c];
    }
    few_ = Strip<T>::all(0);
    added_ = 0;
  }

  Strip<T> few_ = Strip<T>::all(0);
  int added_ = 0;
  double total_[strip_channels] = {};
};

// --- activations
// ------------------------------------------------------------------------------------

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one = Vec<T>::all(1);
  return one / (one + exp(Vec<T>::all(0) - x));
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
  return x / (Vec<T>::all(1) + exp(Vec<T>::all(0) - x));
}

// The derivative of silu.
template <class T>
inline Vec<T> silu_slope(Vec<T> x) {
  const Vec<T> one = Vec<T>::all(1), s = sigmoid(x);
  return s * (one + x * (one - s));
}

}  // namespace
}  // namespace fastguard
