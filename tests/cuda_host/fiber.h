// A fiber: a stack that can be left and entered again, with the address sanitizer told of it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer in *from, and goes on at `to`.
extern "C" void patchgen_fiber_switch(void** from, void* to);
asm(R"(
.text
.weak patchgen_fiber_switch
.type patchgen_fiber_switch, @function
patchgen_fiber_switch:
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
.size patchgen_fiber_switch, .-patchgen_fiber_switch
)");
#else
#include <ucontext.h>  // slower: a system call a switch
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr size_t STACK_BYTES = 256 * 1024;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber(Fiber&& other) noexcept : stack_(other.stack_) { other.stack_ = nullptr; }
  ~Fiber() {
    if (stack_) munmap(stack_, STACK_BYTES);
  }

  // The next enter() calls `function`, which must end in leave().
  void start(void (*function)()) {
    if (!stack_) {
      void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) std::abort();
      stack_ = static_cast<char*>(memory);
    }
    function_ = function;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, STACK_BYTES);  // what an abandoned fiber left behind
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + STACK_BYTES) - 3;
    *top = nullptr;  // the return address of trampoline(), where a call would have left it
    *--top = reinterpret_cast<void*>(&Fiber::trampoline);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::trampoline, 0);
#endif
  }

  // From the scheduler into the fiber, until it leaves.
  void enter() {
    active() = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, STACK_BYTES);
#endif
#if defined(__x86_64__)
    patchgen_fiber_switch(&scheduler_pointer_, pointer_);
#else
    swapcontext(&scheduler_context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  // From the fiber back into the scheduler.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(__x86_64__)
    patchgen_fiber_switch(&pointer_, scheduler_pointer_);
#else
    swapcontext(&context_, &scheduler_context_);
#endif
    arrived(fake_stack_);
  }

 private:
  static Fiber*& active() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static void trampoline() {
    active()->arrived(nullptr);
    active()->function_();
    std::abort();
  }
  void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  char* stack_ = nullptr;
  void (*function_)() = nullptr;
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
  void* scheduler_pointer_ = nullptr;
#else
  ucontext_t context_, scheduler_context_;
#endif
};

// Bytes between `used` and the next multiple of 1024, which the allocator rounded up to.
inline void fiber_poison_tail([[maybe_unused]] void* memory, [[maybe_unused]] size_t used) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_cast<char*>(memory) + used, (1024 - used % 1024) % 1024);
#endif
}
inline void fiber_unpoison_tail([[maybe_unused]] void* memory, [[maybe_unused]] size_t used) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(static_cast<char*>(memory) + used, (1024 - used % 1024) % 1024);
#endif
}

}  // namespace emulator
