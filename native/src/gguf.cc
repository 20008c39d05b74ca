#include "gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <unordered_set>

namespace motet {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place, as little-endian");

// Bounds that real files stay far below: a model of 1 T parameters has a few thousand tensors, the largest
// vocabularies hold some hundred thousand strings. They bound what a hostile file can make us allocate.
constexpr uint64_t kMaxMetadata = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 16;
constexpr uint64_t kMaxArrayElements = 1 << 25;  // over all arrays of a file
constexpr uint64_t kMaxHeaderBytes = 1ull << 29;
constexpr uint64_t kMaxKeyBytes = 65535;  // the format's own bound
constexpr uint64_t kMaxTensorNameBytes = 256;
constexpr uint32_t kMaxDims = 4;
constexpr uint32_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;

enum ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// ggml's tensor type numbers. `type` is -1 for those that are known by name only.
struct TypeRow {
  uint32_t id;
  const char* name;
  int type;
};
constexpr int of(SourceType type) { return static_cast<int>(type); }
constexpr TypeRow kTensorTypes[] = {
    {0, "F32", of(SourceType::kF32)},
    {1, "F16", of(SourceType::kF16)},
    {2, "Q4_0", of(SourceType::kQ4_0)},
    {3, "Q4_1", of(SourceType::kQ4_1)},
    {6, "Q5_0", of(SourceType::kQ5_0)},
    {7, "Q5_1", of(SourceType::kQ5_1)},
    {8, "Q8_0", of(SourceType::kQ8_0)},
    {9, "Q8_1", -1},
    {10, "Q2_K", -1},
    {11, "Q3_K", -1},
    {12, "Q4_K", of(SourceType::kQ4_K)},
    {13, "Q5_K", of(SourceType::kQ5_K)},
    {14, "Q6_K", of(SourceType::kQ6_K)},
    {15, "Q8_K", -1},
    {16, "IQ2_XXS", -1},
    {17, "IQ2_XS", -1},
    {18, "IQ3_XXS", -1},
    {19, "IQ1_S", -1},
    {20, "IQ4_NL", -1},
    {21, "IQ3_S", -1},
    {22, "IQ2_S", -1},
    {23, "IQ4_XS", -1},
    {24, "I8", -1},
    {25, "I16", -1},
    {26, "I32", -1},
    {27, "I64", -1},
    {28, "F64", -1},
    {29, "IQ1_M", -1},
    {30, "BF16", of(SourceType::kBF16)},
    {34, "TQ1_0", -1},
    {35, "TQ2_0", -1},
    {39, "MXFP4", -1},
};

[[noreturn]] void fail(const std::string& field, const std::string& expected, const std::string& got) {
  throw GgufError("gguf: " + field + ": expected " + expected + ", got " + got);
}

// A string from the file as part of a message: short, and nothing that a terminal would obey.
std::string quoted(std::string_view text) {
  std::string out = "'";
  for (size_t i = 0; i < text.size() && i < 80; i++) {
    const char c = text[i];
    out += c >= 0x20 && c < 0x7f ? c : '?';
  }
  return out + (text.size() > 80 ? "...'" : "'");
}

class Reader {
 public:
  Reader(const uint8_t* data, uint64_t size)
      : data_(data), file_size_(size), size_(std::min(size, kMaxHeaderBytes)) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return size_ - position_; }

  const uint8_t* bytes(uint64_t count, const std::string& field) {
    if (count > remaining()) {
      if (size_ < file_size_)
        fail(field, "a header of at most " + std::to_string(kMaxHeaderBytes) + " bytes", "more");
      fail(field, std::to_string(count) + " bytes", std::to_string(remaining()) + " left in the file");
    }
    const uint8_t* at = data_ + position_;
    position_ += count;
    return at;
  }

  template <typename T>
  T number(const std::string& field) {
    T value;
    std::memcpy(&value, bytes(sizeof(T), field), sizeof(T));
    return value;
  }

  std::string_view string(const std::string& field, uint64_t max_bytes) {
    const uint64_t length = number<uint64_t>(field + " (length)");
    if (length > max_bytes)
      fail(field, "a string of at most " + std::to_string(max_bytes) + " bytes", std::to_string(length));
    return {reinterpret_cast<const char*>(bytes(length, field)), length};
  }

  bool boolean(const std::string& field) {
    const uint8_t value = number<uint8_t>(field);
    if (value > 1) fail(field, "a bool of 0 or 1", std::to_string(value));
    return value == 1;
  }

  template <typename T>
  std::vector<double> numbers(uint64_t count, const std::string& field) {
    const uint8_t* at = bytes(count * sizeof(T), field);  // count is at most kMaxArrayElements: no overflow
    std::vector<double> out(count);
    for (uint64_t i = 0; i < count; i++) {
      T value;
      std::memcpy(&value, at + i * sizeof(T), sizeof(T));
      out[i] = static_cast<double>(value);
    }
    return out;
  }

