#include "simt/fiber.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#ifndef __x86_64__
#error "simt switches its fibers by hand, on x86-64 only"
#endif

// The registers that the System V calling convention lets a function rely on across a call.
asm(R"(
.text
.type simt_switch, @function
.hidden simt_switch
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

namespace {

constexpr size_t guard = 4096;  // a page at the low end: running over a stack's end is a fault

std::byte* new_stack() {
  void* memory = mmap(
      nullptr,
      Stacks::bytes,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    throw std::runtime_error(std::string("simt: no stack for one more thread: ") + strerror(errno));
  }
  return static_cast<std::byte*>(memory);
}

}  // namespace

Stacks::~Stacks() {
  for (std::byte* stack : stacks_) {
    munmap(stack, bytes);
  }
}

void* Stacks::begin(size_t i, void (*entry)() noexcept) {
  while (stacks_.size() <= i) {
    stacks_.push_back(new_stack());
  }
  // Stacks that all began at the same place of a page would share a few lines of the cache.
  void** top = reinterpret_cast<void**>(stacks_[i] + bytes - 128 * (i % 16));
  *--top = nullptr;  // where entry would return to: the end of a debugger's walk
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) {
    *--top = nullptr;
  }
  return top;
}

}  // namespace simt
