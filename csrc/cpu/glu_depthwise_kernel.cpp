// One source, compiled once per instruction set with FASTGUARD_CAPABILITY as its name.

#include "glu_depthwise_kernel.h"

#include "concat.h"
#include "strips.h"

namespace fastguard {
namespace {

constexpr int64_t most_rows = block_frames + most_taps - 1;

// One strip of channels.
template <class Type>
class Filters {
 public:
  using Storage = typename Type::storage;
  using T = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;

  Filters(const GluDepthwise& p, int64_t first)
      : p_(p),
        first_(first),
        width_(std::min(strip_channels, p.channels - first)),
        reach_(p.taps / 2) {
    const auto* const weight = static_cast<const T*>(p.weight);
    for (int64_t k = 0; k < p.taps; ++k) {
      for (int64_t c = 0; c < strip_channels; ++c) {
        weight_[k][c] = c < width_ ? weight[(first + c) * p.taps + k] : T{0};
      }
    }
  }

  void forward(int64_t b, int64_t begin) {
    const int64_t end = std::min(begin + block_frames, p_.frames);
    T gated[most_rows][strip_channels];
    read_gated(b, begin - reach_, end + reach_, gated);
    for (int64_t t = begin; t < end; ++t) {
      Strip<T> sum = Strip<T>::all(0);
      for (int64_t k = 0; k < p_.taps; ++k) {
        sum = fma(row(gated[t - begin + k]), row(weight_[k]), sum);
      }
      sum.template store<Type>(frame(p_.output, b, t, p_.channels), width_);
    }
  }

  void backward() {
    std::fill_n(grad_weight_[0], most_taps * strip_channels, 0.0);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t begin = 0; begin < p_.frames; begin += block_frames) {
        backward_of_block(b, begin, std::min(begin + block_frames, p_.frames));
      }
    }
    auto* const grad_weight = static_cast<T*>(p_.grad_weight);
    for (int64_t c = 0; c < width_; ++c) {
      for (int64_t k = 0; k < p_.taps; ++k) {
        grad_weight[(first_ + c) * p_.taps + k] = static_cast<T>(grad_weight_[k][c]);
      }
    }
  }

 private:
  static Strip<T> row(const T (&x)[strip_channels]) { return Strip<T>::load(x, strip_channels); }

  template <class Pointer>
  auto* frame(Pointer* frames, int64_t b, int64_t t, int64_t channels) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const Storage, Storage>;
    return static_cast<Element*>(frames) + (b * p_.frames + t) * channels + first_;
  }
  bool is_shown(int64_t b, int64_t t) const {
    return t >= 0 && t < p_.frames && p_.padded[b * p_.frames + t] == 0;
  }
  Strip<T> value(int64_t b, int64_t t) const {
    return Strip<T>::template load<Type>(frame(p_.x, b, t, 2 * p_.channels), width_);
  }
  Strip<T> gate(int64_t b, int64_t t) const {
    const auto* const x = frame(p_.x, b, t, 2 * p_.channels) + p_.channels;
    const Strip<T> logit = Strip<T>::template load<Type>(x, width_);
    return Strip<T>::map([&](int v) { return sigmoid(logit.at[v]); });
  }

  // GLU's output in the frames from begin to end - 1, zeros where there is padding or no frame.
  void read_gated(int64_t b, int64_t begin, int64_t end, T (*gated)[strip_channels]) const {
    for (int64_t t = begin; t < end; ++t) {
      const Strip<T> x = is_shown(b, t) ? value(b, t) * gate(b, t) : Strip<T>::all(0);
      x.store(gated[t - begin], strip_channels);
    }
  }

  void backward_of_block(int64_t b, int64_t begin, int64_t end) {
    T gated[most_rows][strip_channels], grad[most_rows][strip_channels];
    read_gated(b, begin - reach_, end + reach_, gated);
    for (int64_t t = begin - reach_; t < end + reach_; ++t) {
      const bool there = t >= 0 && t < p_.frames;
      const Strip<T> x = there
          ? Strip<T>::template load<Type>(frame(p_.grad_output, b, t, p_.channels), width_)
          : Strip<T>::all(0);
      x.store(grad[t - begin + reach_], strip_channels);
    }
    add_to_grad_weight(end - begin, gated, grad);
    for (int64_t t = begin; t < end; ++t) {
      Strip<T> sum = Strip<T>::all(0);
      for (int64_t k = 0; k < p_.taps; ++k) {
        sum = fma(row(grad[t - begin + p_.taps - 1 - k]), row(weight_[k]), sum);
      }
      write_grad_x(b, t, sum);
    }
  }

  void add_to_grad_weight(
      int64_t frames, const T (*gated)[strip_channels], const T (*grad)[strip_channels]) {
    for (int64_t k = 0; k < p_.taps; ++k) {
      Strip<T> sum = Strip<T>::all(0);
      for (int64_t i = 0; i < frames; ++i) {
        sum = fma(row(gated[i + k]), row(grad[i + reach_]), sum);
      }
      T of_block[strip_channels];
      sum.store(of_block, strip_channels);
      for (int64_t c = 0; c < strip_channels; ++c) {
        grad_weight_[k][c] += of_block[c];
      }
    }
  }

  // Through GLU: value * sigmoid(logit).
  void write_grad_x(int64_t b, int64_t t, const Strip<T>& grad) {
    Strip<T> of_value = Strip<T>::all(0), of_logit = of_value;
    if (is_shown(b, t)) {
      const Strip<T> open = gate(b, t), one = Strip<T>::all(1);
      of_value = grad * open;
      of_logit = of_value * value(b, t) * (one - open);
    }
    auto* const to = frame(p_.grad_x, b, t, 2 * p_.channels);
    of_value.template store<Type>(to, width_);
    of_logit.template store<Type>(to + p_.channels, width_);
  }

  const GluDepthwise& p_;
  const int64_t first_, width_, reach_;
  T weight_[most_taps][strip_channels];
  double grad_weight_[most_taps][strip_channels];
};

template <class Type>
void forward(const GluDepthwise& p, int64_t b, int64_t frame, int64_t channel) {
  Filters<Type>(p, channel).forward(b, frame);
}

template <class Type>
void backward(const GluDepthwise& p, int64_t channel) {
  Filters<Type>(p, channel).backward();
}

}  // namespace

extern const GluDepthwiseKernels FASTGUARD_CONCAT(glu_depthwise_kernels_, FASTGUARD_CAPABILITY) = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>}};

}  // namespace fastguard
