// A file that goes with its object.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace motet {

class TemporaryFile {
 public:
  TemporaryFile(const char* name, const std::vector<uint8_t>& bytes) : path_(testing::TempDir() + "motet-" + std::to_string(getpid()) + "-" + name) {
    std::FILE* file = std::fopen(path_.c_str(), "wb");
    EXPECT_EQ(std::fwrite(bytes.data(), 1, bytes.size(), file), bytes.size());
    std::fclose(file);
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace motet