  GgufValue array(const std::string& field) {
    const uint32_t type = number<uint32_t>(field + " (element type)");
    const uint64_t count = number<uint64_t>(field + " (length)");
    if (count > kMaxArrayElements - array_elements_) {
      fail(field, "at most " + std::to_string(kMaxArrayElements) + " array elements in a file",
           std::to_string(count));
    }
    array_elements_ += count;
    switch (type) {
      case kUint8:
        return numbers<uint8_t>(count, field);
      case kInt8:
        return numbers<int8_t>(count, field);
      case kUint16:
        return numbers<uint16_t>(count, field);
      case kInt16:
        return numbers<int16_t>(count, field);
      case kUint32:
        return numbers<uint32_t>(count, field);
      case kInt32:
        return numbers<int32_t>(count, field);
      case kFloat32:
        return numbers<float>(count, field);
      case kUint64:
        return numbers<uint64_t>(count, field);
      case kInt64:
        return numbers<int64_t>(count, field);
      case kFloat64:
        return numbers<double>(count, field);
      case kBool: {
        if (count > remaining())
          fail(field, std::to_string(count) + " bytes", std::to_string(remaining()) + " left");
        std::vector<bool> out(count);
        for (uint64_t i = 0; i < count; i++) out[i] = boolean(field);
        return out;
      }
      case kString: {
        // A string takes at least its length's 8 bytes: checked before the vector is made.
        if (count > remaining() / 8)
          fail(field, std::to_string(count) + " strings", std::to_string(remaining()) + " bytes left");
        std::vector<std::string> out;
        out.reserve(count);
        for (uint64_t i = 0; i < count; i++) out.emplace_back(string(field, kMaxHeaderBytes));
        return out;
      }
      case kArray:
        fail(field, "an array of numbers, bools or strings", "an array of arrays");
      default:
        fail(field + " (element type)", "a value type from 0 to 12", std::to_string(type));
    }
  }

  GgufValue value(const std::string& field) {
    const uint32_t type = number<uint32_t>(field + " (type)");
    switch (type) {
      case kUint8:
        return uint64_t{number<uint8_t>(field)};
      case kInt8:
        return int64_t{number<int8_t>(field)};
      case kUint16:
        return uint64_t{number<uint16_t>(field)};
      case kInt16:
        return int64_t{number<int16_t>(field)};
      case kUint32:
        return uint64_t{number<uint32_t>(field)};
      case kInt32:
        return int64_t{number<int32_t>(field)};
      case kFloat32:
        return double{number<float>(field)};
      case kUint64:
        return number<uint64_t>(field);
      case kInt64:
        return number<int64_t>(field);
      case kFloat64:
        return number<double>(field);
      case kBool:
        return boolean(field);
      case kString:
        return std::string(string(field, kMaxHeaderBytes));
      case kArray:
        return array(field);
      default:
        fail(field + " (type)", "a value type from 0 to 12", std::to_string(type));
    }
  }

 private:
  const uint8_t* data_;
  uint64_t file_size_, size_;
  uint64_t position_ = 0;
  uint64_t array_elements_ = 0;
};

uint64_t read_count(Reader& in, const std::string& field, uint64_t max) {
  const uint64_t count = in.number<uint64_t>(field);
  if (count > max) fail(field, "at most " + std::to_string(max), std::to_string(count));
  return count;
}

// The data region's alignment: general.alignment, a power of two.
uint64_t read_alignment(const GgufValue& value) {
  const uint64_t* alignment = std::get_if<uint64_t>(&value);
  if (alignment == nullptr) fail("general.alignment", "an unsigned integer", "a value of another type");
  if (!std::has_single_bit(*alignment) || *alignment > kMaxAlignment) {
    fail("general.alignment", "a power of two up to " + std::to_string(kMaxAlignment),
         std::to_string(*alignment));
  }
  return *alignment;
}

SourceType tensor_type(uint32_t id, const std::string& field) {
  for (const TypeRow& row : kTensorTypes) {
    if (row.id != id) continue;
    if (row.type >= 0) return static_cast<SourceType>(row.type);
    fail(field + " type", "one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K", row.name);
  }
  fail(field + " type", "a tensor type of ggml", std::to_string(id));
}

