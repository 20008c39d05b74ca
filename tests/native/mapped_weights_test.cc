// Files of any size are mapped whole, whatever the page cache has of them.
#include "mapped_weights.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "temporary_file.h"

namespace motet {
namespace {

std::vector<uint8_t> bytes_of(size_t num_bytes) {
  std::vector<uint8_t> bytes(num_bytes);
  for (size_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<uint8_t>(i * 2654435761u >> 16);
  return bytes;
}

TEST(MappedWeights, AreTheFile) {
  for (const size_t num_bytes : {size_t{1}, size_t{4096}, size_t{2} << 20, (size_t{7} << 20) + 123}) {
    const std::vector<uint8_t> bytes = bytes_of(num_bytes);
    const TemporaryFile file("weights", bytes);
    const int fd = open(file.path().c_str(), O_RDONLY | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    // Just written, then on the disk, then read by read(), and twice at a time.
    const auto written = map_weights(fd, num_bytes);
    ASSERT_TRUE(written);
    EXPECT_EQ(std::memcmp(written.get(), bytes.data(), num_bytes), 0);
    fdatasync(fd);
    std::vector<uint8_t> read(num_bytes);
    EXPECT_EQ(pread(fd, read.data(), num_bytes, 0), static_cast<ssize_t>(num_bytes));
    const auto synced = map_weights(fd, num_bytes);
    close(fd);
    ASSERT_TRUE(synced);
    EXPECT_EQ(std::memcmp(synced.get(), bytes.data(), num_bytes), 0);
    EXPECT_EQ(std::memcmp(written.get(), bytes.data(), num_bytes), 0);
  }
}

TEST(MappedWeights, AFileThatCannotBeMappedIsNull) {
  errno = 0;
  EXPECT_FALSE(map_weights(-1, 4096));
  EXPECT_EQ(errno, EBADF);
}

}  // namespace
}  // namespace motet
