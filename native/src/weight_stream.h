// Weights that the memory of the device cannot hold at once. All that is not a matrix of a layer (embedding, head, norms,
// biases) and as many whole layers as fit are resident; the other layers' matrices come for each step, layer after layer, through
// a ring of slots. A thread reads them from the packed file ahead of the steps: it fills a slot as soon as the layer that was in
// it is computed, also between steps. Superpipeline (Abbasi & Lim, 2024) and Hermes (Han et al., 2024) stream layers like this.
//
// Resident layers are spread evenly over the depth. The disk then reads all the time: while one of them is computed the next
// slot fills. Side by side, they would leave the disk idle as soon as all slots are full.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "model.h"

namespace motet {

struct IoError : std::runtime_error { using std::runtime_error::runtime_error; };

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  FileDescriptor& operator=(FileDescriptor&&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Two: one layer is computed, and one comes. More would take room from resident layers and bring no byte earlier.
inline constexpr int kNumWeightSlots = 2;

// Which layers stay. The ring has kNumWeightSlots slots of slot_bytes.
struct WeightPlan {
  std::vector<bool> is_resident;  // by layer
  size_t resident_bytes = 0;      // fixed_bytes and the resident layers
  size_t slot_bytes = 0;          // of the largest layer that streams
};
// The most layers that can stay within the budget beside fixed_bytes and the ring; at least one streams. Throws RuntimeError with the
// least budget when not even none can.
WeightPlan plan_weights(size_t fixed_bytes, std::span<const size_t> layer_bytes, size_t budget_bytes);

// A run of bytes of the packed file in whole blocks, and where it lies in the memory that it is read to. The last of
// `num_bytes` may be past the end of the file, the first `num_needed` are not.
struct Extent {
  uint64_t file_offset = 0;
  size_t num_bytes = 0, num_needed = 0, memory_offset = 0;
};

class WeightStream {
 public:
  // Reads the residents and starts the thread. `file` is the packed file; `tensors` lie inside it. Throws RuntimeError when the
  // budget is too small, and IoError. may_be_direct false: as where the file system has no direct reads.
  WeightStream(FileDescriptor file, const std::string& path, std::span<const PackedTensorSpec> tensors, int num_layers, size_t budget_bytes,
               Device& device, bool may_be_direct = true);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  bool is_streamed(int layer) const { return !plan_.is_resident[static_cast<size_t>(layer)]; }
  // Of tensors[index]: its bytes, null when they stream, and then where they lie in a slot.
  const uint8_t* resident(size_t index) const;
  size_t slot_offset(size_t index) const { return places_[index].offset; }
  // A copy of a tensor that streams, for any thread. Throws IoError.
  std::shared_ptr<const uint8_t> read_copy(size_t index) const;

  // On the thread that runs steps. A read that failed is tried again by the next step.
  void begin_step();
  // The slot that has this layer, null while none has it.
  const uint8_t* peek(int layer);
  // Waits for it. Throws IoError when it could not be read. The layers that stream are asked for in their order.
  const uint8_t* await(int layer);
  // The layer is computed: its slot may be filled again.
  void release(int layer);
  // The step ended before its last layer: the next one begins with the first.
  void rewind();

  const WeightPlan& plan() const { return plan_; }
  size_t bytes_per_step() const { return bytes_per_step_; }
  // Whether reads go past the page cache.
  bool is_direct() const { return is_direct_; }
  // Of all reads of the residents and of the ring: bytes, and the time that the reading took.
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  uint64_t read_nanoseconds() const { return read_nanoseconds_.load(std::memory_order_relaxed); }

 private:
  struct Place {
    int layer;      // −1: it is resident
    size_t offset;  // in the residents, or in a slot
  };
  enum class SlotState { kEmpty, kReading, kReady };
  struct Slot {
    SlotState state = SlotState::kEmpty;
    int layer = -1;
    uint8_t* memory = nullptr;
  };

  void set_direct();
  void read(const Extent& extent, uint8_t* memory) const;
  void read_counted(std::span<const Extent> extents, uint8_t* memory);
  void read_ahead();
  Slot* find(int layer);
  void empty_slots();

  FileDescriptor file_;
  std::string path_;
  std::vector<PackedTensorSpec> tensors_;
  bool is_direct_ = false;
  WeightPlan plan_;
  std::vector<Place> places_;                       // by tensor
  std::vector<std::vector<Extent>> layer_extents_;  // by layer: in a slot
  size_t bytes_per_step_ = 0;
  std::vector<int> order_;  // the layers that stream
  std::shared_ptr<uint8_t> memory_;  // the residents, then the slots
  std::atomic<uint64_t> bytes_read_{0}, read_nanoseconds_{0};

  std::mutex mutex_;
  std::condition_variable change_;
  Slot slots_[kNumWeightSlots];
  size_t next_ = 0;          // in order_: what is read next
  uint64_t round_ = 0;       // grows when the slots are emptied: what was being read then is not wanted
  int failed_layer_ = -1;    // the thread reads no more until the slots are emptied
  std::string error_;
  bool is_stopping_ = false;
  std::thread thread_;  // last: it works with what is above
};

}  // namespace motet
