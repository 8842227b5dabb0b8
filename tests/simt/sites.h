// The sites that a machine's kernels have met.
#pragma once

#include "simt/report.h"

#include <array>
#include <deque>

namespace simt {

class Sites {
 public:
  explicit Sites(const std::set<std::string>& removed) : removed_(removed) {}

  // The site of a call, which is counted.
  Site& meet(Kind kind, unsigned bytes, const Location& at) {
    const Key key{at.file_name(), at.line(), at.column(), bytes, kind};
    Slot& slot = slots_[hash(key)];
    if (slot.site == nullptr || slot.key != key) {
      slot = {key, &find(kind, bytes, text_of(at))};
    }
    ++slot.site->calls;
    return *slot.site;
  }

  const std::deque<Site>& all() const { return sites_; }

 private:
  struct Key {
    const char* file;
    unsigned line, column, bytes;
    Kind kind;
    bool operator==(const Key&) const = default;
  };
  struct Slot {
    Key key;
    Site* site;
  };

  static size_t hash(const Key& key) {
    return (key.line * 31 + key.column * 7 + key.bytes + static_cast<unsigned>(key.kind)) % 1024;
  }

  Site& find(Kind kind, unsigned bytes, const std::string& where);

  std::set<std::string> removed_;
  std::deque<Site> sites_;             // a deque: addresses stay
  std::array<Slot, 1024> slots_ = {};  // the last site of each hash, so that most calls find theirs
};

}  // namespace simt
