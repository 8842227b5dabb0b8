// Runs the CPU's kernels on fixed inputs and prints what they make, as exact hexadecimal numbers.
// One result is one line: its name, then its elements. tests/arm/test_arm.py compares the lines of
// an ARM build, run by qemu, with those of a build for this machine.

#include "cpu/adamw_kernel.h"
#include "cpu/add_layer_norm_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/elements.h"
#include "cpu/glu_depthwise_kernel.h"
#include "cpu/gradients_kernel.h"
#include "cpu/masked_batch_norm_kernel.h"
#include "cpu/silu_kernel.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace fastguard {
namespace {

// Numbers between -1 and 1, the same on every machine.
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_) >> 11) * 0x1p-52;
  }

 private:
  uint64_t state_;
};

template <class Type>
using Array = std::vector<typename Type::storage>;

template <class Type>
Array<Type> drawn(int64_t n, uint64_t seed, double size = 1.0) {
  Draw draw(seed);
  Array<Type> x(n);
  for (auto& each : x) {
    each = Type::narrow(size * draw.next());
  }
  return x;
}

// Some of the ends of the range among drawn numbers.
template <class Type>
Array<Type> hard(int64_t n, uint64_t seed) {
  Array<Type> x = drawn<Type>(n, seed);
  const double ends[] = {0.0, -0.0, 1e-45, -6e-8, 65504.0, 1e38, -1e-30, INFINITY, -INFINITY, NAN};
  for (int64_t i = 0; i < n; i += 3) {
    x[i] = Type::narrow(ends[i / 3 % 10]);
  }
  return x;
}

template <class Type>
void print(const std::string& name, const Array<Type>& x) {
  std::printf("%s", name.c_str());
  for (const auto each : x) {
    const double value = Type::widen(each);
    if (std::isnan(value)) {
      std::printf(" nan");  // whatever its bits
    } else {
      std::printf(" %a", value);
    }
  }
  std::printf("\n");
}

// What belongs to sums, channels and moments of elements of a type.
template <class Type>
using Wide = std::conditional_t<std::is_same_v<Type, Float64>, Float64, Float32>;

template <class Type, class Function>
Function* of(const PerDtype<Function>& table) {
  if constexpr (std::is_same_v<Type, Float32>) {
    return table.float32;
  } else if constexpr (std::is_same_v<Type, Float64>) {
    return table.float64;
  } else if constexpr (std::is_same_v<Type, BFloat16>) {
    return table.bfloat16;
  } else {
    return table.float16;
  }
}

template <class Type>
void gradients(const std::string& type) {
  const GradientKernels& kernels = gradient_kernels_default;
  for (const int64_t n : {0, 1, 31, 1000, 16384}) {
    Array<Type> x = drawn<Type>(n, n);
    print<Float64>("bits sum_squares " + type, {of<Type>(kernels.sum_squares)(x.data(), n)});
  }
  for (const double factor : {0.3, 1e-43, 1e30}) {
    Array<Type> x = hard<Type>(1003, 1);
    of<Type>(kernels.scale)(x.data(), 1003, factor);
    print<Type>("bits scale " + type, x);
  }
  auto sum = drawn<Wide<Type>>(1003, 2);
  const Array<Type> grad = hard<Type>(1003, 3);
  of<Type>(kernels.add)(sum.data(), grad.data(), 1003);
  print<Wide<Type>>("bits add " + type, sum);
}

template <class Param, class Grad>
void adamw(
    const std::string& types, AdamwFunction* step, bool amsgrad, bool decoupled, bool master) {
  constexpr int64_t n = 203;
  using Moment = Wide<Param>;
  Array<Param> param = drawn<Param>(n, 4);
  const Array<Grad> grad = hard<Grad>(n, 5);
  Array<Moment> m = drawn<Moment>(n, 6, 0.1), v = drawn<Moment>(n, 7, 0.1), largest = v;
  for (auto* each : {&v, &largest}) {
    for (auto& x : *each) {
      x = std::fabs(x);
    }
  }
  std::vector<float> masters(n);
  for (int64_t i = 0; i < n; ++i) {
    masters[i] = static_cast<float>(Param::widen(param[i]) * (i % 5 == 0 ? 1.5 : 1.0001));
  }
  const AdamwOptions options{1e-2, 0.9, 0.98, 0.1, 1e-8, decoupled, false};
  const AdamwRange range{
      param.data(),
      grad.data(),
      m.data(),
      v.data(),
      amsgrad ? largest.data() : nullptr,
      master ? masters.data() : nullptr,
      n};
  step(range, 0.7, bias_correction_of(options, 0.81, 0.9604), options, 512);
  const std::string name = "bits adamw " + types + (amsgrad ? " amsgrad" : "") +
      (decoupled ? "" : " coupled") + (master ? " master" : "");
  print<Param>(name, param);
  print<Moment>(name + " m", m);
  print<Moment>(name + " v", v);
  print<Moment>(name + " largest", largest);
  if (master) {
    print<Float32>(name + " master", masters);
  }
}

