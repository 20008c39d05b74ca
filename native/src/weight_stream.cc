#include "weight_stream.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace motet {
namespace {

// What reads past the page cache must be aligned to, in the file and in memory.
constexpr size_t kBlockBytes = 4096;
// Between two matrices of a layer: reading on over a gap like this is faster than beginning another read.
constexpr uint64_t kMaxGapBytes = 64 << 10;

uint64_t block_floor(uint64_t n) { return n / kBlockBytes * kBlockBytes; }
uint64_t block_ceil(uint64_t n) { return block_floor(n + kBlockBytes - 1); }

uint64_t begin_of(const PackedTensorSpec& t) { return static_cast<uint64_t>(t.offset_bytes); }
uint64_t end_of(const PackedTensorSpec& t) { return static_cast<uint64_t>(t.offset_bytes + t.size_bytes); }

// Runs that cover the tensors, one after another in memory from `memory_offset` on.
std::vector<Extent> cover(std::vector<const PackedTensorSpec*> tensors, uint64_t max_gap_bytes, size_t memory_offset) {
  std::sort(tensors.begin(), tensors.end(), [](const auto* a, const auto* b) { return a->offset_bytes < b->offset_bytes; });
  std::vector<Extent> extents;
  for (const auto* t : tensors) {
    if (extents.empty() || block_floor(begin_of(*t)) > extents.back().file_offset + extents.back().num_bytes + max_gap_bytes)
      extents.push_back({block_floor(begin_of(*t)), 0, 0, 0});
    Extent& last = extents.back();
    last.num_needed = std::max<size_t>(last.num_needed, end_of(*t) - last.file_offset);
    last.num_bytes = block_ceil(last.num_needed);
  }
  for (auto& e : extents) {
    e.memory_offset = memory_offset;
    memory_offset += e.num_bytes;
  }
  return extents;
}

size_t bytes_of(std::span<const Extent> extents) {
  size_t sum = 0;
  for (const auto& e : extents) sum += e.num_bytes;
  return sum;
}

size_t offset_in(std::span<const Extent> extents, const PackedTensorSpec& t) {
  for (const auto& e : extents)
    if (begin_of(t) >= e.file_offset && end_of(t) <= e.file_offset + e.num_bytes) return e.memory_offset + (begin_of(t) - e.file_offset);
  throw std::logic_error("weights: a tensor is in no extent");
}

std::shared_ptr<uint8_t> aligned(size_t num_bytes) {
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kBlockBytes, num_bytes));
  if (!memory) throw std::bad_alloc();
  return {memory, [](uint8_t* p) { std::free(p); }};
}

}  // namespace

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) close(fd_);
}

WeightPlan plan_weights(size_t fixed_bytes, std::span<const size_t> layer_bytes, size_t budget_bytes) {
  const size_t num_layers = layer_bytes.size();
  WeightPlan plan;
  size_t needed = 0;
  for (size_t num_resident = num_layers; num_resident-- > 0;) {
    plan = {std::vector<bool>(num_layers), fixed_bytes, 0};
    for (size_t l = 0; l < num_layers; ++l) {
      plan.is_resident[l] = (l + 1) * num_resident / num_layers > l * num_resident / num_layers;
      if (plan.is_resident[l]) plan.resident_bytes += layer_bytes[l];
      else plan.slot_bytes = std::max(plan.slot_bytes, layer_bytes[l]);
    }
    needed = plan.resident_bytes + kNumWeightSlots * plan.slot_bytes;
    if (needed <= budget_bytes) return plan;
  }
  throw RuntimeError("weight memory: expected at least " + std::to_string(needed) + " bytes, " + std::to_string(fixed_bytes) +
                     " of them for what is always resident and two times " + std::to_string(plan.slot_bytes) + " for layers on their way, got " +
                     std::to_string(budget_bytes));
}

WeightStream::WeightStream(FileDescriptor file, const std::string& path, std::span<const PackedTensorSpec> tensors, int num_layers,
                           size_t budget_bytes, Device& device, bool may_be_direct)
    : file_(std::move(file)), path_(path), tensors_(tensors.begin(), tensors.end()) {
  const auto is_of = [](const PackedTensorSpec& t, int layer) { return layer < 0 ? t.layer < 0 || t.is_vector : t.layer == layer && !t.is_vector; };
  const auto cover_layer = [&](int layer, size_t memory_offset) {
    std::vector<const PackedTensorSpec*> found;
    for (const auto& t : tensors_)
      if (is_of(t, layer)) found.push_back(&t);
    return cover(std::move(found), layer < 0 ? 0 : kMaxGapBytes, memory_offset);
  };
  std::vector<size_t> layer_bytes;
  for (int l = 0; l < num_layers; ++l) {
    layer_extents_.push_back(cover_layer(l, 0));
    layer_bytes.push_back(bytes_of(layer_extents_.back()));
  }
  std::vector<Extent> residents = cover_layer(-1, 0);
  plan_ = plan_weights(bytes_of(residents), layer_bytes, budget_bytes);

  places_.resize(tensors_.size());
  const auto place = [&](int layer, int slot_layer, std::span<const Extent> extents) {
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (is_of(tensors_[i], layer)) places_[i] = {slot_layer, offset_in(extents, tensors_[i])};
  };
  place(-1, -1, residents);
  for (int l = 0; l < num_layers; ++l) {
    if (is_streamed(l)) {
      order_.push_back(l);
      bytes_per_step_ += layer_bytes[l];
      place(l, l, layer_extents_[l]);
    } else {
      const std::vector<Extent> extents = cover_layer(l, bytes_of(residents));
      place(l, -1, extents);
      residents.insert(residents.end(), extents.begin(), extents.end());
    }
  }
  memory_ = device.allocate(plan_.resident_bytes + kNumWeightSlots * plan_.slot_bytes);
  for (int i = 0; i < kNumWeightSlots; ++i) slots_[i].memory = memory_.get() + plan_.resident_bytes + i * plan_.slot_bytes;
  if (may_be_direct) set_direct();
  read_counted(residents, memory_.get());
  thread_ = std::thread([this] { read_ahead(); });
}

