#include "adapter.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>

#include "model.h"
#include "pages.h"

namespace motet {
namespace {

std::string module_name(const AdapterModuleSpec& spec) {
  return (spec.layer < 0 ? "" : "layer " + std::to_string(spec.layer) + " ") + target_name(spec.target);
}

// Hands out places for pieces of bytes, page after page. With no pages given it only counts.
class PagePacker {
 public:
  PagePacker(size_t page_bytes, const std::vector<int32_t>* pages, uint8_t* arena) : page_bytes_(page_bytes), pages_(pages), arena_(arena) {}

  uint8_t* place(size_t num_bytes) {
    num_bytes = (num_bytes + kLoraAlignment - 1) / kLoraAlignment * kLoraAlignment;
    if (num_bytes > page_bytes_)
      throw AdapterError("adapter piece of " + std::to_string(num_bytes) + " bytes: expected at most a page of " + std::to_string(page_bytes_));
    if (num_pages_ == 0 || used_bytes_ + num_bytes > page_bytes_) {
      ++num_pages_;
      used_bytes_ = 0;
      if (pages_ && num_pages_ > static_cast<int64_t>(pages_->size()))
        throw AdapterError("pages: expected at least " + std::to_string(num_pages_) + ", got " + std::to_string(pages_->size()));
    }
    const size_t offset = used_bytes_;
    used_bytes_ += num_bytes;
    placed_bytes_ += num_bytes;
    return pages_ ? arena_ + static_cast<size_t>((*pages_)[num_pages_ - 1]) * page_bytes_ + offset : nullptr;
  }
  int64_t num_pages() const { return num_pages_; }
  // Of the pieces, each with what aligns the next one.
  int64_t placed_bytes() const { return placed_bytes_; }

