// The host's side of a plan, without torch and without CUDA: the upload, and the layout of the plan
// in one allocation of the device's memory.
#pragma once

#include "cuda/plan.cuh"

#include <cstring>
#include <vector>

namespace fastguard {

// One tensor of a list, and its partner in a second list if there is one.
struct Given {
  const void* data;
  const void* other;
  int64_t numel;
  Type type;
  Type other_type;
  std::vector<PermutedDim> dims;  // empty if the order is row-major
};

class HostPlan {
 public:
  explicit HostPlan(const std::vector<Given>& tensors)
      : tensors_(static_cast<int32_t>(tensors.size())) {
    words.reserve((tensors.size() * (sizeof(Entry) + sizeof(int32_t))) / sizeof(Word16) + 2);
    std::vector<PermutedDim> dims;
    std::vector<int32_t> first_dim;
    first_dim.reserve(tensors.size() + 1);
    int64_t place = 0;
    int64_t chunks = 0;
    for (const Given& given : tensors) {
      append(
          Entry{
              reinterpret_cast<uint64_t>(given.data),
              reinterpret_cast<uint64_t>(given.other),
              given.numel << 6 | static_cast<int>(given.other_type) << 3 |
                  static_cast<int>(given.type),
              static_cast<int32_t>(chunks),
              static_cast<int32_t>(place)});
      chunks += chunks_of(given.numel);
      place += (given.numel + packed_alignment - 1) / packed_alignment;
      first_dim.push_back(static_cast<int32_t>(dims.size()));
      dims.insert(dims.end(), given.dims.begin(), given.dims.end());
    }
    first_dim.push_back(static_cast<int32_t>(dims.size()));
    fits = chunks <= INT32_MAX && place <= INT32_MAX;
    n_chunks_ = static_cast<int32_t>(chunks);
    first_dim_at_ = append_all(first_dim);
    dims_at_ = append_all(dims);
  }

  // Whether there are fewer than 2^31 chunks and units of packed_alignment: 3.4e10 elements.
  bool fits;
  // The words that upload_kernel writes to the beginning of the device's memory.
  std::vector<Word16> words;

  int32_t n_chunks() const { return n_chunks_; }

  // The size of the device's memory, which has to be aligned to 16 bytes.
  int64_t bytes() const { return arrived_at() + round_up((tensors_ + 1) * sizeof(unsigned)); }

  Plan at(void* memory) const {
    char* const base = static_cast<char*>(memory);
    return {
        tensors_,
        n_chunks_,
        reinterpret_cast<const Entry*>(base),
        reinterpret_cast<const int32_t*>(base + first_dim_at_),
        reinterpret_cast<const PermutedDim*>(base + dims_at_),
        reinterpret_cast<Chunk*>(base + chunks_at()),
        reinterpret_cast<double*>(base + sums_at()),
        reinterpret_cast<double*>(base + partials_at()),
        reinterpret_cast<Nonfinite*>(base + nonfinite_at()),
        reinterpret_cast<unsigned*>(base + arrived_at())};
  }

  // Whether both describe the same tensors at the same addresses. Both can then use one plan.
  bool operator==(const HostPlan& other) const {
    return words.size() == other.words.size() && tensors_ == other.tensors_ &&
        std::memcmp(words.data(), other.words.data(), words.size() * sizeof(Word16)) == 0;
  }

 private:
  static int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

  int64_t uploaded() const { return static_cast<int64_t>(words.size() * sizeof(Word16)); }
  int64_t chunks_at() const { return uploaded(); }
  int64_t sums_at() const { return chunks_at() + n_chunks_ * int64_t{sizeof(Chunk)}; }
  int64_t partials_at() const { return sums_at() + round_up(tensors_ * int64_t{sizeof(double)}); }
  int64_t nonfinite_at() const {
    return partials_at() + round_up(n_chunks_ * int64_t{sizeof(double)});
  }
  int64_t arrived_at() const {
    return nonfinite_at() + round_up(n_chunks_ * int64_t{sizeof(Nonfinite)});
  }

  template <class T>
  void append(const T& item) {
    const size_t at = words.size();
    words.resize(at + (sizeof(T) + 15) / 16);
    std::memcpy(static_cast<void*>(&words[at]), &item, sizeof(T));
  }

  template <class T>
  int64_t append_all(const std::vector<T>& items) {
    const int64_t at = uploaded();
    words.resize(words.size() + (items.size() * sizeof(T) + 15) / 16);
    if (!items.empty()) {
      std::memcpy(static_cast<void*>(&words[at / 16]), items.data(), items.size() * sizeof(T));
    }
    return at;
  }

  int32_t tensors_;
  int32_t n_chunks_;
  int64_t first_dim_at_;
  int64_t dims_at_;
};

}  // namespace fastguard
