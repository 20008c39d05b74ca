#include "pages.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "model.h"

namespace motet {
namespace {

// Calls f(target's first page, source's first page, number of pages) for each run of pages that are neighbours on both sides.
template <typename F>
void over_runs(std::span<const int32_t> to, std::span<const int32_t> from, F f) {
  for (size_t begin = 0, end; begin < to.size(); begin = end) {
    end = begin + 1;
    while (end < to.size() && to[end] == to[end - 1] + 1 && from[end] == from[end - 1] + 1) ++end;
    f(to[begin], from[begin], end - begin);
  }
}

}  // namespace

void check_pages(std::span<const int32_t> pages, int64_t num_pages, const char* name) {
  std::vector<bool> seen(num_pages);
  for (const int32_t page : pages) {
    if (page < 0 || page >= num_pages || seen[page])
      throw AdapterError(std::string(name) + ": expected distinct ids below " + std::to_string(num_pages) + ", got " + std::to_string(page) +
                         (page >= 0 && page < num_pages ? " twice" : ""));
    seen[page] = true;
  }
}

int64_t num_pages_of(const Model& model, Tier tier) { return tier == Tier::kHost ? model.num_host_pages() : model.num_pages(); }

void copy_pages(const Model& model, Tier source, std::span<const int32_t> from, std::span<const int32_t> to) {
  Device& device = model.device();
  const size_t page_bytes = model.page_bytes();
  Event last = 0;
  over_runs(to, from, [&](int32_t target, int32_t origin, size_t count) {
    const size_t at = static_cast<size_t>(target) * page_bytes, from_at = static_cast<size_t>(origin) * page_bytes;
    last = source == Tier::kHost ? device.copy_to_arena(device.arena() + at, device.host_arena() + from_at, count * page_bytes)
                                 : device.copy_from_arena(device.host_arena() + at, device.arena() + from_at, count * page_bytes);
  });
  device.wait(last);
}

void clear_pages(const Model& model, Tier tier, std::span<const int32_t> pages) {
  Device& device = model.device();
  const size_t page_bytes = model.page_bytes();
  Event last = 0;
  for (const int32_t page : pages) {
    const size_t at = static_cast<size_t>(page) * page_bytes;
    if (tier == Tier::kHost) std::memset(device.host_arena() + at, 0, page_bytes);
    else last = device.clear_arena(device.arena() + at, page_bytes);
  }
  device.wait(last);
}

void read_host_pages(const Model& model, std::span<const int32_t> pages, uint8_t* bytes) {
  for (size_t i = 0; i < pages.size(); ++i)
    std::memcpy(bytes + i * model.page_bytes(), model.device().host_arena() + static_cast<size_t>(pages[i]) * model.page_bytes(), model.page_bytes());
}

void write_host_pages(const Model& model, std::span<const int32_t> pages, const uint8_t* bytes) {
  for (size_t i = 0; i < pages.size(); ++i)
    std::memcpy(model.device().host_arena() + static_cast<size_t>(pages[i]) * model.page_bytes(), bytes + i * model.page_bytes(), model.page_bytes());
}

}  // namespace motet
