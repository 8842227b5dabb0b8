#include "simt/global_memory.h"

#include <algorithm>
#include <cstring>

namespace simt {

namespace {

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

void Memory::allow(const void* pointer, size_t bytes, std::string name, bool writable) {
  if (bytes == 0) {
    return;
  }
  const uintptr_t begin = number(pointer);
  const auto after = std::upper_bound(
      ranges_.begin(), ranges_.end(), begin, [](uintptr_t address, const Range& range) {
        return address < range.begin;
      });
  const Range* neighbour = nullptr;
  if (after != ranges_.begin() && (after - 1)->end > begin) {
    neighbour = &*(after - 1);
  } else if (after != ranges_.end() && after->begin < begin + bytes) {
    neighbour = &*after;
  }
  if (neighbour != nullptr) {
    throw std::invalid_argument(
        "simt: `" + name + "` overlaps `" + neighbour->name + "`: allow each byte of memory once");
  }
  ranges_.insert(after, {begin, begin + bytes, std::move(name), writable});
  last_ = nullptr;
}

const Memory::Range* Memory::find(uintptr_t address) const {
  const auto after = std::upper_bound(
      ranges_.begin(), ranges_.end(), address, [](uintptr_t address, const Range& range) {
        return address < range.begin;
      });
  return after == ranges_.begin() ? nullptr : &*(after - 1);
}

void Memory::check(const void* pointer, size_t bytes, bool write, const Location& at) const {
  const uintptr_t address = number(pointer);
  const auto what = [&] {
    return (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes ";
  };
  if (last_ == nullptr || address < last_->begin || address >= last_->end) {
    last_ = find(address);
    if (last_ == nullptr) {
      fail("out_of_bounds", at, what() + "below all memory that the launch was given");
    }
  }
  const uintptr_t offset = address - last_->begin;
  const auto place = [&] {
    return "at byte " + std::to_string(offset) + " of `" + last_->name + "`";
  };
  if (address + bytes > last_->end) {
    fail(
        "out_of_bounds",
        at,
        what() + place() + ", which has " + std::to_string(last_->end - last_->begin));
  }
  if (address % bytes != 0) {
    fail(
        "misaligned",
        at,
        what() + place() + ", whose address is " + std::to_string(address % bytes) +
            " above a multiple of " + std::to_string(bytes));
  }
  if (write && !last_->writable) {
    fail("read_only", at, what() + place() + ", which the launch may only read");
  }
}

void Memory::touch(const void* pointer, bool write) {
  constexpr uintptr_t sector_bytes = 32;
  Range& range = *const_cast<Range*>(find(number(pointer)));
  std::vector<bool>& sectors = range.sectors[write];
  const uintptr_t first = range.begin / sector_bytes;
  sectors.resize(range.end / sector_bytes - first + 1);
  const auto sector = sectors[number(pointer) / sector_bytes - first];
  touched_[write] += !sector;
  sectors[number(pointer) / sector_bytes - first] = true;
}

void Memory::forget_sectors() {
  for (Range& range : ranges_) {
    range.sectors[0].clear();
    range.sectors[1].clear();
  }
  touched_[0] = touched_[1] = 0;
}

int64_t Stored::conflict(const void* address, const void* value, size_t bytes, int64_t block) {
  for (size_t i = 0; i < bytes; ++i) {
    const Byte now{block, static_cast<const uint8_t*>(value)[i]};
    const auto [byte, first] = bytes_.try_emplace(number(address) + i, now);
    if (!first && byte->second.block != block && byte->second.value != now.value) {
      return byte->second.block;
    }
    byte->second = now;
  }
  return -1;
}

}  // namespace simt
