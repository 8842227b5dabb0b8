#include "simt/report.h"

#include "simt/sites.h"

#include <algorithm>

namespace simt {

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::load:
      return "load";
    case Kind::store:
      return "store";
    case Kind::atomic:
      return "atomic";
    case Kind::copy_async:
      return "copy_async";
    case Kind::shared_load:
      return "shared_load";
    case Kind::shared_store:
      return "shared_store";
    case Kind::shared_atomic:
      return "shared_atomic";
    case Kind::ldmatrix:
      return "ldmatrix";
    case Kind::barrier:
      return "barrier";
    case Kind::grid_sync:
      return "grid_sync";
    case Kind::syncwarp:
      return "syncwarp";
    case Kind::collective:
      return "collective";
    case Kind::mma:
      return "mma";
    case Kind::fence:
      return "fence";
    case Kind::wait:
      return "wait";
    case Kind::within:
      return "within";
  }
  return "";
}

std::string text_of(const Location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line()) + ":" +
      std::to_string(at.column());
}

Error::Error(
    std::string kind,
    std::string kernel,
    std::string block,
    std::string thread,
    std::string where,
    const std::string& text)
    : std::runtime_error(
          kind + " in " + kernel + ", block " + block + ", thread " + thread + ", at " + where +
          ": " + text),
      kind(std::move(kind)),
      kernel(std::move(kernel)),
      block(std::move(block)),
      thread(std::move(thread)),
      where(std::move(where)) {}

Site& Sites::add(const Key& key, const std::string& where) {
  auto site = std::find_if(sites_.begin(), sites_.end(), [&](const Site& other) {
    return other.kind == key.kind && other.bytes == key.bytes && other.where == where;
  });
  if (site == sites_.end()) {
    site = sites_.insert(
        site,
        Site{
            .kind = key.kind,
            .bytes = key.bytes,
            .where = where,
            .removed = removed_.contains(where),
            .index = static_cast<int>(sites_.size())});
  }
  by_key_[key] = &*site;
  return *site;
}

}  // namespace simt
