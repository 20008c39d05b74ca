// From raw logits to one token, in the order of vLLM's sampler: log-probabilities of the raw logits; repetition, then
// frequency and presence penalties; logit bias; the allowed mask; greedy choice or temperature, min-p, top-k, top-p
// and a draw. Nothing here sorts the vocabulary: top-k keeps a running threshold, top-p first drops the tail that
// cannot matter, and both end in a radix select over the few candidates that remain.
//
// Ties are broken by the lower id everywhere; top-k keeps exactly k. The draw is the inverse of the cumulative
// distribution over the kept tokens in order of id, at a uniform number that is a hash of (seed, position).
//
// Hostile numbers: NaN counts as the lowest finite number, infinities as the extreme finite ones. When the mask and
// the bias leave no token at all, the answer is the likeliest token of the raw logits.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

namespace {

constexpr float kLargest = 3.40282347e+38f;
constexpr float kNone = -__builtin_inff();  // the logit of a token that may not be chosen
constexpr float kGreedyBelow = 1e-5f;       // temperature; as vLLM's _SAMPLING_EPS

// Sums run in f32 lanes over so many tokens, and in double from run to run: the error does not grow with the vocabulary.
constexpr int kRun = 512;

MOTET_INLINE f32x16 finite(f32x16 v) {
  // max takes its second argument where the first is NaN.
  return min(max(v, f32_set1(-kLargest)), f32_set1(kLargest));
}

float finite(float v) { return v > -kLargest ? (v < kLargest ? v : kLargest) : -kLargest; }

// Logits as finite numbers, in place; a copy of them in `raw`; their maximum.
float copy_finite(float* raw, float* logits, int n) {
  f32x16 largest = f32_set1(-kLargest);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = finite(load(logits + i));
    store(logits + i, v);
    store(raw + i, v);
    largest = max(largest, v);
  }
  float result = reduce_max(largest);
  for (; i < n; ++i) {
    const float v = finite(logits[i]);
    logits[i] = raw[i] = v;
    if (v > result) result = v;
  }
  return result;
}

float max_of(const float* values, int n) {
  f32x16 largest = f32_set1(kNone);
  int i = 0;
  for (; i + 16 <= n; i += 16) largest = max(largest, load(values + i));
  float result = reduce_max(largest);
  for (; i < n; ++i) {
    if (values[i] > result) result = values[i];
  }
  return result;
}

int first_index_of(const float* values, int n, float value) {
  const f32x16 wanted = f32_set1(value);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t hits = bits(load(values + i) == wanted);
    if (hits != 0) return i + __builtin_ctz(hits);
  }
  for (; i < n; ++i) {
    if (values[i] == value) return i;
  }
  return 0;
}

// Σ values[0..n), n <= kRun.
float sum_run(const float* values, int n) {
  f32x16 sum = f32_zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) sum = sum + load(values + i);
  if (i < n) sum = sum + load_n(values + i, n - i);
  return reduce_add(sum);
}

