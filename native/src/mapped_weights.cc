#include "mapped_weights.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>

namespace motet {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, of Linux 5.14, which older headers do not name
// A file is read anew, to lie on huge pages, when that takes no longer.
constexpr double kMostSeconds = 5;

// Whether any of a mapping lies on huge pages. Linux says so of whole mappings only (smaps).
bool has_huge_pages(const uint8_t* mapping) {
  char begin[32];
  std::snprintf(begin, sizeof begin, "%lx-", reinterpret_cast<unsigned long>(mapping));
  std::ifstream maps("/proc/self/smaps");
  bool is_ours = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.starts_with(begin)) is_ours = true;
    if (!is_ours || !line.starts_with("FilePmdMapped:")) continue;
    return std::stoul(line.substr(line.find(':') + 1)) > 0;
  }
  return false;
}

// As the page cache has it, or as it comes from the disk.
void read_in(uint8_t* address, size_t num_bytes) {
  if (madvise(address, num_bytes, kPopulateRead) != 0) madvise(address, num_bytes, MADV_WILLNEED);
}

// Takes the bytes out of the page cache, but for what others have mapped or nobody has written to the disk yet.
void drop(int fd, uint8_t* address, size_t num_bytes) {
  madvise(address, num_bytes, MADV_DONTNEED);
  posix_fadvise(fd, 0, static_cast<off_t>(num_bytes), POSIX_FADV_DONTNEED);
}

}  // namespace

std::shared_ptr<const uint8_t> map_weights(int fd, size_t num_bytes) {
  // Places in the file and in memory have to agree on where a huge page begins.
  void* const reserved = mmap(nullptr, num_bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  const std::shared_ptr<void> reservation(reserved, [num_bytes](void* p) { munmap(p, num_bytes + kHugePage); });
  auto* const at = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(reserved) + kHugePage - 1) / kHugePage * kHugePage);
  if (mmap(at, num_bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return nullptr;
  if (num_bytes >= kHugePage && madvise(at, num_bytes, MADV_HUGEPAGE) == 0) {
    // What is read through here comes on huge pages, where that is possible at all; what read() has brought in, or write(), lies on
    // small ones. The first piece shows which it is.
    read_in(at, kHugePage);
    if (!has_huge_pages(at)) {
      drop(fd, at, kHugePage);
      const auto start = std::chrono::steady_clock::now();
      read_in(at, kHugePage);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      const double num_pieces = static_cast<double>(num_bytes) / kHugePage;
      if (has_huge_pages(at) && seconds.count() * num_pieces <= kMostSeconds) drop(fd, at, num_bytes);
    }
  }
  read_in(at, num_bytes);
  return {reservation, at};
}

}  // namespace motet
