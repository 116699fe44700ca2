// Runs warp-synchronous CUDA C++ on the host: one fiber a thread, one block at a time. Test-only.
//
// What it is for: a kernel that is wrong should give a wrong answer here, or stop with a message.
//   - warps run in random order and are left at random points, so a missing barrier is seen;
//   - asynchronous copies land as early or as late as the machine may let them (both are tested),
//     so a missing or miscounted wait is seen;
//   - shared memory starts as NaN, and is a heap block of its exact size for the address sanitizer;
//   - lanes that meet at different instructions, and threads that wait for ever, are reported.
// What it cannot see: memory-model errors (missing fences), and races that give the right answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;

// When an asynchronous copy lands: at once, or only when somebody waits for it.
enum class Timing { EARLY, LATE };

// What a test can leave out, to show that it would be missed: what a thread waits at, and a step
// to the next operand of a warpgroup's product, which then takes the last one again.
enum class Sync : int {
  NONE,
  BLOCK_BARRIER,
  WARP_BARRIER,
  COPY_WAIT,
  MEMORY_BARRIER,
  DESCRIPTOR_STEP
};
constexpr int SYNC_KINDS = 6;

struct Options {
  Timing copies = Timing::LATE;
  uint32_t seed = 1;
  Sync left_out = Sync::NONE;  // every thread passes its `left_out_index`-th of these
  int left_out_index = 0;
};

// Counted over a launch. A conflict-free load of an 8x8 matrix takes one wavefront.
struct Report {
  long matrices_loaded = 0;
  long wavefronts = 0;
  long products = 0;
  int syncs[SYNC_KINDS] = {};  // the most that one thread came to, by kind
};

enum class State { READY, AT_WARP, AT_WARPGROUP, AT_BLOCK, POLLING, DONE };

struct PendingCopy {
  void* shared;
  const void* global;
  int bytes;
  int size;
};

// A product of a warpgroup that has been issued and not yet waited for: one lane's share of it.
struct WarpgroupProduct {
  float* d;
  uint32_t a[4];
  uint64_t shared_a;  // describes a instead, where it lies in shared memory; else 0
  uint64_t b;
  int columns;
  bool transposed, bfloat16, add;
};

struct Lane {
  Fiber fiber;
  State state = State::READY;
  void* operand = nullptr;  // what this lane brings to the instruction it waits at
  std::vector<std::vector<PendingCopy>> copy_groups;    // the last one is still open
  std::vector<std::vector<WarpgroupProduct>> products;  // likewise
  uint64_t descriptor = 0, left_descriptor = 0;         // of the operands of the last product
  int passed[SYNC_KINDS] = {};
};

struct Meeting {
  int arrived = 0;
  const void* instruction = nullptr;
};

