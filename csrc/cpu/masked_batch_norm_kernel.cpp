// One source, compiled once per instruction set with FASTGUARD_CAPABILITY as its name.

#include "masked_batch_norm_kernel.h"

#include "concat.h"
#include "strips.h"

#include <cmath>

namespace fastguard {
namespace {

// One strip of channels of all frames.
template <class Type>
class Channels {
 public:
  using Storage = typename Type::storage;
  using T = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;

  Channels(const MaskedBatchNorm& p, int64_t first)
      : p_(p), first_(first), width_(std::min(strip_channels, p.channels - first)) {}

  void forward() {
    if (p_.of_batch) {
      compute_statistics();
    }
    read_statistics();
    for (int64_t i = 0; i < p_.frames; ++i) {
      const Strip<T> normed = fma(normalised(i), weight_, bias_);
      at(p_.output, i, p_.silu ? each(normed, silu<T>) : normed);
    }
  }

  void backward() {
    read_statistics();
    StripSum<T> of_grad, of_product, of_padding;
    for (int64_t i = 0; i < p_.frames; ++i) {
      const Strip<T> x = normalised(i), grad = grad_normed(i, x);
      if (p_.padded[i] != 0) {
        of_padding.add(grad);
      } else {
        of_grad.add(grad);
        of_product.add(grad * x);
      }
    }
    write_parameter_gradients(of_grad.total(), of_product.total(), of_padding.total());
    const Strip<T> mean_grad = mean_of(of_grad.total()), mean_product = mean_of(of_product.total());
    const Strip<T> scale = weight_ * rstd_, none = Strip<T>::all(0);
    for (int64_t i = 0; i < p_.frames; ++i) {
      if (p_.padded[i] != 0) {
        at(p_.grad_x, i, none);
        continue;
      }
      const Strip<T> x = normalised(i), grad = grad_normed(i, x);
      at(p_.grad_x, i, scale * (grad - mean_grad - x * mean_product));
    }
  }

 private:
  Strip<T> at(const void* frames, int64_t i) const {
    const auto* const x = static_cast<const Storage*>(frames);
    return Strip<T>::template load<Type>(x + i * p_.channels + first_, width_);
  }
  void at(void* frames, int64_t i, const Strip<T>& value) const {
    auto* const x = static_cast<Storage*>(frames);
    value.template store<Type>(x + i * p_.channels + first_, width_);
  }
  Strip<T> parameter(const void* of_channels) const {
    return Strip<T>::load(static_cast<const T*>(of_channels) + first_, width_);
  }
  T* written(void* of_channels) const { return static_cast<T*>(of_channels) + first_; }

  template <class F>
  static Strip<T> each(const Strip<T>& x, const F& f) {
    return Strip<T>::map([&](int v) { return f(x.at[v]); });
  }

  // Two passes: E[x^2] - E[x]^2 cancels if the mean is large compared with the deviation.
  void compute_statistics() {
    StripSum<T> sum, squares;
    for (int64_t i = 0; i < p_.frames; ++i) {
      if (p_.padded[i] == 0) {
        sum.add(at(p_.x, i));
      }
    }
    write_mean(sum.total(), p_.mean);
    const Strip<T> mean = parameter(p_.mean);
    for (int64_t i = 0; i < p_.frames; ++i) {
      if (p_.padded[i] == 0) {
        const Strip<T> centred = at(p_.x, i) - mean;
        squares.add(centred * centred);
      }
    }
    write_mean(squares.total(), p_.var);
  }

  void write_mean(const double* total, void* of_channels) const {
    for (int64_t c = 0; c < width_; ++c) {
      written(of_channels)[c] = static_cast<T>(total[c] / static_cast<double>(p_.valid));
    }
  }

  void read_statistics() {
    mean_ = parameter(p_.mean);
    weight_ = parameter(p_.weight);
    bias_ = parameter(p_.bias);
    T rstd[strip_channels] = {};
    for (int64_t c = 0; c < width_; ++c) {
      rstd[c] = static_cast<T>(1.0 / std::sqrt(written(p_.var)[c] + p_.eps));
    }
    rstd_ = Strip<T>::load(rstd, strip_channels);
  }

  Strip<T> normalised(int64_t i) const {
    // Not read where it is padding: 0 * NaN is NaN.
    return p_.padded[i] != 0 ? Strip<T>::all(0) : (at(p_.x, i) - mean_) * rstd_;
  }

  // The gradient of what the normalisation, with weight and bias, gives the activation.
  Strip<T> grad_normed(int64_t i, const Strip<T>& x) const {
    const Strip<T> grad = at(p_.grad_output, i);
    return p_.silu ? grad * each(fma(x, weight_, bias_), silu_slope<T>) : grad;
  }

  void write_parameter_gradients(
      const double* of_grad, const double* of_product, const double* of_padding) const {
    for (int64_t c = 0; c < width_; ++c) {
      written(p_.grad_weight)[c] = static_cast<T>(of_product[c]);
      written(p_.grad_bias)[c] = static_cast<T>(of_grad[c] + of_padding[c]);
    }
  }

  // What the batch's statistics take off the gradient; nothing if they are others.
  Strip<T> mean_of(const double* total) const {
    T mean[strip_channels] = {};
    for (int64_t c = 0; p_.of_batch && c < width_; ++c) {
      mean[c] = static_cast<T>(total[c] / static_cast<double>(p_.valid));
    }
    return Strip<T>::load(mean, strip_channels);
  }

  const MaskedBatchNorm& p_;
  const int64_t first_, width_;
  Strip<T> mean_, rstd_, weight_, bias_;
};

template <class Type>
void forward(const MaskedBatchNorm& p, int64_t first) {
  Channels<Type>(p, first).forward();
}

template <class Type>
void backward(const MaskedBatchNorm& p, int64_t first) {
  Channels<Type>(p, first).backward();
}

}  // namespace

extern const MaskedBatchNormKernels FASTGUARD_CONCAT(
    masked_batch_norm_kernels_, FASTGUARD_CAPABILITY) = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>}};

}  // namespace fastguard
