// Where the time of steps goes: nanoseconds by part of the forward pass, summed since the model was opened. The model
// says after each operation which part it was. One thread counts, any may read.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace motet {

enum class StepPart {
  kPlan,        // adapters' rows, rope angles, attention's tasks
  kEmbed,
  kWeights,     // waiting for those of a layer that streams
  kNorm,        // of rows and heads, and the residual sums
  kQkv,         // quantising, q, k and v projections, their adapters and biases; the same below
  kRope,
  kKvWrite,
  kAttention,
  kOut,
  kGateUp,      // with the activation
  kDown,
  kHead,
  kSample,
};
inline constexpr std::array kStepPartNames = {"plan", "embed", "weights", "norm", "qkv",        "rope", "kv_write", "attention",
                                              "out",  "gate_up", "down", "head", "sample"};

class StepClock {
 public:
  // What went by since the last start or lap is not any part's.
  void start() { last_ = Clock::now(); }
  // What went by since then is this part's.
  void lap(StepPart part) {
    const Clock::time_point now = Clock::now();
    auto& sum = nanoseconds_[static_cast<size_t>(part)];
    sum.store(sum.load(std::memory_order_relaxed) + std::chrono::nanoseconds(now - last_).count(), std::memory_order_relaxed);
    last_ = now;
  }
  int64_t nanoseconds(StepPart part) const { return nanoseconds_[static_cast<size_t>(part)].load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
  std::array<std::atomic<int64_t>, kStepPartNames.size()> nanoseconds_{};
};

}  // namespace motet