class Block;
inline Block*& current_block() {
  static Block* block = nullptr;
  return block;
}

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes, Options options, std::function<void()> body)
      : options(options),
        random(options.seed),
        lanes(threads),
        body_(std::move(body)),
        shared_bytes_(shared_bytes) {
    if (threads == 0 || threads % WARP != 0 || threads > 1024)
      throw std::runtime_error("a block has a multiple of 32 threads, at most 1024, got " +
                               std::to_string(threads));
    warps_.resize(threads / WARP);
    warpgroups_.resize((threads + WARPGROUP - 1) / WARPGROUP);
  }

  void run(Index3 index) {
    this->index = index;
    // Exactly the bytes asked for, aligned as the kernels ask, so the sanitizer sees one too many.
    void* memory =
        std::aligned_alloc(1024, (std::max<size_t>(shared_bytes_, 1) + 1023) / 1024 * 1024);
    shared_owner_.reset(static_cast<char*>(memory));
    std::memset(memory, 0xFF, shared_bytes_);
    fiber_poison_tail(memory, shared_bytes_);
    for (Lane& lane : lanes) {
      lane.state = State::READY;
      lane.copy_groups.assign(1, {});
      lane.products.assign(1, {});
      lane.descriptor = lane.left_descriptor = 0;
      std::fill_n(lane.passed, SYNC_KINDS, 0);
      lane.fiber.start(&Block::enter);
    }
    std::fill(warps_.begin(), warps_.end(), Meeting{});
    std::fill(warpgroups_.begin(), warpgroups_.end(), Meeting{});
    events.clear();
    schedule();
    fiber_unpoison_tail(memory, shared_bytes_);
  }

  char* shared() { return shared_owner_.get(); }
  size_t shared_bytes() const { return shared_bytes_; }
  Lane& lane() { return lanes[current]; }
  int lane_in_warp() const { return current % WARP; }

  // Gives way to the scheduler until somebody makes this lane READY again.
  void wait_as(State state) {
    lane().state = state;
    lane().fiber.leave();
  }

  // Lanes of a warp (or of a warpgroup) meet at an instruction; the last to arrive carries it out
  // once for all of them. `instruction` tells instructions apart.
  template <class Operand, class Act>
  void meet(int width, State state, const void* instruction, Operand* operand, Act act) {
    Meeting& meeting = width == WARP ? warps_[current / WARP] : warpgroups_[current / WARPGROUP];
    if (meeting.arrived == 0) meeting.instruction = instruction;
    if (meeting.instruction != instruction)
      fail("lanes of one warp meet at different instructions");
    lane().operand = operand;
    if (++meeting.arrived < width) return wait_as(state);
    meeting = {};
    int first = current / width * width;
    std::vector<Operand*> operands(width);
    for (int i = 0; i < width; ++i) {
      operands[i] = static_cast<Operand*>(lanes[first + i].operand);
      lanes[first + i].state = State::READY;
    }
    act(operands.data());
  }

  // Whether this thread is to do without the synchronisation it has come to.
  bool leaves_out(Sync kind) {
    int index = lane().passed[static_cast<int>(kind)]++;
    report.syncs[static_cast<int>(kind)] =
        std::max(report.syncs[static_cast<int>(kind)], index + 1);
    return kind == options.left_out && index == options.left_out_index;
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ =
        what + " (block " + std::to_string(index.x) + ", thread " + std::to_string(current) + ")";
    lane().state = State::DONE;
    lane().fiber.leave();
    std::abort();  // a failed block is never resumed
  }

  Options options;
  std::mt19937 random;
  Index3 grid, index;
  std::vector<Lane> lanes;
  int current = 0;
  Report report;
  std::vector<std::function<void()>> events;  // copies under way that no thread waits for by itself

 private:
  static void enter() {
    Block& block = *current_block();
    block.body_();
    block.lane().state = State::DONE;
    block.lane().fiber.leave();
  }

  bool any(int warp, State state) const {
    for (int i = warp * WARP; i < (warp + 1) * WARP; ++i)
      if (lanes[i].state == state) return true;
    return false;
  }

  // One step of a warp: every lane that can run does so until it waits, starting anywhere.
  void step(int warp) {
    int first = random() % WARP;
    for (int i = 0; i < WARP && error_.empty(); ++i) {
      current = warp * WARP + (first + i) % WARP;
      if (lane().state == State::READY) lane().fiber.enter();
    }
  }

  void schedule() {
    int idle_rounds = 0;
    std::vector<int> runnable;
    for (;;) {
      runnable.clear();
      bool all_done = true, all_at_barrier = true, some_done = false, polling = false;
      for (size_t warp = 0; warp < warps_.size(); ++warp)
        if (any(warp, State::READY)) runnable.push_back(warp);
      for (const Lane& lane : lanes) {
        all_done &= lane.state == State::DONE;
        some_done |= lane.state == State::DONE;
        all_at_barrier &= lane.state == State::AT_BLOCK || lane.state == State::DONE;
        polling |= lane.state == State::POLLING;
      }
      if (all_done) return;
      if (!runnable.empty()) {
        int warp = runnable[random() % runnable.size()];
        do step(warp);
        while (error_.empty() && any(warp, State::READY) && random() % 16 != 0);
        if (!error_.empty()) throw std::runtime_error(error_);
      } else if (all_at_barrier) {
        if (some_done) throw std::runtime_error("some threads returned before a block barrier");
        for (Lane& lane : lanes) lane.state = State::READY;
      } else if (!polling) {
        throw std::runtime_error("deadlock: no thread can go on" + where());
      }
      if (!events.empty() && polling && runnable.empty()) {  // as late as may be: somebody waits
        size_t which = random() % events.size();             // they land in any order
        auto event = std::move(events[which]);
        events.erase(events.begin() + which);
        event();
        idle_rounds = 0;
      }
      if (polling && runnable.empty()) {
        if (++idle_rounds > 10000)
          throw std::runtime_error(
              "deadlock: threads wait for a barrier in memory that never "
              "completes" +
              where());
        for (Lane& lane : lanes)
          if (lane.state == State::POLLING) lane.state = State::READY;
      }
    }
  }

  std::string where() const {
    std::string text = ":";
    for (size_t i = 0; i < lanes.size(); i += WARP)
      text += " warp " + std::to_string(i / WARP) + " lane 0 in state " +
              std::to_string(static_cast<int>(lanes[i].state));
    return text;
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::function<void()> body_;
  size_t shared_bytes_;
  std::unique_ptr<char, Free> shared_owner_;
  std::vector<Meeting> warps_, warpgroups_;
  std::string error_;
};

// Runs `body` for every thread of every block, the blocks one after another.
inline Report launch(unsigned blocks, unsigned threads, size_t shared_bytes, Options options,
                     std::function<void()> body) {
  Block block(threads, shared_bytes, options, std::move(body));
  current_block() = &block;
  block.grid = {blocks, 1, 1};
  for (unsigned x = 0; x < blocks; ++x) block.run({x, 0, 0});
  current_block() = nullptr;
  return block.report;
}

// All 32 lanes bring an operand; `act(operands)` is carried out once for the warp.
template <class Operand, class Act>
void warp_instruction(Operand& mine, Act act) {
  static const char identity = 0;
  current_block()->meet(WARP, State::AT_WARP, &identity, &mine, act);
}

// The same for the 128 lanes of a warpgroup.
template <class Operand, class Act>
void warpgroup_instruction(Operand& mine, Act act) {
  static const char identity = 0;
  current_block()->meet(WARPGROUP, State::AT_WARPGROUP, &identity, &mine, act);
}

}  // namespace emulator

// ---- the parts of the CUDA language that kernels use
#define __restrict__ __restrict
#define threadIdx \
  (emulator::Index3{static_cast<unsigned>(emulator::current_block()->current), 0, 0})
#define blockIdx (emulator::current_block()->index)
#define gridDim (emulator::current_block()->grid)
#define blockDim \
  (emulator::Index3{static_cast<unsigned>(emulator::current_block()->lanes.size()), 1, 1})

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

inline void __syncthreads() {
  emulator::Block& block = *emulator::current_block();
  if (!block.leaves_out(emulator::Sync::BLOCK_BARRIER)) block.wait_as(emulator::State::AT_BLOCK);
}
inline void __syncwarp() {
  if (emulator::current_block()->leaves_out(emulator::Sync::WARP_BARRIER)) return;
  int nothing = 0;
  emulator::warp_instruction(nothing, [](int**) {});
}
