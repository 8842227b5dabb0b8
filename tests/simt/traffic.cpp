#include "simt/traffic.h"

#include "simt/shared_memory.h"

#include <algorithm>

namespace simt {

namespace {

constexpr uint64_t sector = 32;

uint64_t sectors(uint32_t lanes, const uint64_t (&addresses)[32]) {
  uint64_t touched[32];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) {
      touched[count++] = addresses[lane] / sector;  // aligned accesses lie in one sector
    }
  }
  std::sort(touched, touched + count);
  return std::unique(touched, touched + count) - touched;
}

bool is_shared(Kind kind) {
  return kind == Kind::shared_load || kind == Kind::shared_store || kind == Kind::shared_atomic ||
      kind == Kind::ldmatrix;
}

}  // namespace

void Traffic::add(Site& site, unsigned lane, uint64_t address) {
  if (static_cast<int>(sites_.size()) <= site.index) {
    sites_.resize(site.index + 1);
  }
  AtSite& at = sites_[site.index];
  if (at.requests.empty()) {
    at.site = &site;
    met_.push_back(site.index);
  }
  const uint32_t turn = at.made[lane]++;
  if (turn == at.requests.size()) {
    at.requests.emplace_back();
  }
  at.requests[turn].lanes |= 1u << lane;
  at.requests[turn].address[lane] = address;
}

void Traffic::settle() {
  for (const int index : met_) {
    AtSite& at = sites_[index];
    Site& site = *at.site;
    site.requests += at.requests.size();
    for (const Request& request : at.requests) {
      if (is_shared(site.kind)) {
        const Wavefronts passes = wavefronts(request.lanes, request.address, site.bytes);
        site.wavefronts += passes.taken;
        site.conflicts += passes.taken - passes.needed;
      } else {
        site.sectors += sectors(request.lanes, request.address);
      }
    }
    std::fill(std::begin(at.made), std::end(at.made), 0);
    at.requests.clear();
  }
  met_.clear();
}

}  // namespace simt
