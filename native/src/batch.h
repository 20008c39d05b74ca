// One step's input and output: views with shapes over memory that others own (the caller's typed arrays).
// The same facts as StepBatch and StepResult of native/index.ts, where each field is described.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "token_matcher.h"

namespace motet {

struct Batch {
  std::span<const int32_t> token_ids, positions;                    // [numTokens]
  std::span<const int32_t> sequence_starts;                         // [numSequences + 1]
  std::span<const int32_t> block_starts, block_ids;                 // [numSequences + 1]; page ids, host pages from numPages on
  std::span<const int32_t> staging_pages;                           // page ids; needed when there are host pages
  std::span<const int32_t> adapter_starts, adapter_handles;         // [numSequences + 1]; handles
  std::span<const float> adapter_weights;
  std::span<const int32_t> sample_rows;                             // [numSamples], ascending
  std::span<const int32_t> hidden_rows;                             // ascending
  std::span<const float> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::span<const int32_t> top_k, num_top;
  std::span<const uint64_t> seeds;
  std::span<const int32_t> bias_starts, bias_ids;                   // [numSamples + 1]; token ids
  std::span<const float> bias_values;
  std::span<const int32_t> history_starts, history_prompt_counts, history_ids;
  std::span<const int32_t> matcher_handles;                         // [numSamples]; −1: none
  std::span<TokenMatcher* const> matchers;                          // [numSamples], null: none; or none for all
  bool want_logits = false;

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_sequences() const { return static_cast<int>(sequence_starts.size()) - 1; }
  int num_samples() const { return static_cast<int>(sample_rows.size()); }
};

// A batch with the memory that its views point into: one buffer an array, grown and used again by the next batch.
struct OwnedBatch {
  Batch batch;
  std::vector<std::vector<std::byte>> memory;
  // The same memory as batch.token_ids and batch.history_ids, which may hold references.
  std::span<int32_t> token_ids, history_ids;
};

struct StepOutput {
  std::vector<int32_t> tokens;       // [numSamples]
  std::vector<float> logprobs;       // [numSamples]
  std::vector<int32_t> top_ids;      // [numSamples, maxTop], −1 fills up
  std::vector<float> top_logprobs;   // [numSamples, maxTop]
  std::vector<float> logits;         // [numSamples, vocab] when wanted
  std::vector<float> hidden;         // [hiddenRows, hiddenSize]
  int64_t staged_bytes = 0;          // of KV that were read from the host arena
};

}  // namespace motet
