// Writes GGUF files in memory, valid ones and, through its raw methods, any others.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace motet {

class GgufBuilder {
 public:
  GgufBuilder& raw(const void* data, size_t size) {
    const auto* at = static_cast<const uint8_t*>(data);
    bytes.insert(bytes.end(), at, at + size);
    return *this;
  }
  template <typename T>
  GgufBuilder& number(T value) {
    return raw(&value, sizeof value);
  }
  GgufBuilder& string(const std::string& text) {
    return number<uint64_t>(text.size()).raw(text.data(), text.size());
  }

  GgufBuilder& header(uint64_t num_tensors, uint64_t num_metadata, uint32_t version = 3) {
    return raw("GGUF", 4).number(version).number(num_tensors).number(num_metadata);
  }
  // A scalar of GGUF value type `type`.
  template <typename T>
  GgufBuilder& scalar(const std::string& key, uint32_t type, T value) {
    return string(key).number(type).number(value);
  }
  GgufBuilder& text(const std::string& key, const std::string& value) {
    return string(key).number<uint32_t>(8).string(value);
  }
  template <typename T>
  GgufBuilder& array(const std::string& key, uint32_t type, const std::vector<T>& values) {
    string(key).number<uint32_t>(9).number(type).number<uint64_t>(values.size());
    for (const T& value : values) number(value);
    return *this;
  }
  GgufBuilder& texts(const std::string& key, const std::vector<std::string>& values) {
    string(key).number<uint32_t>(9).number<uint32_t>(8).number<uint64_t>(values.size());
    for (const std::string& value : values) string(value);
    return *this;
  }
  GgufBuilder& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                      uint64_t offset) {
    string(name).number(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) number(dim);
    return number(type).number(offset);
  }
  // Fills up to the alignment, then appends the tensors' data.
  GgufBuilder& data(size_t size, size_t alignment = 32) {
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment + size);
    return *this;
  }

  std::vector<uint8_t> bytes;
};

}  // namespace motet
