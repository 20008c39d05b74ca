// A file in memory that processes share: the page cache's pages, mapped.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace motet {

// Maps num_bytes of a file read-only and reads them, so that what runs over them waits for no disk. They lie on huge pages where the
// kernel and the file system can do that (on Linux 6.16 or newer for ext4): a step reads all its weights once, and goes from one page
// to the next for every 4 KiB otherwise. What another process has mapped stays where it is. Null, with errno, when it cannot be mapped.
std::shared_ptr<const uint8_t> map_weights(int fd, size_t num_bytes);

}  // namespace motet
