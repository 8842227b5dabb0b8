// Asynchronous copies: issued, committed in groups, and arrived when the issuing thread has waited.
#include "simt/launch.h"

#include <cstring>

namespace simt {

void Launch::copy_async(
    SharedArray& to, int64_t offset, const void* from, bool valid, const Location& at) {
  Copy copy{.to = &to, .offset = offset, .from = valid ? from : nullptr, .value = {}, .at = at};
  constexpr size_t bytes = sizeof(copy.value);
  Site& site = step(Kind::copy_async, valid ? bytes : 0, at);
  copy.site = &sites.meet(Kind::shared_store, bytes, at);
  to.check(offset, bytes, at);
  to.track(offset, bytes, Access::issue, *running, *copy.site, at);
  if (valid) {
    state_.memory.check(from, bytes, false, at);
    read(&copy.value, from, bytes);
  }
  if (options_.count) {
    Traffic& traffic = running->warp->traffic;
    traffic.add(*copy.site, running->lane, to.first_byte + offset);
    if (valid) {
      count(site, from);
    }
  }
  running->copies.open.push_back(copy);
}

void Launch::commit_async() {
  Copies& copies = running->copies;
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

void Launch::wait_async(size_t groups, const Location& at) {
  if (step(Kind::wait, 0, at).removed) {
    return;
  }
  auto& on_their_way = running->copies.groups;
  for (; on_their_way.size() > groups; on_their_way.erase(on_their_way.begin())) {
    for (const Copy& copy : on_their_way.front()) {
      arrive(copy);
    }
  }
}

void Launch::arrive(const Copy& copy) {
  if (copy.from != nullptr) {
    decltype(copy.value) now;
    read(&now, copy.from, sizeof(now));
    if (now != copy.value) {
      simt::fail("race", copy.at, "what this copies has changed before its wait");
    }
  }
  memcpy(&copy.to->bytes[copy.offset], &copy.value, sizeof(copy.value));
  copy.to->track(copy.offset, sizeof(copy.value), Access::arrive, *running, *copy.site, copy.at);
}

void Launch::check_no_copies() {
  running->copies.groups.push_back(std::move(running->copies.open));
  for (const auto& group : running->copies.groups) {
    if (!group.empty()) {
      simt::fail("not_awaited", group.front().at, "the thread ends before this copy has arrived");
    }
  }
}

}  // namespace simt