// One tensor's entry. offset_bytes is still relative to the data region.
GgufTensor read_tensor(Reader& in, uint64_t index) {
  const std::string where = "tensor " + std::to_string(index);
  GgufTensor tensor;
  tensor.name = in.string(where + " name", kMaxTensorNameBytes);
  const std::string field = "tensor " + quoted(tensor.name);
  if (tensor.name.empty()) fail(where + " name", "a name", "an empty string");

  const uint32_t num_dims = in.number<uint32_t>(field + " number of dimensions");
  if (num_dims < 1 || num_dims > kMaxDims)
    fail(field + " number of dimensions", "1 to 4", std::to_string(num_dims));
  uint64_t elements = 1;
  for (uint32_t d = 0; d < num_dims; d++) {
    const uint64_t dim = in.number<uint64_t>(field + " dimension " + std::to_string(d));
    // 2^56 elements of four bytes each still fit 64 bits.
    if (dim < 1 || dim > (uint64_t{1} << 56) / elements) {
      fail(field + " dimension " + std::to_string(d),
           "at least 1, all of them together at most 2^56 elements", std::to_string(dim));
    }
    elements *= dim;
    tensor.dims.push_back(static_cast<int64_t>(dim));
  }

  tensor.type = tensor_type(in.number<uint32_t>(field + " type"), field);
  const SourceInfo& info = source_info(tensor.type);
  if (tensor.dims[0] % info.block_elements != 0) {
    fail(field + " dimension 0",
         "a multiple of " + std::to_string(info.block_elements) + " for type " + info.name,
         std::to_string(tensor.dims[0]));
  }
  tensor.size_bytes = elements / info.block_elements * info.block_bytes;
  tensor.offset_bytes = in.number<uint64_t>(field + " offset");
  return tensor;
}

// Makes offsets absolute, once they are known to stay inside the data region and apart from each other.
void place_tensors(std::vector<GgufTensor>& tensors, uint64_t header_end, uint64_t alignment,
                   uint64_t file_size) {
  const uint64_t data_begin = (header_end + alignment - 1) / alignment * alignment;
  const uint64_t data_size = data_begin < file_size ? file_size - data_begin : 0;
  for (GgufTensor& tensor : tensors) {
    const std::string field = "tensor " + quoted(tensor.name);
    if (tensor.offset_bytes % alignment != 0) {
      fail(field + " offset", "a multiple of the alignment " + std::to_string(alignment),
           std::to_string(tensor.offset_bytes));
    }
    if (tensor.offset_bytes > data_size || tensor.size_bytes > data_size - tensor.offset_bytes) {
      fail(field + " extent", "within the " + std::to_string(data_size) + " bytes of tensor data",
           std::to_string(tensor.size_bytes) + " bytes at " + std::to_string(tensor.offset_bytes));
    }
    tensor.offset_bytes += data_begin;
  }

  std::vector<const GgufTensor*> order;
  for (const GgufTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset_bytes < b->offset_bytes; });
  for (size_t i = 1; i < order.size(); i++) {
    const GgufTensor &before = *order[i - 1], &tensor = *order[i];
    if (before.offset_bytes + before.size_bytes > tensor.offset_bytes) {
      fail("tensor " + quoted(tensor.name) + " offset",
           "to start after tensor " + quoted(before.name) + " ends", "an overlap");
    }
  }
}

}  // namespace

GgufFile parse_gguf(const uint8_t* data, size_t size_bytes) {
  Reader in(data, size_bytes);
  if (std::memcmp(in.bytes(4, "magic"), "GGUF", 4) != 0) fail("magic", "the bytes GGUF", "something else");

  GgufFile file;
  file.version = in.number<uint32_t>("version");
  if (file.version != 2 && file.version != 3) {
    const bool swapped = file.version == 0x02000000 || file.version == 0x03000000;
    fail("version", "2 or 3, little-endian", swapped ? "a big-endian file" : std::to_string(file.version));
  }
  const uint64_t num_tensors = read_count(in, "tensor count", kMaxTensors);
  const uint64_t num_metadata = read_count(in, "metadata count", kMaxMetadata);

  uint64_t alignment = kDefaultAlignment;
  std::unordered_set<std::string> seen;
  for (uint64_t i = 0; i < num_metadata; i++) {
    const std::string where = "metadata " + std::to_string(i) + " key";
    std::string key(in.string(where, kMaxKeyBytes));
    const std::string field = "metadata " + quoted(key);
    if (key.empty()) fail(where, "a key", "an empty string");
    if (!seen.insert(key).second) fail(field, "each key once", "it twice");
    GgufValue value = in.value(field);
    if (key == "general.alignment") alignment = read_alignment(value);
    file.metadata.emplace_back(std::move(key), std::move(value));
  }

  seen.clear();
  for (uint64_t i = 0; i < num_tensors; i++) {
    file.tensors.push_back(read_tensor(in, i));
    if (!seen.insert(file.tensors.back().name).second) {
      fail("tensor " + quoted(file.tensors.back().name), "each name once", "it twice");
    }
  }
  place_tensors(file.tensors, in.position(), alignment, size_bytes);
  return file;
}

}  // namespace motet