template <class Param, class Grad>
void adamw_of(const std::string& types, AdamwFunction* step) {
  for (const bool amsgrad : {false, true}) {
    for (const bool decoupled : {false, true}) {
      adamw<Param, Grad>(types, step, amsgrad, decoupled, false);
      if (sizeof(typename Param::storage) == 2) {
        adamw<Param, Grad>(types, step, amsgrad, decoupled, true);
      }
    }
  }
}

template <class Type>
void frames(const std::string& type) {
  constexpr int64_t batch = 2, length = 37, channels = 45, taps = 5, rows = batch * length;
  constexpr int64_t n = rows * channels;
  using W = Wide<Type>;
  std::vector<uint8_t> padded(rows);
  for (int64_t i = 25; i < length; ++i) {
    padded[length + i] = 1;
  }
  const Array<Type> x = drawn<Type>(2 * n, 8, 3.0), upstream = drawn<Type>(n, 9);
  const Array<W> weight = drawn<W>(channels * taps, 10), bias = drawn<W>(channels, 11);
  Array<Type> output(n), grad_x(2 * n), branch_grad(n), sum(n);
  const auto show = [&](const std::string& what, const auto& y) {
    print<Type>("near " + what + " " + type, y);
  };
  of<Type>(silu_kernels_default.forward)(x.data(), output.data(), n);
  show("silu", output);
  of<Type>(silu_kernels_default.backward)(upstream.data(), x.data(), grad_x.data(), n);
  show("silu_backward", grad_x);

  Array<W> mean(rows), rstd(rows), grad_weight(channels * taps), grad_bias(channels);
  Array<W> partial(2 * channels * ((rows + block_rows - 1) / block_rows));
  const AddLayerNorm norm{
      rows,
      length,
      channels,
      x.data(),
      x.data() + n,
      nullptr,
      0.5,
      weight.data(),
      bias.data(),
      1e-5,
      sum.data(),
      output.data(),
      mean.data(),
      rstd.data(),
      upstream.data(),
      x.data(),
      grad_x.data(),
      branch_grad.data(),
      partial.data(),
      grad_weight.data(),
      grad_bias.data()};
  const auto& norms = add_layer_norm_kernels_default;
  for (const auto& pass : {norms.forward, norms.backward}) {
    for (int64_t block = 0; block * block_rows < rows; ++block) {
      of<Type>(pass)(norm, block);
    }
  }
  of<Type>(norms.add_partials)(norm);
  show("add_layer_norm", output);
  show("add_layer_norm_backward", branch_grad);
  print<W>("near add_layer_norm_grad_bias " + type, grad_bias);

  const GluDepthwise glu{
      batch,
      length,
      channels,
      taps,
      padded.data(),
      x.data(),
      weight.data(),
      output.data(),
      upstream.data(),
      grad_x.data(),
      grad_weight.data()};
  for (int64_t c = 0; c < channels; c += strip_channels) {
    for (int64_t b = 0; b < batch; ++b) {
      of<Type>(glu_depthwise_kernels_default.forward)(glu, b, 0, c);
    }
    of<Type>(glu_depthwise_kernels_default.backward)(glu, c);
  }
  show("glu_depthwise", output);
  show("glu_depthwise_backward", grad_x);

  Array<W> batch_mean(channels), batch_var(channels);
  const MaskedBatchNorm batch_norm{
      rows,
      channels,
      rows - 12,
      padded.data(),
      1e-5,
      true,
      true,
      x.data(),
      weight.data(),
      bias.data(),
      batch_mean.data(),
      batch_var.data(),
      output.data(),
      upstream.data(),
      branch_grad.data(),
      grad_weight.data(),
      grad_bias.data()};
  for (int64_t c = 0; c < channels; c += strip_channels) {
    of<Type>(masked_batch_norm_kernels_default.forward)(batch_norm, c);
    of<Type>(masked_batch_norm_kernels_default.backward)(batch_norm, c);
  }
  show("masked_batch_norm", output);
  show("masked_batch_norm_backward", branch_grad);
}