// Σ exp(values − maximum).
double sum_exp(const float* values, int n, float maximum) {
  const f32x16 shift = f32_set1(maximum);
  double total = 0;
  for (int begin = 0; begin < n; begin += kRun) {
    const int end = n - begin < kRun ? n : begin + kRun;
    f32x16 sum = f32_zero();
    int i = begin;
    for (; i + 16 <= end; i += 16) sum = sum + exp(load(values + i) - shift);
    if (i < end) sum = sum + select(first_n(end - i), exp(load_n(values + i, end - i) - shift), f32_zero());
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

// Order of preference as unsigned numbers: a higher value gives a higher key, −0 counts as 0.
uint32_t key_of(float value) {
  const float no_negative_zero = value + 0.0f;
  uint32_t u;
  __builtin_memcpy(&u, &no_negative_zero, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Finds the key at which the sum over the candidates, from the highest key down, reaches `target`, by one byte of the
// key at a time. `weigh(id)` is a candidate's share of the sum. Writes what the higher keys sum to into `above`.
template <class Sum, class Weigh>
uint32_t radix_select(const float* values, const int32_t* ids, int n, Sum target, Sum* above, const Weigh& weigh) {
  uint32_t prefix = 0;
  Sum higher = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    Sum sums[256] = {};
    int members[256] = {};
    for (int i = 0; i < n; ++i) {
      const uint32_t key = key_of(values[ids[i]]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      sums[key >> shift & 255] += weigh(ids[i]);
      members[key >> shift & 255] += 1;
    }
    // The lowest bin that has members ends the search when rounding keeps the sum from its target.
    int bin = -1;
    Sum below_bin = higher;
    for (int b = 255; b >= 0; --b) {
      if (members[b] == 0) continue;
      if (bin >= 0) below_bin += sums[bin];
      bin = b;
      if (below_bin + sums[b] >= target) break;
    }
    higher = below_bin;
    prefix = prefix << 8 | static_cast<uint32_t>(bin);
  }
  *above = higher;
  return prefix;
}

// Keeps of ids (ascending) those with a key above `key`, and the first `num_ties` of those with that very key.
int keep_from(const float* values, int32_t* ids, int n, uint32_t key, int num_ties) {
  int kept = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t own = key_of(values[ids[i]]);
    if (own < key || (own == key && num_ties-- <= 0)) continue;
    ids[kept++] = ids[i];
  }
  return kept;
}

// Keeps the k best of n > k candidates, 1 <= k.
void keep_best(const float* values, int32_t* ids, int n, int k) {
  int above = 0;
  const uint32_t key = radix_select<int>(values, ids, n, k, &above, [](int32_t) { return 1; });
  keep_from(values, ids, n, key, k - above);
}

// The ids of the k best values, ascending; fewer when fewer are above kNone. ids has room for n.
int collect_best(const float* values, int n, int k, int32_t* ids) {
  const int room = k < n / 4 && n > 1024 ? (4 * k < 512 ? 512 : 4 * k) : n;
  const int capacity = room < n ? room : n;
  int count = 0;
  float threshold = kNone;  // a later candidate must be above it: k earlier ones are at least as good
  const auto offer = [&](int id) {
    if (!(values[id] > threshold)) return;
    ids[count++] = id;
    if (count == capacity && count > k) {
      keep_best(values, ids, count, k);
      count = k;
      threshold = values[ids[0]];
      for (int i = 1; i < k; ++i) {
        if (values[ids[i]] < threshold) threshold = values[ids[i]];
      }
    }
  };
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    const f32x16 a = max(load(values + i), load(values + i + 16));
    const f32x16 b = max(load(values + i + 32), load(values + i + 48));
    if (bits(max(a, b) > f32_set1(threshold)) == 0) continue;
    for (int j = 0; j < 64; ++j) offer(i + j);
  }
  for (; i < n; ++i) offer(i);
  if (count > k) {
    keep_best(values, ids, count, k);
    count = k;
  }
  return count;
}

// Heap sort of ids by value, best first.
void sort_best_first(const float* values, int32_t* ids, int n) {
  const auto better = [&](int32_t a, int32_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  };
  const auto sink = [&](int root, int end) {  // the worst on top
    const int32_t id = ids[root];
    for (int child = 2 * root + 1; child < end; child = 2 * root + 1) {
      if (child + 1 < end && better(ids[child], ids[child + 1])) ++child;
      if (!better(id, ids[child])) break;
      ids[root] = ids[child];
      root = child;
    }
    ids[root] = id;
  };
  for (int root = n / 2 - 1; root >= 0; --root) sink(root, n);
  for (int end = n - 1; end > 0; --end) {
    const int32_t worst = ids[0];
    ids[0] = ids[end];
    ids[end] = worst;
    sink(0, end);
  }
}

bool has_penalties(const SampleParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

// counts: [vocab], scratch. A token's penalties are applied once, when it is first met.
void apply_penalties(float* logits, int vocab, const SampleParams& p, int32_t* counts) {
  __builtin_memset(counts, 0, static_cast<size_t>(vocab) * sizeof(int32_t));
  constexpr int32_t kInPrompt = 1 << 30;
  const auto known = [&](int32_t id) { return id >= 0 && id < vocab; };
  for (int i = 0; i < p.num_prompt_tokens; ++i) {
    if (known(p.prompt_tokens[i])) counts[p.prompt_tokens[i]] = kInPrompt;
  }
  for (int i = 0; i < p.num_output_tokens; ++i) {
    if (known(p.output_tokens[i])) counts[p.output_tokens[i]] += 1;
  }
  const auto visit = [&](int32_t id) {
    if (!known(id) || counts[id] == 0) return;
    const int32_t in_output = counts[id] & (kInPrompt - 1);
    counts[id] = 0;
    float logit = logits[id];
    logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    logit -= p.frequency_penalty * static_cast<float>(in_output);
    if (in_output > 0) logit -= p.presence_penalty;
    logits[id] = finite(logit);
  };
  for (int i = 0; i < p.num_prompt_tokens; ++i) visit(p.prompt_tokens[i]);
  for (int i = 0; i < p.num_output_tokens; ++i) visit(p.output_tokens[i]);
}

void apply_bias(float* logits, int vocab, const SampleParams& p) {
  for (int i = 0; i < p.num_bias; ++i) {
    const int32_t id = p.bias_ids[i];
    if (id < 0 || id >= vocab) continue;
    const float biased = logits[id] + p.bias_values[i];
    logits[id] = biased == kNone ? kNone : finite(biased);  // a bias of −∞ forbids
  }
}

void apply_mask(float* logits, int vocab, const uint32_t* allowed) {
  for (int begin = 0; begin < vocab; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    if (word == 0xffffffffu) continue;
    const int end = vocab - begin < 32 ? vocab : begin + 32;
    for (int i = begin; i < end; ++i) {
      if ((word >> (i - begin) & 1) == 0) logits[i] = kNone;
    }
  }
}

// SplitMix64's finaliser (Steele, Lea & Flood, 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Uniform in [0, 1), of 53 bits.
double uniform(uint64_t seed, int32_t position) {
  constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
  const uint64_t stream = mix(seed + kGamma);
  const uint64_t hash = mix(stream + kGamma * (static_cast<uint64_t>(static_cast<uint32_t>(position)) + 1));
  return static_cast<double>(hash >> 11) * 0x1p-53;
}

// What makes a logit a weight, relative to the likeliest token's 1; weights below min_p become 0.
struct Weighting {
  float maximum, temperature, min_p;
  MOTET_INLINE f32x16 of(f32x16 logits) const {
    const f32x16 w = exp((logits - f32_set1(maximum)) / f32_set1(temperature));
    return select(w >= f32_set1(min_p), w, f32_zero());
  }
};

// logits to weights in place, all of them; their sum.
double weigh_all(float* logits, int n, const Weighting& weighting) {
  double total = 0;
  for (int begin = 0; begin < n; begin += kRun) {
    const int end = n - begin < kRun ? n : begin + kRun;
    int i = begin;
    for (; i + 16 <= end; i += 16) store(logits + i, weighting.of(load(logits + i)));
    if (i < end) store_n(logits + i, weighting.of(load_n(logits + i, end - i)), end - i);
    total += static_cast<double>(sum_run(logits + begin, end - begin));
  }
  return total;
}

// The same for the listed tokens.
double weigh_listed(float* logits, const int32_t* ids, int n, const Weighting& weighting) {
  double total = 0;
  for (int i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? n - i : 16;
    float lanes[16] = {};
    for (int j = 0; j < count; ++j) lanes[j] = logits[ids[i + j]];
    store(lanes, weighting.of(load(lanes)));
    for (int j = 0; j < count; ++j) {
      logits[ids[i + j]] = lanes[j];
      total += static_cast<double>(lanes[j]);
    }
  }
  return total;
}

// Every token whose weight may belong to the nucleus: those left out weigh less than (1 − top_p) · total together.
int collect_nucleus_candidates(const float* weights, int n, float top_p, double total, int32_t* ids) {
  const double threshold = 0.5 * (1.0 - static_cast<double>(top_p)) * total / n;
  const f32x16 lowest = f32_set1(static_cast<float>(threshold));
  int count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 w = load(weights + i);
    for (uint32_t hits = bits(w >= lowest) & bits(w > f32_zero()); hits != 0; hits &= hits - 1)
      ids[count++] = i + __builtin_ctz(hits);
  }
  for (; i < n; ++i) {
    if (weights[i] >= static_cast<float>(threshold) && weights[i] > 0) ids[count++] = i;
  }
  return count;
}

// Keeps the smallest set of likeliest tokens that weigh top_p · total together; at least one.
int keep_nucleus(const float* weights, int32_t* ids, int n, float top_p, double total) {
  const double target = static_cast<double>(top_p) * total;
  double above = 0;
  const uint32_t key = radix_select<double>(weights, ids, n, target, &above,
                                            [&](int32_t id) { return static_cast<double>(weights[id]); });
  // Of the tokens that weigh the same at the border, as many as it takes.
  int num_ties = 0;
  for (int i = 0; i < n; ++i) {
    if (key_of(weights[ids[i]]) != key) continue;
    if (num_ties > 0 && above >= target) break;
    above += static_cast<double>(weights[ids[i]]);
    ++num_ties;
  }
  return keep_from(weights, ids, n, key, num_ties);
}

int draw_listed(const float* weights, const int32_t* ids, int n, double u) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += static_cast<double>(weights[ids[i]]);
  const double target = u * total;
  double sum = 0;
  int last = ids[0];
  for (int i = 0; i < n; ++i) {
    if (!(weights[ids[i]] > 0)) continue;
    last = ids[i];
    sum += static_cast<double>(weights[ids[i]]);
    if (sum > target) break;
  }
  return last;
}

int draw_all(const float* weights, int n, double total, double u) {
  const double target = u * total;
  double sum = 0;
  int last = 0;  // the last token with a weight, for sums that rounding keeps below the target
  for (int begin = 0; begin < n; begin += kRun) {
    const int end = n - begin < kRun ? n : begin + kRun;
    const double run = static_cast<double>(sum_run(weights + begin, end - begin));
    if (run == 0) continue;
    const bool here = sum + run > target;
    double within = sum;
    sum += run;
    if (!here && sum < total) continue;
    for (int i = begin; i < end; ++i) {
      if (!(weights[i] > 0)) continue;
      last = i;
      within += static_cast<double>(weights[i]);
      if (within > target) return i;
    }
    if (here) return last;
  }
  return last;
}

// A token by temperature, min-p, top-k and top-p. `logits` has at least one above kNone, and is overwritten.
int draw(float* logits, int vocab, float maximum, const SampleParams& p, int32_t* ids) {
  const float min_p = p.min_p > 0 ? (p.min_p < 1.0f ? p.min_p : 1.0f) : 0.0f;  // 1 keeps the likeliest
  const float top_p = p.top_p > 0 ? p.top_p : 0.0f;                            // 0 keeps one token
  const Weighting weighting = {maximum, p.temperature, min_p};
  const bool has_top_p = top_p < 1.0f;
  const double u = uniform(p.seed, p.position);
  double total;
  int count;
  if (p.top_k > 0 && p.top_k < vocab) {
    count = collect_best(logits, vocab, p.top_k, ids);
    total = weigh_listed(logits, ids, count, weighting);
  } else {
    total = weigh_all(logits, vocab, weighting);
    if (!has_top_p) return draw_all(logits, vocab, total, u);
    count = collect_nucleus_candidates(logits, vocab, top_p, total, ids);
  }
  if (has_top_p) count = keep_nucleus(logits, ids, count, top_p, total);
  return draw_listed(logits, ids, count, u);
}

}  // namespace