 private:
  size_t page_bytes_;
  const std::vector<int32_t>* pages_;
  uint8_t* arena_;
  int64_t num_pages_ = 0, placed_bytes_ = 0;
  size_t used_bytes_ = 0;
};

// The places of one module's pieces.
struct Places {
  std::vector<uint8_t*> a_rows, b_tiles, gain_tiles, bias_tiles;
};

// Targets that read the same activations: a step shrinks them one right after the other.
int input_of(Target target) {
  switch (target) {
    case Target::kQ:
    case Target::kK:
    case Target::kV: return 0;
    case Target::kO: return 1;
    case Target::kGate:
    case Target::kUp: return 2;
    case Target::kDown: return 3;
    case Target::kLmHead: return 4;
  }
  return -1;
}

LoraFormat format_of(const Model& model, const AdapterModuleSpec& spec) {
  if (model.has_int8_adapters()) return LoraFormat::kInt8;
  switch (spec.type) {
    case ElementType::kF32: return LoraFormat::kF32;
    case ElementType::kF16: return LoraFormat::kF16;
    case ElementType::kBF16: return LoraFormat::kBF16;
  }
  return LoraFormat::kF32;
}

int64_t num_lora_tiles(int64_t out_features) { return (out_features + kLoraTileColumns - 1) / kLoraTileColumns; }

// Places all modules in the order in which a step reads them, so that it reads long streams: the A of modules that share
// their input, then the B of each.
std::vector<Places> place_modules(PagePacker& packer, const Model& model, const std::vector<AdapterModuleSpec>& specs) {
  std::vector<Places> places(specs.size());
  for (size_t first = 0, end = 0; first < specs.size(); first = end) {
    while (end < specs.size() && specs[end].layer == specs[first].layer && input_of(specs[end].target) == input_of(specs[first].target)) ++end;
    for (size_t i = first; i < end; ++i) {
      const int64_t k = model.matrix(specs[i].layer, specs[i].target).in_features;
      for (int r = 0; r < specs[i].rank; ++r) places[i].a_rows.push_back(packer.place(lora_a_row_bytes(format_of(model, specs[i]), k)));
    }
    for (size_t i = first; i < end; ++i) {
      const int64_t n = model.matrix(specs[i].layer, specs[i].target).out_features;
      for (int64_t t = 0; t < num_lora_tiles(n); ++t) {
        places[i].b_tiles.push_back(packer.place(lora_b_tile_bytes(format_of(model, specs[i]), specs[i].rank)));
        if (specs[i].magnitude_offset >= 0) places[i].gain_tiles.push_back(packer.place(kLoraTileColumns * sizeof(float)));
        if (specs[i].bias_offset >= 0) places[i].bias_tiles.push_back(packer.place(kLoraTileColumns * sizeof(float)));
      }
    }
  }
  return places;
}

void check_spec(const Model& model, const AdapterModuleSpec& spec) {
  const bool head = spec.target == Target::kLmHead;
  if (head ? spec.layer != -1 : (spec.layer < 0 || spec.layer >= model.dims().num_layers))
    throw AdapterError("adapter module " + module_name(spec) + ": layer out of range");
  if (spec.rank < 1) throw AdapterError("adapter module " + module_name(spec) + ": expected rank of at least 1, got " + std::to_string(spec.rank));
  if (!std::isfinite(spec.scaling)) throw AdapterError("adapter module " + module_name(spec) + ": scaling is not finite");
}

// A file read piece by piece; reads beyond its end are refused.
class File {
 public:
  explicit File(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw AdapterError("adapter file " + path + ": " + std::strerror(errno));
    struct stat st {};
    if (fstat(fd_, &st) == 0) size_ = st.st_size;
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Asked before memory is taken for what a file says that it holds.
  void require(size_t num_bytes, int64_t offset) const {
    if (offset > size_ || num_bytes > static_cast<size_t>(size_ - offset))
      throw AdapterError("adapter file " + path_ + ": expected " + std::to_string(num_bytes) + " more bytes at offset " + std::to_string(offset) +
                         ", got a file of " + std::to_string(size_));
  }

  void read(void* target, size_t num_bytes, int64_t offset) const {
    auto* out = static_cast<uint8_t*>(target);
    while (num_bytes > 0) {
      const ssize_t got = pread(fd_, out, num_bytes, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0)
        throw AdapterError("adapter file " + path_ + ": expected " + std::to_string(num_bytes) + " more bytes at offset " + std::to_string(offset) +
                           ", got " + (got < 0 ? std::strerror(errno) : "the end of the file"));
      out += got, offset += got, num_bytes -= static_cast<size_t>(got);
    }
  }

 private:
  std::string path_;
  int fd_;
  int64_t size_ = 0;
};

float to_float(const uint8_t* p, ElementType type) {
  if (type == ElementType::kF32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  uint32_t bits;
  if (type == ElementType::kBF16) {
    bits = uint32_t{h} << 16;
  } else {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) {
      const float f = std::ldexp(static_cast<float>(mantissa), -24);
      return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Index of the first element whose exponent bits are all ones (infinite or not a number); `count` when there is none.
template <typename Bits>
size_t find_not_finite(const std::vector<uint8_t>& bytes, size_t count, Bits exponent) {
  const auto* elements = reinterpret_cast<const Bits*>(bytes.data());
  // A whole run at a time, so that the compiler may use vectors; the place is looked for only where there is one.
  constexpr size_t kRun = 4096;
  for (size_t begin = 0; begin < count; begin += kRun) {
    const size_t end = std::min(begin + kRun, count);
    Bits any = 0;
    for (size_t i = begin; i < end; ++i) any |= static_cast<Bits>((elements[i] & exponent) == exponent);
    if (!any) continue;
    for (size_t i = begin; i < end; ++i)
      if ((elements[i] & exponent) == exponent) return i;
  }
  return count;
}

std::vector<uint8_t> read_elements(const File& file, const AdapterModuleSpec& spec, const char* what, int64_t offset, size_t count, ElementType type) {
  if (offset < 0) throw AdapterError("adapter module " + module_name(spec) + " " + what + ": expected an offset of at least 0");
  file.require(count * element_bytes(type), offset);
  std::vector<uint8_t> bytes(count * element_bytes(type));
  file.read(bytes.data(), bytes.size(), offset);
  const size_t place = type == ElementType::kF32   ? find_not_finite<uint32_t>(bytes, count, 0x7F800000u)
                       : type == ElementType::kF16 ? find_not_finite<uint16_t>(bytes, count, 0x7C00u)
                                                   : find_not_finite<uint16_t>(bytes, count, 0x7F80u);
  if (place < count)
    throw AdapterError("adapter module " + module_name(spec) + " " + what + ": expected finite numbers, element " + std::to_string(place) + " is not");
  return bytes;
}

// Both matrices as pieces of an arena: a row of A, a tile of Bᵀ.
struct Pieces {
  size_t a_row_bytes, b_tile_bytes;
  std::vector<uint8_t> a_rows, b_tiles;
};

// A row of `count` elements of a float format, as kernels.h lays it out.
template <LoraFormat kFormat>
void put_row(uint8_t* to, const uint8_t* from, int64_t count) {
  if constexpr (kFormat == LoraFormat::kBF16) {
    for (int64_t first = 0; first < count; first += 32) {
      uint16_t natural[32] = {}, paired[32];
      std::memcpy(natural, from + first * 2, static_cast<size_t>(std::min<int64_t>(32, count - first)) * 2);
      for (int i = 0; i < 16; ++i) paired[2 * i] = natural[i], paired[2 * i + 1] = natural[16 + i];
      std::memcpy(to + first * 2, paired, sizeof paired);
    }
  } else {
    std::memcpy(to, from, static_cast<size_t>(count) * lora_element_bytes(kFormat));
  }
}

template <LoraFormat kFormat>
void put_rows(Pieces& out, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, int64_t k, int64_t n, int rank) {
  constexpr size_t kSize = lora_element_bytes(kFormat);
  for (int r = 0; r < rank; ++r) put_row<kFormat>(out.a_rows.data() + r * out.a_row_bytes, a.data() + static_cast<size_t>(r * k) * kSize, k);
  uint8_t columns[kLoraTileColumns * kSize];
  for (int64_t first = 0; first < n; first += kLoraTileColumns) {
    const int64_t num_columns = std::min<int64_t>(kLoraTileColumns, n - first);
    uint8_t* tile = out.b_tiles.data() + first / kLoraTileColumns * out.b_tile_bytes;
    for (int r = 0; r < rank; ++r) {
      std::memset(columns, 0, sizeof columns);
      for (int64_t i = 0; i < num_columns; ++i) std::memcpy(columns + i * kSize, b.data() + static_cast<size_t>((first + i) * rank + r) * kSize, kSize);
      put_row<kFormat>(tile + r * kLoraTileColumns * kSize, columns, kLoraTileColumns);
    }
  }
}

// Numbers to int8, the greatest magnitude to 127. Returns the scale; 0 when all are 0.
float quantize_row(int8_t* to, const float* from, int64_t count) {
  float greatest = 0;
  for (int64_t i = 0; i < count; ++i) greatest = std::max(greatest, std::fabs(from[i]));
  const float scale = greatest / 127;
  // Where numbers are so small that their scale is 0 or nearly, they are 0.
  if (scale < std::numeric_limits<float>::min()) return 0;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int8_t>(std::clamp(std::nearbyint(from[i] * 127 / greatest), -127.0f, 127.0f));
  return scale;
}

// One scale for each row of A and for each rank of a tile of B; their product is what a tile keeps.
void put_int8(Pieces& out, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, ElementType type, int64_t k, int64_t n, int rank) {
  const size_t size = element_bytes(type);
  std::vector<float> row(k), a_scales(rank);
  for (int r = 0; r < rank; ++r) {
    for (int64_t i = 0; i < k; ++i) row[i] = to_float(a.data() + static_cast<size_t>(r * k + i) * size, type);
    a_scales[r] = quantize_row(reinterpret_cast<int8_t*>(out.a_rows.data() + r * out.a_row_bytes), row.data(), k);
  }
  for (int64_t first = 0; first < n; first += kLoraTileColumns) {
    const int64_t num_columns = std::min<int64_t>(kLoraTileColumns, n - first);
    uint8_t* tile = out.b_tiles.data() + first / kLoraTileColumns * out.b_tile_bytes;
    for (int r = 0; r < rank; ++r) {
      float columns[kLoraTileColumns] = {};
      for (int64_t i = 0; i < num_columns; ++i) columns[i] = to_float(b.data() + static_cast<size_t>((first + i) * rank + r) * size, type);
      const float scale = a_scales[r] * quantize_row(reinterpret_cast<int8_t*>(tile + lora_scale_bytes(rank) + r * kLoraTileColumns), columns, kLoraTileColumns);
      std::memcpy(tile + r * sizeof(float), &scale, sizeof scale);
    }
  }
}

Pieces to_pieces(LoraFormat format, ElementType type, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, int64_t k, int64_t n, int rank) {
  Pieces out{lora_a_row_bytes(format, k), lora_b_tile_bytes(format, rank), {}, {}};
  out.a_rows.resize(rank * out.a_row_bytes);
  out.b_tiles.resize(static_cast<size_t>((n + kLoraTileColumns - 1) / kLoraTileColumns) * out.b_tile_bytes);
  switch (format) {
    case LoraFormat::kF32: put_rows<LoraFormat::kF32>(out, a, b, k, n, rank); break;
    case LoraFormat::kF16: put_rows<LoraFormat::kF16>(out, a, b, k, n, rank); break;
    case LoraFormat::kBF16: put_rows<LoraFormat::kBF16>(out, a, b, k, n, rank); break;
    case LoraFormat::kInt8: put_int8(out, a, b, type, k, n, rank); break;
  }
  return out;
}

std::vector<float> read_floats(const File& file, const AdapterModuleSpec& spec, const char* what, int64_t offset, size_t count, ElementType type) {
  const auto bytes = read_elements(file, spec, what, offset, count, type);
  std::vector<float> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = to_float(bytes.data() + i * element_bytes(type), type);
  return out;
}

// DoRA (Liu et al., 2024) as PEFT computes it: gain[n] = magnitude[n] / ‖W[n] + scaling · (B·A)[n]‖₂.
std::vector<float> dora_gains(const PackedMatrix& w, const AdapterModuleSpec& spec, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b,
                              const std::vector<float>& magnitude) {
  const int64_t n = w.out_features, k = w.in_features;
  std::vector<float> a_floats(a.size() / element_bytes(spec.type)), row(k), delta(k), gains(n);
  for (size_t i = 0; i < a_floats.size(); ++i) a_floats[i] = to_float(a.data() + i * element_bytes(spec.type), spec.type);
  for (int64_t i = 0; i < n; ++i) {
    kernels().unpack_row(row.data(), w, static_cast<int32_t>(i));
    std::fill(delta.begin(), delta.end(), 0.0f);
    for (int r = 0; r < spec.rank; ++r) {
      const float scale = to_float(b.data() + (i * spec.rank + r) * element_bytes(spec.type), spec.type);
      for (int64_t j = 0; j < k; ++j) delta[j] += scale * a_floats[r * k + j];
    }
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      const float v = row[j] + spec.scaling * delta[j];
      sum += double{v} * v;
    }
    gains[i] = static_cast<float>(magnitude[i] / std::sqrt(sum));
    if (!std::isfinite(gains[i]))
      throw AdapterError("adapter module " + module_name(spec) + " lora_magnitude_vector: the norm of output " + std::to_string(i) + " is zero");
  }
  return gains;
}

// Finds every piece's place in the pages, and makes the adapter that looks there.
std::shared_ptr<Adapter> lay_out(const Model& model, const std::vector<AdapterModuleSpec>& specs, const std::vector<int32_t>& pages,
                                 std::vector<Places>& all_places) {
  check_pages(pages, model.num_pages(), "pages");
  auto adapter = std::make_shared<Adapter>();
  adapter->modules.resize(static_cast<size_t>(model.dims().num_layers) * kNumLayerTargets + 1);
  PagePacker packer(model.page_bytes(), &pages, model.device().arena());
  for (const auto& spec : specs) check_spec(model, spec);
  all_places = place_modules(packer, model, specs);
  for (size_t index = 0; index < specs.size(); ++index) {
    const AdapterModuleSpec& spec = specs[index];
    const Places& places = all_places[index];
    auto table = [&]<typename T>(const std::vector<uint8_t*>& places, const T*) -> const T* const* {
      if (places.empty()) return nullptr;
      const std::shared_ptr<const T*> table(new const T*[places.size()], std::default_delete<const T*[]>());
      for (size_t i = 0; i < places.size(); ++i) table.get()[i] = reinterpret_cast<const T*>(places[i]);
      adapter->tables.push_back(table);
      return table.get();
    };
    LoraModule& module = spec.layer < 0 ? adapter->modules.back()
                                        : adapter->modules[static_cast<size_t>(spec.layer) * kNumLayerTargets + static_cast<int>(spec.target)];
    if (module.rank != 0) throw AdapterError("adapter module " + module_name(spec) + ": given twice");
    module.rank = spec.rank;
    module.scaling = spec.scaling;
    module.format = format_of(model, spec);
    for (const uint64_t part : {static_cast<uint64_t>(spec.layer + 1), static_cast<uint64_t>(spec.target), static_cast<uint64_t>(spec.rank),
                                static_cast<uint64_t>(module.format)})
      adapter->shape = (adapter->shape ^ part) * 0x100000001b3;  // FNV-1a
    module.a_rows = table(places.a_rows, static_cast<const void*>(nullptr));
    module.b_tiles = table(places.b_tiles, static_cast<const void*>(nullptr));
    module.gain_tiles = table(places.gain_tiles, static_cast<const float*>(nullptr));
    module.bias_tiles = table(places.bias_tiles, static_cast<const float*>(nullptr));
  }
  return adapter;
}

}  // namespace

AdapterSize adapter_size(const Model& model, const std::vector<AdapterModuleSpec>& specs) {
  PagePacker packer(model.page_bytes(), nullptr, nullptr);
  for (const auto& spec : specs) check_spec(model, spec);
  place_modules(packer, model, specs);
  return {packer.num_pages(), packer.placed_bytes()};
}

std::shared_ptr<Adapter> load_adapter(const Model& model, const std::string& path, const std::vector<AdapterModuleSpec>& specs,
                                      const std::vector<int32_t>& pages) {
  std::vector<Places> all_places;
  auto adapter = lay_out(model, specs, pages, all_places);
  const File file(path);
  Device& device = model.device();
  for (const int32_t page : pages) device.wait(device.clear_arena(device.arena() + static_cast<size_t>(page) * model.page_bytes(), model.page_bytes()));
  // Copies are waited for once per module: their sources live as long as the module's loop turn.
  for (size_t index = 0; index < specs.size(); ++index) {
    const AdapterModuleSpec& spec = specs[index];
    const Places& places = all_places[index];
    const PackedMatrix& w = model.matrix(spec.layer, spec.target);
    const int64_t n = w.out_features, k = w.in_features, tiles = num_lora_tiles(n);
    const auto a = read_elements(file, spec, "lora_A", spec.a_offset, static_cast<size_t>(spec.rank) * k, spec.type);
    const auto b = read_elements(file, spec, "lora_B", spec.b_offset, static_cast<size_t>(n) * spec.rank, spec.type);
    std::vector<float> gains, bias;
    if (spec.magnitude_offset >= 0)
      gains = dora_gains(model.hold_matrix(spec.layer, spec.target).matrix, spec, a, b,
                         read_floats(file, spec, "lora_magnitude_vector", spec.magnitude_offset, n, spec.magnitude_type));
    if (spec.bias_offset >= 0) bias = read_floats(file, spec, "lora_B.bias", spec.bias_offset, n, spec.bias_type);
    gains.resize(gains.empty() ? 0 : tiles * kLoraTileColumns, 0.0f);
    bias.resize(bias.empty() ? 0 : tiles * kLoraTileColumns, 0.0f);

    const Pieces pieces = to_pieces(format_of(model, spec), spec.type, a, b, k, n, spec.rank);
    Event last = 0;
    auto copy = [&](const std::vector<uint8_t*>& targets, const void* source, size_t piece_bytes) {
      for (size_t i = 0; i < targets.size(); ++i) last = device.copy_to_arena(targets[i], static_cast<const uint8_t*>(source) + i * piece_bytes, piece_bytes);
    };
    copy(places.a_rows, pieces.a_rows.data(), pieces.a_row_bytes);
    copy(places.b_tiles, pieces.b_tiles.data(), pieces.b_tile_bytes);
    copy(places.gain_tiles, gains.data(), kLoraTileColumns * sizeof(float));
    copy(places.bias_tiles, bias.data(), kLoraTileColumns * sizeof(float));
    device.wait(last);
  }
  return adapter;
}

std::shared_ptr<Adapter> attach_adapter(const Model& model, const std::vector<AdapterModuleSpec>& specs, const std::vector<int32_t>& pages) {
  std::vector<Places> all_places;
  return lay_out(model, specs, pages, all_places);
}

}  // namespace motet
