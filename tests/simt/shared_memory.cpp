#include "simt/shared_memory.h"

#include "simt/launch.h"

#include <algorithm>
#include <cstring>

namespace simt {

namespace {

// In the place of a thread (0 to 1023) of a Shadow:
constexpr uint16_t atomics = 0x8000;  // writer: atomics of any threads
constexpr uint16_t on_its_way = 0x2000;  // writer: a copy of this thread that has not arrived
constexpr uint16_t many_warps = 0x8000;  // reader: threads of two warps or more
constexpr uint16_t many_lanes = 0x4000;  // reader: several lanes of the warp of this thread

int warp_of(uint16_t thread) { return (thread & 1023) / 32; }

// Whether an access by `other`, stamped `at`, and one by `thread` now have nothing between them.
bool unordered(uint32_t at, uint16_t other, const Thread& thread) {
  if (at < thread.block->since || other == thread.id) {
    return false;
  }
  const bool same_warp = other < many_warps && warp_of(other) == warp_of(thread.id);
  return !same_warp || at >= thread.warp->since;
}

void note_reader(Shadow& shadow, const Thread& thread) {
  if (shadow.read_at < thread.block->since) {
    shadow.reader = thread.id;
  } else if (shadow.reader != many_warps) {
    if (warp_of(shadow.reader) != warp_of(thread.id)) {
      shadow.reader = many_warps;
    } else if (shadow.read_at < thread.warp->since) {
      shadow.reader = thread.id;
    } else if (shadow.reader != thread.id) {
      shadow.reader = thread.id | many_lanes;
    }
  }
}

std::string text_of(uint16_t other, const Site& site) {
  const std::string who = other >= many_warps
      ? "several threads"
      : (other & many_lanes ? "several lanes of warp " + std::to_string(warp_of(other))
                            : "thread " + std::to_string(other & 1023));
  return who + " at " + site.where;
}

}  // namespace

void SharedArray::check(int64_t offset, size_t count, const Location& at) const {
  if (offset < 0 || offset + count > bytes.size()) {
    fail(
        "out_of_bounds",
        at,
        std::to_string(count) + " bytes at byte " + std::to_string(offset) +
            " of the shared array `" + name + "`, which has " + std::to_string(bytes.size()));
  }
  if ((first_byte + offset) % count != 0) {
    fail(
        "misaligned",
        at,
        std::to_string(count) + " bytes at byte " + std::to_string(offset) +
            " of the shared array `" + name + "`");
  }
}

void SharedArray::track(
    int64_t offset,
    size_t count,
    Access access,
    const Thread& thread,
    const Site& site,
    const Location& at) {
  const auto race = [&](const char* what, uint16_t other, uint16_t other_site) {
    fail(
        "race",
        at,
        std::string(access == Access::read ? "reads" : "writes") + " byte " +
            std::to_string(offset) + " of the shared array `" + name + "`, which " + what + " by " +
            text_of(other, launching->sites.all()[other_site]) + "; nothing orders the two");
  };
  const uint32_t now = launching->clock;
  for (const int64_t end = offset + count; offset < end; ++offset) {
    Shadow& byte = shadow[offset];
    if (access == Access::arrive) {
      byte.writer = thread.id;
    } else if (byte.writer & on_its_way) {
      race("is being filled", byte.writer, byte.write_site);
    }
    if (!(access == Access::atomic && byte.writer == atomics) &&
        unordered(byte.written_at, byte.writer, thread)) {
      race("was written", byte.writer, byte.write_site);
    }
    if (access == Access::read) {
      note_reader(byte, thread);
      byte.read_at = now;
      byte.read_site = site.index;
    } else {
      if (unordered(byte.read_at, byte.reader, thread)) {
        race("was read", byte.reader, byte.read_site);
      }
      byte.written_at = now;
      byte.writer = access == Access::atomic ? atomics
          : access == Access::issue          ? thread.id | on_its_way
                                             : thread.id;
      byte.write_site = site.index;
    }
  }
}

void SharedArray::poison(int64_t offset, size_t count) { memset(&bytes[offset], 0xFF, count); }

SharedArray& SharedMemory::array(const void* key, const char* name, size_t bytes) {
  for (SharedArray& array : arrays_) {
    if (array.key == key) {
      return array;
    }
  }
  SharedArray& array = arrays_.emplace_back(
      SharedArray{key, name, bytes_, std::vector<std::byte>(bytes), std::vector<Shadow>(bytes)});
  bytes_ += (bytes + 15) / 16 * 16;
  if (bytes > 0) {
    array.poison(0, bytes);
  }
  return array;
}

void SharedMemory::poison() {
  for (SharedArray& array : arrays_) {
    array.poison(0, array.bytes.size());
  }
}

Wavefronts wavefronts(uint32_t lanes, const uint64_t (&addresses)[32], unsigned bytes) {
  const int group = bytes <= 4 ? 32 : static_cast<int>(128 / bytes);  // 128 bytes: all banks once
  Wavefronts sum{0, 0};
  for (int first = 0; first < 32; first += group) {
    uint64_t words[32];
    int count = 0;
    for (int lane = first; lane < first + group; ++lane) {
      for (unsigned byte = 0; byte < bytes && (lanes >> lane & 1); byte += 4) {
        words[count++] = (addresses[lane] + byte) / 4;
      }
    }
    std::sort(words, words + count);
    const uint64_t* end = std::unique(words, words + count);  // a word serves many lanes at once
    uint64_t in_bank[32] = {};
    for (const uint64_t* word = words; word < end; ++word) {
      ++in_bank[*word % 32];
    }
    sum.taken += *std::max_element(in_bank, in_bank + 32);
    sum.needed += count > 0;
  }
  return sum;
}

}  // namespace simt
