// Groups what the lanes of a warp access into the requests that a GPU would issue.
#pragma once

#include "simt/report.h"

namespace simt {

// One warp's accesses since its lanes last met. Between two meetings the k-th access of each lane
// at one site is taken for one instruction of the warp. (Where lanes skip a site in different
// turns of a loop, that puts more lanes into one request than a GPU could.)
class Traffic {
 public:
  void add(Site& site, unsigned lane, uint64_t address);
  void settle();  // the lanes have met

 private:
  struct Request {
    uint32_t lanes = 0;
    uint64_t address[32];
  };
  struct AtSite {
    Site* site = nullptr;
    uint32_t made[32] = {};  // accesses of each lane
    std::vector<Request> requests;
  };

  std::vector<AtSite> sites_;  // by Site::index
  std::vector<int> met_;  // those of sites_ that have requests
};

}  // namespace simt
