// A GGUF file's header as data (versions 2 and 3, little-endian; the format is described in ggml's docs/gguf.md).
// The bytes are hostile until checked: every count, length and offset is bounded by the file before it is used.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "pack.h"

namespace motet {

struct GgufError : std::runtime_error { using std::runtime_error::runtime_error; };

using GgufValue = std::variant<std::string, double, int64_t, uint64_t, bool, std::vector<std::string>, std::vector<double>, std::vector<bool>>;

struct GgufTensor {
  std::string name;
  std::vector<int64_t> dims;  // innermost first
  SourceType type;
  uint64_t offset_bytes, size_bytes;  // absolute in the file
};

struct GgufFile {
  uint32_t version = 0;
  std::vector<std::pair<std::string, GgufValue>> metadata;  // in file order; a repeated key is refused
  std::vector<GgufTensor> tensors;                          // overlapping or out-of-file tensors are refused
};

// Throws GgufError with the field's name, what was expected and what came.
GgufFile parse_gguf(const uint8_t* data, size_t size_bytes);

}  // namespace motet
