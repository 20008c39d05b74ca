// One adapter in the device arena: which projections it changes, and where its rows and tiles lie in its pages.
// The pages need not be adjacent: a row of A, or a tile of B, never crosses a page's end.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace motet {

struct AdapterError : std::runtime_error { using std::runtime_error::runtime_error; };

enum class Target : int32_t { kQ, kK, kV, kO, kGate, kUp, kDown, kLmHead };
inline constexpr int kNumLayerTargets = 7;
const char* target_name(Target target);

// Where one module's tensors are in a safetensors file. Offsets are absolute; −1: absent.
struct AdapterModuleSpec {
  int32_t layer = 0;  // −1 for lm_head
  Target target = Target::kQ;
  int32_t rank = 0;
  float scaling = 0;
  ElementType type = ElementType::kF32;
  int64_t a_offset = -1, b_offset = -1;
  int64_t magnitude_offset = -1, bias_offset = -1;
  ElementType magnitude_type = ElementType::kF32, bias_type = ElementType::kF32;
};

class Model;

struct Adapter {
  std::vector<LoraModule> modules;  // [numLayers, kNumLayerTargets], then lm_head
  std::vector<std::shared_ptr<const void>> tables;  // owns the modules' tables of pointers
  uint64_t shape = 0;  // the same for adapters whose modules have the same ranks and formats
  const LoraModule& module(int layer, Target target) const {
    return target == Target::kLmHead ? modules.back() : modules[layer * kNumLayerTargets + static_cast<int>(target)];
  }
};

// What these modules take in a model's arena: whole pages, and the bytes in them that are theirs. Throws AdapterError when one row
// or tile is larger than a page.
struct AdapterSize {
  int64_t num_pages, num_bytes;
};
AdapterSize adapter_size(const Model& model, const std::vector<AdapterModuleSpec>& specs);

// Reads the tensors from `path`, refuses numbers that are not finite (naming layer and module), computes DoRA's gains
// over the base weights, and writes all of it to the pages of the model's arena. Touches nothing but those pages, and leaves
// nothing in them of what they held before.
std::shared_ptr<Adapter> load_adapter(const Model& model, const std::string& path, const std::vector<AdapterModuleSpec>& specs,
                                      const std::vector<int32_t>& pages);

// The same adapter over pages that hold already, page for page, what load_adapter wrote to others. Reads no file.
std::shared_ptr<Adapter> attach_adapter(const Model& model, const std::vector<AdapterModuleSpec>& specs, const std::vector<int32_t>& pages);

}  // namespace motet
