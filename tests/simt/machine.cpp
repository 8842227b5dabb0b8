#include "simt/machine.h"

namespace simt {

Machine::Machine(Options asked) : State(std::move(asked)) {
  if (options.resident < 1 || options.step_limit < 1) {
    throw std::invalid_argument(
        "simt: resident=" + std::to_string(options.resident) +
        ", step_limit=" + std::to_string(options.step_limit) + " must be positive");
  }
}

void Machine::run(const std::string& name, const Shape& shape, std::function<void()> body) {
  Launch launch(*this, name, shape, std::move(body));
  memory.forget_sectors();
  launch.run();
  launches_.push_back({name, memory.loaded_sectors(), memory.stored_sectors()});
}

Report Machine::report() const {
  const auto& met = sites.all();
  return {launches_, {met.begin(), met.end()}};
}

}  // namespace simt
