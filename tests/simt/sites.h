// The sites that a machine's kernels have met.
#pragma once

#include "simt/report.h"

#include <deque>
#include <unordered_map>

namespace simt {

class Sites {
 public:
  explicit Sites(const std::set<std::string>& removed) : removed_(removed) {}

  // The site of a call, which is counted.
  Site& meet(Kind kind, unsigned bytes, const Location& at) {
    const Key key{at.file_name(), at.line(), at.column(), bytes, kind};
    const auto known = by_key_.find(key);
    Site& site = known != by_key_.end() ? *known->second : add(key, text_of(at));
    ++site.calls;
    return site;
  }

  const std::deque<Site>& all() const { return sites_; }

 private:
  // One site may have several keys: a file name has another address in another object file.
  struct Key {
    const char* file;
    unsigned line, column, bytes;
    Kind kind;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return ((key.line * 256 + key.column) * 16 + key.bytes) * 16 + static_cast<size_t>(key.kind);
    }
  };

  Site& add(const Key& key, const std::string& where);

  std::set<std::string> removed_;
  std::deque<Site> sites_;  // a deque: addresses stay
  std::unordered_map<Key, Site*, Hash> by_key_;
};

}  // namespace simt
