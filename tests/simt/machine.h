// What a test binds a kernel with:
//
//   simt::Machine machine(options);
//   machine.memory.allow(input, bytes, "input", false);
//   machine.launch("kernel", grid, block, shared_bytes, cooperative, kernel, arguments...);
//   return machine.report();
#pragma once

#include "simt/launch.h"

#include <tuple>

namespace simt {

class Machine : State {
 public:
  using State::memory;

  explicit Machine(Options options);

  // Arguments are passed by value, as by <<<>>>. Throws Error.
  template <class... Parameters, class... Arguments>
  void launch(
      const std::string& name,
      dim3 grid,
      dim3 block,
      size_t dynamic_shared,
      bool cooperative,
      void (*kernel)(Parameters...),
      Arguments&&... arguments) {
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    run(name, {grid, block, dynamic_shared, cooperative}, [&] { std::apply(kernel, parameters); });
  }

  Report report() const;  // of all launches so far

 private:
  void run(const std::string& name, const Shape& shape, std::function<void()> body);

  std::vector<Launched> launches_;
};

}  // namespace simt
