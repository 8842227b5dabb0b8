// One source, compiled once per instruction set with FASTGUARD_CAPABILITY as its name.

#include "add_layer_norm_kernel.h"

#include "concat.h"
#include "strips.h"

#include <cmath>

namespace fastguard {
namespace {

template <class Type>
class LayerNorm {
 public:
  using Storage = typename Type::storage;
  using T = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;

  explicit LayerNorm(const AddLayerNorm& p) : p_(p), n_(p.channels) {}

  void forward_of_block(int64_t block) const {
    each_row(block, [&](int64_t i) { forward(i); });
  }

  void backward_of_block(int64_t block) const {
    T* const grad_weight = static_cast<T*>(p_.partial) + 2 * block * n_;
    std::fill_n(grad_weight, 2 * n_, T{0});
    each_row(block, [&](int64_t i) { backward(i, grad_weight, grad_weight + n_); });
  }

  void add_partials() const {
    const auto* const partial = static_cast<const T*>(p_.partial);
    const int64_t blocks = (p_.rows + block_rows - 1) / block_rows;
    for (int64_t c = 0; c < n_; ++c) {
      double weight = 0.0, bias = 0.0;
      for (int64_t block = 0; block < blocks; ++block) {
        weight += partial[2 * block * n_ + c];
        bias += partial[(2 * block + 1) * n_ + c];
      }
      static_cast<T*>(p_.grad_weight)[c] = static_cast<T>(weight);
      static_cast<T*>(p_.grad_bias)[c] = static_cast<T>(bias);
    }
  }

 private:
  static constexpr int64_t lanes = Vec<T>::lanes;

  static Vec<T> zero() { return Vec<T>::all(0); }

  template <class F>
  void each(const F& f) const {
    for (int64_t c = 0; c < n_; c += lanes) {
      f(c);
    }
  }

  // The lanes that are channels.
  Bits channels_at(int64_t c) const {
    return n_ - c >= lanes ? ~Bits{0} : (Bits{1} << (n_ - c)) - 1;
  }

  template <class F>
  void each_row(int64_t block, const F& f) const {
    const int64_t end = std::min(p_.rows, (block + 1) * block_rows);
    for (int64_t i = block * block_rows; i < end; ++i) {
      f(i);
    }
  }

  Vec<T> load(const void* rows, int64_t i, int64_t c) const {
    return load_part<T, Type>(static_cast<const Storage*>(rows) + i * n_ + c, n_ - c);
  }
  void store(Vec<T> v, void* rows, int64_t i, int64_t c) const {
    store_part<T, Type>(v, static_cast<Storage*>(rows) + i * n_ + c, n_ - c);
  }

  Vec<T> of_channel(const void* x, int64_t c) const {
    return load_part<T, Same<T>>(static_cast<const T*>(x) + c, n_ - c);
  }

  Vec<T> scale(int64_t i, int64_t c) const {
    const Vec<T> alpha = Vec<T>::all(static_cast<T>(p_.alpha));
    if (p_.scale == nullptr) {
      return alpha;
    }
    return alpha * of_channel(static_cast<const T*>(p_.scale) + i / p_.rows_of_scale * n_, c);
  }

  void forward(int64_t i) const {
    if (p_.branch != nullptr) {
      each([&](int64_t c) {
        store(fma(load(p_.branch, i, c), scale(i, c), load(p_.x, i, c)), p_.sum, i, c);
      });
    }
    Vec<T> total = zero();
    each([&](int64_t c) { total = total + load(p_.sum, i, c); });  // as it was rounded
    const T mean = reduce_add(total) / static_cast<T>(n_);
    Vec<T> squares = zero();
    each([&](int64_t c) {
      const Vec<T> centred = load(p_.sum, i, c) - Vec<T>::all(mean);
      const Vec<T> shown = select(channels_at(c), centred, zero());
      squares = fma(shown, shown, squares);
    });
    const T var = reduce_add(squares) / static_cast<T>(n_);
    const T rstd = T{1} / std::sqrt(var + static_cast<T>(p_.eps));
    each([&](int64_t c) {
      const Vec<T> x = (load(p_.sum, i, c) - Vec<T>::all(mean)) * Vec<T>::all(rstd);
      store(fma(x, of_channel(p_.weight, c), of_channel(p_.bias, c)), p_.normed, i, c);
    });
    static_cast<T*>(p_.mean)[i] = mean;
    static_cast<T*>(p_.rstd)[i] = rstd;
  }

  static void add_part(T* sum, int64_t n, Vec<T> x) {
    store_part<T, Same<T>>(load_part<T, Same<T>>(sum, n) + x, sum, n);
  }

  void backward(int64_t i, T* grad_weight, T* grad_bias) const {
    const Vec<T> mean = Vec<T>::all(static_cast<const T*>(p_.mean)[i]);
    const Vec<T> rstd = Vec<T>::all(static_cast<const T*>(p_.rstd)[i]);
    Vec<T> of_grad = zero(), of_product = zero();
    each([&](int64_t c) {
      const Vec<T> x = (load(p_.sum, i, c) - mean) * rstd, upstream = load(p_.grad_normed, i, c);
      const Vec<T> grad = upstream * of_channel(p_.weight, c);
      of_grad = of_grad + grad;  // zero beyond the channels, as upstream and weight are
      of_product = fma(grad, x, of_product);
      add_part(grad_weight + c, n_ - c, upstream * x);
      add_part(grad_bias + c, n_ - c, upstream);
    });
    const Vec<T> mean_grad = Vec<T>::all(reduce_add(of_grad) / static_cast<T>(n_));
    const Vec<T> mean_product = Vec<T>::all(reduce_add(of_product) / static_cast<T>(n_));
    each([&](int64_t c) {
      const Vec<T> x = (load(p_.sum, i, c) - mean) * rstd;
      const Vec<T> of_normed = load(p_.grad_normed, i, c) * of_channel(p_.weight, c);
      Vec<T> grad = rstd * (of_normed - mean_grad - x * mean_product);
      if (p_.grad_sum != nullptr) {
        grad = grad + load(p_.grad_sum, i, c);
      }
      store(grad, p_.grad_x, i, c);
      if (p_.grad_branch != nullptr) {
        store(grad * scale(i, c), p_.grad_branch, i, c);
      }
    });
  }

  const AddLayerNorm& p_;
  const int64_t n_;
};

template <class Type>
void forward(const AddLayerNorm& p, int64_t block) {
  LayerNorm<Type>(p).forward_of_block(block);
}

template <class Type>
void backward(const AddLayerNorm& p, int64_t block) {
  LayerNorm<Type>(p).backward_of_block(block);
}

template <class Type>
void add_partials(const AddLayerNorm& p) {
  LayerNorm<Type>(p).add_partials();
}

}  // namespace

extern const AddLayerNormKernels FASTGUARD_CONCAT(add_layer_norm_kernels_, FASTGUARD_CAPABILITY) = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>},
    {add_partials<Float32>, add_partials<Float64>, add_partials<BFloat16>, add_partials<Float16>}};

}  // namespace fastguard