SampleResult sample(float* logits, int vocab, const SampleParams& params, int32_t* top_ids, float* top_logprobs,
                    void* scratch) {
  float* raw = static_cast<float*>(scratch);
  int32_t* ids = reinterpret_cast<int32_t*>(raw + vocab);

  const float raw_max = copy_finite(raw, logits, vocab);
  const double log_sum = __builtin_log(sum_exp(raw, vocab, raw_max));
  const auto logprob = [&](int32_t id) {
    return static_cast<float>(static_cast<double>(raw[id]) - static_cast<double>(raw_max) - log_sum);
  };
  if (params.num_top > 0) {
    const int count = collect_best(raw, vocab, params.num_top < vocab ? params.num_top : vocab, ids);
    sort_best_first(raw, ids, count);
    for (int i = 0; i < params.num_top; ++i) {
      top_ids[i] = i < count ? ids[i] : -1;
      top_logprobs[i] = i < count ? logprob(ids[i]) : kNone;
    }
  }

  if (has_penalties(params)) apply_penalties(logits, vocab, params, ids);
  if (params.num_bias > 0) apply_bias(logits, vocab, params);
  if (params.allowed != nullptr) apply_mask(logits, vocab, params.allowed);

  const float maximum = max_of(logits, vocab);
  int token;
  if (maximum == kNone) {
    token = first_index_of(raw, vocab, raw_max);
  } else if (!(params.temperature >= kGreedyBelow)) {
    token = first_index_of(logits, vocab, maximum);
  } else {
    token = draw(logits, vocab, maximum, params, ids);
  }
  return {token, logprob(token)};
}

}  // namespace motet::MOTET_ISA