template <class Type>
void attention(
    const std::string& type, const AttentionKernel& kernel, double dropout_p, double cap) {
  constexpr int64_t rows = 37, keys = 70, width = 40;
  using W = Wide<Type>;
  const Array<Type> q = drawn<Type>(rows * width, 12, 3.0), k = drawn<Type>(keys * width, 13, 3.0);
  const Array<Type> v = drawn<Type>(keys * width, 14), upstream = drawn<Type>(rows * width, 15);
  Array<Type> output(rows * width), grad_q(rows * width), grad_k(keys * width), grad_v = grad_k;
  Array<W> logsumexp(rows), stats(2 * rows);
  const int64_t seed[] = {123456789, 987654321};
  const auto of_rows = [](const void* x, int64_t n) {
    return Heads{const_cast<void*>(x), n * width, n * width, width};
  };
  const int64_t unit = kernel.key_unit;
  const auto whole = [&](int64_t n) { return (n + unit - 1) / unit * unit; };
  const Panel panels[] = {
      {0, whole(panel_keys), ~uint64_t{0}}, {panel_keys, whole(keys - panel_keys), 0x2f}};
  const PanelList list{panels, 2};
  AttentionProblem p{};
  p.batch = p.heads = p.kv_heads = p.chunks = 1;
  p.queries = rows;
  p.keys = keys;
  p.head_dim = p.value_dim = width;
  p.query = of_rows(q.data(), rows);
  p.key = of_rows(k.data(), keys);
  p.value = of_rows(v.data(), keys);
  p.output = of_rows(output.data(), rows);
  p.logsumexp = logsumexp.data();
  p.stats = stats.data();
  p.panels = &list;
  p.seed = dropout_p > 0 ? seed : nullptr;
  p.dropout_p = dropout_p;
  p.scale = 0.16;
  p.softcap = cap;
  p.clamp = 0.5;
  p.grad_output = of_rows(upstream.data(), rows);
  p.grad_query = of_rows(grad_q.data(), rows);
  p.grad_key = of_rows(grad_k.data(), keys);
  p.grad_value = of_rows(grad_v.data(), keys);
  std::vector<char> scratch(
      64 + std::max(kernel.forward_scratch(p), kernel.backward_scratch(p)), char(-1));
  kernel.forward(p, {0, 0, 0, rows}, scratch.data());
  std::fill(scratch.begin(), scratch.end(), char(-1));
  kernel.backward(p, {0, 0, 0}, scratch.data());
  const std::string name =
      "near attention " + type + (dropout_p > 0 ? " dropout" : "") + (cap > 0 ? " softcap" : "");
  print<Type>(name, output);
  print<W>(name + " logsumexp", logsumexp);
  print<Type>(name + " grad_query", grad_q);
  print<Type>(name + " grad_key", grad_k);
  print<Type>(name + " grad_value", grad_v);
}

template <class Type>
void all_of(const std::string& type, const AttentionKernel& kernel) {
  gradients<Type>(type);
  adamw_of<Type, Type>(type, of<Type>(adamw_kernels_default.same_dtype));
  if (!std::is_same_v<Type, Float64>) {
    adamw_of<Type, Float32>(type + " float32", of<Type>(adamw_kernels_default.float32_grad));
  }
  frames<Type>(type);
  for (const double dropout_p : {0.0, 0.25}) {
    attention<Type>(type, kernel, dropout_p, dropout_p * 20.0);
  }
}

}  // namespace
}  // namespace fastguard

int main() {
  using namespace fastguard;
  const AttentionKernels& kernels = attention_kernels_default;
  all_of<Float32>("float32", kernels.float32);
  all_of<Float64>("float64", kernels.float64);
  all_of<BFloat16>("bfloat16", kernels.bfloat16);
  all_of<Float16>("float16", kernels.float16);
  return 0;
}
