// Shared<T>: the pointer to shared memory of the executor, where every access is checked.
#pragma once

#include "simt/launch.h"

#include <compare>
#include <concepts>
#include <cstring>
#include <type_traits>

namespace fastguard {

// An index and the place in the kernel where it is used: operator[] takes no second argument.
struct Index {
  int64_t i;
  simt::Location at;

  template <std::integral I>
  Index(I i, const simt::Location& at = simt::Location::current())
      : i(static_cast<int64_t>(i)), at(at) {}
};

template <class T>
class Shared;

// An element. It is read and written through this temporary only: `auto x = shared[i]` does not
// compile once x is used, since on a GPU it would be a copy.
template <class T>
class Element {
 public:
  using Value = std::remove_const_t<T>;

  Element(simt::SharedArray* array, int64_t offset, const simt::Location& at)
      : array_(array), offset_(offset), at_(at) {}
  Element(const Element&) = delete;

  operator Value() const&& { return read(); }
  Shared<T> operator&() const&&;

  Element&& operator=(Value value) &&
    requires(!std::is_const_v<T>)
  {
    write(value);
    return std::move(*this);
  }
  Element&& operator=(Element&& from) &&
    requires(!std::is_const_v<T>)
  {
    write(from.read());
    return std::move(*this);
  }
  Element&& operator+=(Value value) && { return std::move(*this) = read() + value; }
  Element&& operator-=(Value value) && { return std::move(*this) = read() - value; }
  Element&& operator*=(Value value) && { return std::move(*this) = read() * value; }
  Element&& operator|=(Value value) && { return std::move(*this) = read() | value; }
  Element&& operator&=(Value value) && { return std::move(*this) = read() & value; }
  Element&& operator^=(Value value) && { return std::move(*this) = read() ^ value; }

 private:
  Value read() const {
    Value value;
    memcpy(&value, access(simt::Kind::shared_load), sizeof(value));
    return value;
  }
  void write(Value value) const { memcpy(access(simt::Kind::shared_store), &value, sizeof(value)); }
  std::byte* access(simt::Kind kind) const {
    return simt::launching->shared(*array_, offset_, sizeof(T), kind, at_);
  }

  simt::SharedArray* array_;
  int64_t offset_;
  simt::Location at_;
};

template <class T>
class Shared {
 public:
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);

  Shared() = default;
  Shared(simt::SharedArray* array, int64_t offset) : array_(array), offset_(offset) {}
  Shared(const Shared<std::remove_const_t<T>>& other)
    requires std::is_const_v<T>
      : array_(other.array()), offset_(other.offset()) {}
  Shared(const Shared&) = default;
  Shared& operator=(const Shared&) = default;

  Element<T> operator[](Index index) const { return {array_, offset_ + index.i * bytes, index.at}; }
  Element<T> operator*() const { return (*this)[0]; }  // its site is this line: [] says more

  Shared operator+(int64_t count) const { return {array_, offset_ + count * bytes}; }
  Shared operator-(int64_t count) const { return *this + -count; }
  Shared& operator+=(int64_t count) { return *this = *this + count; }
  Shared& operator-=(int64_t count) { return *this = *this - count; }
  int64_t operator-(const Shared& other) const { return (offset_ - other.offset_) / bytes; }
  bool operator==(const Shared&) const = default;
  auto operator<=>(const Shared& other) const { return offset_ <=> other.offset_; }

  simt::SharedArray* array() const { return array_; }
  int64_t offset() const { return offset_; }  // in bytes

 private:
  static constexpr int64_t bytes = sizeof(T);

  simt::SharedArray* array_ = nullptr;
  int64_t offset_ = 0;
};

template <class T>
Shared<T> Element<T>::operator&() const&& {
  return {array_, offset_};
}

}  // namespace fastguard