WeightStream::~WeightStream() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  change_.notify_all();
  thread_.join();
}

// Past the page cache where the file system can: a read then costs the processor nothing but waiting, and the file takes no memory twice.
void WeightStream::set_direct() {
  const int flags = fcntl(file_.get(), F_GETFL);
  if (flags < 0 || fcntl(file_.get(), F_SETFL, flags | O_DIRECT) != 0) return;
  // Not at 0, so that larger blocks show.
  const auto block = aligned(kBlockBytes);
  is_direct_ = pread(file_.get(), block.get(), kBlockBytes, kBlockBytes) >= 0;
  if (!is_direct_) fcntl(file_.get(), F_SETFL, flags);
}

void WeightStream::read(const Extent& extent, uint8_t* memory) const {
  for (size_t done = 0; done < extent.num_needed;) {
    const ssize_t n = pread(file_.get(), memory + extent.memory_offset + done, extent.num_bytes - done, static_cast<off_t>(extent.file_offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw IoError("packed file " + path_ + ": cannot be read at byte " + std::to_string(extent.file_offset + done) + ": " + std::strerror(errno));
    done += static_cast<size_t>(n);
    // A direct read gives less than a block at the end of the file only, and there is none from there.
    if (done < extent.num_needed && (n == 0 || (is_direct_ && done % kBlockBytes != 0)))
      throw IoError("packed file " + path_ + ": expected " + std::to_string(extent.file_offset + extent.num_needed) + " bytes, got " +
                    std::to_string(extent.file_offset + done) + ": it was cut short");
  }
}

void WeightStream::read_counted(std::span<const Extent> extents, uint8_t* memory) {
  using Clock = std::chrono::steady_clock;
  const auto began = Clock::now();
  for (const auto& e : extents) read(e, memory);
  read_nanoseconds_.fetch_add(static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - began).count()), std::memory_order_relaxed);
  bytes_read_.fetch_add(bytes_of(extents), std::memory_order_relaxed);
}

const uint8_t* WeightStream::resident(size_t index) const { return places_[index].layer < 0 ? memory_.get() + places_[index].offset : nullptr; }

std::shared_ptr<const uint8_t> WeightStream::read_copy(size_t index) const {
  const Extent extent = cover({&tensors_[index]}, 0, 0)[0];
  auto memory = aligned(extent.num_bytes);
  read(extent, memory.get());
  return {memory, memory.get() + (begin_of(tensors_[index]) - extent.file_offset)};
}

void WeightStream::read_ahead() {
  std::unique_lock lock(mutex_);
  const auto is_empty = [](const Slot& slot) { return slot.state == SlotState::kEmpty; };
  while (true) {
    change_.wait(lock, [&] { return is_stopping_ || (failed_layer_ < 0 && std::any_of(std::begin(slots_), std::end(slots_), is_empty)); });
    if (is_stopping_) return;
    Slot& slot = *std::find_if(std::begin(slots_), std::end(slots_), is_empty);
    slot.state = SlotState::kReading;
    slot.layer = order_[next_];
    next_ = (next_ + 1) % order_.size();
    const uint64_t round = round_;
    lock.unlock();
    std::string error;
    try {
      read_counted(layer_extents_[slot.layer], slot.memory);
    } catch (const IoError& e) {
      error = e.what();
    }
    lock.lock();
    if (round != round_) {
      slot.state = SlotState::kEmpty;
    } else if (!error.empty()) {
      slot.state = SlotState::kEmpty;
      failed_layer_ = slot.layer;
      error_ = error;
    } else {
      slot.state = SlotState::kReady;
    }
    change_.notify_all();
  }
}

WeightStream::Slot* WeightStream::find(int layer) {
  for (auto& slot : slots_)
    if (slot.state == SlotState::kReady && slot.layer == layer) return &slot;
  return nullptr;
}

// What is being read is dropped when it is there.
void WeightStream::empty_slots() {
  ++round_;
  next_ = 0;
  failed_layer_ = -1;
  for (auto& slot : slots_)
    if (slot.state == SlotState::kReady) slot.state = SlotState::kEmpty;
  change_.notify_all();
}

void WeightStream::begin_step() {
  const std::lock_guard lock(mutex_);
  if (failed_layer_ >= 0) empty_slots();
}

const uint8_t* WeightStream::peek(int layer) {
  const std::lock_guard lock(mutex_);
  const Slot* const slot = find(layer);
  return slot ? slot->memory : nullptr;
}

const uint8_t* WeightStream::await(int layer) {
  std::unique_lock lock(mutex_);
  const Slot* slot = nullptr;
  change_.wait(lock, [&] { return (slot = find(layer)) != nullptr || failed_layer_ == layer; });
  if (!slot) throw IoError(error_);
  return slot->memory;
}

void WeightStream::release(int layer) {
  {
    const std::lock_guard lock(mutex_);
    find(layer)->state = SlotState::kEmpty;
  }
  change_.notify_all();
}

void WeightStream::rewind() {
  const std::lock_guard lock(mutex_);
  empty_slots();
}

}  // namespace motet
