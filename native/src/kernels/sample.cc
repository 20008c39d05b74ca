// From raw logits to one token, in the order of vLLM's sampler: log-probabilities of the raw logits; repetition, then
// frequency and presence penalties; logit bias; the allowed mask; greedy choice or temperature, min-p, top-k, top-p
// and a draw. Nothing here sorts the vocabulary: top-k scans with a running threshold, top-p bisects for the octave of
// weights that holds its border, and a radix select over the few that remain ends both.
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
constexpr float kLeast = -87.0f;            // e^x is not denormal from here on
constexpr float kGreedyBelow = 1e-5f;       // temperature; as vLLM's _SAMPLING_EPS

// Sums go in f32 lanes over a run of so many tokens, and in double from run to run: the error does not grow with the
// vocabulary.
constexpr int kRun = 512;

MOTET_INLINE f32x16 finite(f32x16 v) {
  // max takes its second argument where the first is NaN.
  return min(max(v, f32_set1(-kLargest)), f32_set1(kLargest));
}

float finite(float v) { return v > -kLargest ? (v < kLargest ? v : kLargest) : -kLargest; }

bool all_finite(const float* values, int n) {
  const f32x16 largest = f32_set1(kLargest);
  mask16 good = first_n(16);
  int i = 0;
  for (; i + 16 <= n; i += 16) good = good & (abs(load(values + i)) <= largest);
  if (i < n) good = good & (abs(load_n(values + i, n - i)) <= largest);
  return bits(good) == 0xffff;
}

void make_finite(float* values, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(values + i, finite(load(values + i)));
  for (; i < n; ++i) values[i] = finite(values[i]);
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

// Calls each(begin, end) for the runs of n values and adds up its results.
template <class Each>
double sum_over_runs(int n, const Each& each) {
  double total = 0;
  for (int begin = 0; begin < n; begin += kRun) {
    const int end = n - begin < kRun ? n : begin + kRun;
    total += static_cast<double>(each(begin, end));
  }
  return total;
}

// Σ exp(values − maximum).
double sum_exp(const float* values, int n, float maximum) {
  const f32x16 shift = f32_set1(maximum);
  return sum_over_runs(n, [&](int begin, int end) {
    f32x16 sum = f32_zero();
    int i = begin;
    for (; i + 16 <= end; i += 16) sum = sum + exp(load(values + i) - shift);
    if (i < end) sum = sum + select(first_n(end - i), exp(load_n(values + i, end - i) - shift), f32_zero());
    return reduce_add(sum);
  });
}

// Order of preference as unsigned numbers: a higher value gives a higher key, −0 counts as 0.
uint32_t key_of(float value) {
  const float no_negative_zero = value + 0.0f;
  uint32_t u;
  __builtin_memcpy(&u, &no_negative_zero, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Finds the key at which the sum of the weights, from the highest key down, reaches `target`: one byte of the key after
// the other. key(i) and weight(i) describe member i of n. Writes what the higher keys sum to into `above`.
template <class Sum, class Key, class Weight>
uint32_t radix_select(int n, Sum target, Sum* above, const Key& key, const Weight& weight) {
  uint32_t prefix = 0;
  Sum higher = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    Sum sums[256] = {};
    int members[256] = {};
    for (int i = 0; i < n; ++i) {
      const uint32_t k = key(i);
      if (shift < 24 && k >> (shift + 8) != prefix) continue;
      sums[k >> shift & 255] += weight(i);
      members[k >> shift & 255] += 1;
    }
    // The lowest bin that has members ends the search when rounding keeps the sum from its target.
    int bin = -1;
    for (int b = 255; b >= 0; --b) {
      if (members[b] == 0) continue;
      if (bin >= 0) higher += sums[bin];
      bin = b;
      if (higher + sums[b] >= target) break;
    }
    prefix = prefix << 8 | static_cast<uint32_t>(bin);
  }
  *above = higher;
  return prefix;
}

// Keeps the k best of n > k candidates, 1 <= k; ids stay ascending.
void keep_best(const float* values, int32_t* ids, int n, int k) {
  const auto key = [&](int i) { return key_of(values[ids[i]]); };
  int above = 0;
  const uint32_t border = radix_select<int>(n, k, &above, key, [](int) { return 1; });
  int num_ties = k - above, kept = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t own = key(i);
    if (own > border || (own == border && num_ties-- > 0)) ids[kept++] = ids[i];
  }
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
  int begin = 0;
  for (; begin + 32 <= vocab; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    if (word == 0xffffffffu) continue;
    float* const lanes = logits + begin;
    // Without a branch, so that it is compiled to lanes: a grammar's words are mixed.
    for (int i = 0; i < 32; ++i) lanes[i] = (word >> i & 1) != 0 ? lanes[i] : kNone;
  }
  for (int i = begin; i < vocab; ++i) {
    if ((allowed[i / 32] >> (i % 32) & 1) == 0) logits[i] = kNone;
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
  float maximum, inverse_temperature, min_p;
  MOTET_INLINE f32x16 of(f32x16 logits) const {
    const f32x16 x = (logits - f32_set1(maximum)) * f32_set1(inverse_temperature);
    // Weights that would be denormal are 0: no draw sees the difference, and making one takes a hundred times as long.
    const f32x16 w = select(x >= f32_set1(kLeast), exp(max(x, f32_set1(kLeast))), f32_zero());
    return select(w >= f32_set1(min_p), w, f32_zero());
  }
};

// Writes weights; logits may be the same array. Their sum.
double weigh(float* weights, const float* logits, int n, const Weighting& weighting) {
  return sum_over_runs(n, [&](int begin, int end) {
    int i = begin;
    for (; i + 16 <= end; i += 16) store(weights + i, weighting.of(load(logits + i)));
    if (i < end) store_n(weights + i, weighting.of(load_n(logits + i, end - i)), end - i);
    return sum_run(weights + begin, end - begin);
  });
}

// Σ of the weights that are at least `bound`.
double mass_from(const float* weights, int n, float bound) {
  const f32x16 lowest = f32_set1(bound);
  return sum_over_runs(n, [&](int begin, int end) {
    f32x16 sum = f32_zero();
    int i = begin;
    for (; i + 16 <= end; i += 16) {
      const f32x16 w = load(weights + i);
      sum = sum + select(w >= lowest, w, f32_zero());
    }
    if (i < end) {
      const f32x16 w = load_n(weights + i, end - i);
      sum = sum + select(w >= lowest, w, f32_zero());
    }
    return reduce_add(sum);
  });
}

// 2^−k for 0 <= k <= 126.
float power_of_half(int k) {
  const uint32_t u = static_cast<uint32_t>(127 - k) << 23;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// The positive weights in [low, high), in order, to `members`; their number.
int collect_between(const float* weights, int n, float low, float high, float* members) {
  const f32x16 lows = f32_set1(low), highs = f32_set1(high);
  int count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 w = load(weights + i);
    for (uint32_t hits = bits((w >= lows) & (w < highs) & (w > f32_zero())); hits != 0; hits &= hits - 1)
      members[count++] = weights[i + __builtin_ctz(hits)];
  }
  for (; i < n; ++i) {
    if (weights[i] >= low && weights[i] < high && weights[i] > 0) members[count++] = weights[i];
  }
  return count;
}

// Zeroes all but the smallest set of likeliest tokens that weigh `target` together; at least one stays. Weights are at
// most 1, and some is 1. `room` [n] holds the octave of the border meanwhile; without it the search is over them all.
void keep_nucleus(float* weights, int n, double target, float* room) {
  const float* members = weights;
  int num_members = n;
  double above = 0;
  if (room != nullptr) {
    int enough = 127, too_few = -1;  // exponents: weights from 2^−enough up reach the target (127: all), too_few do not
    while (enough - too_few > 1) {
      const int middle = (enough + too_few) / 2;
      (mass_from(weights, n, power_of_half(middle)) >= target ? enough : too_few) = middle;
    }
    const float low = enough < 127 ? power_of_half(enough) : 0.0f;
    const float high = too_few >= 0 ? power_of_half(too_few) : 2.0f;
    above = mass_from(weights, n, high);
    num_members = collect_between(weights, n, low, high, room);
    members = room;
  }
  if (num_members == 0) return;
  double above_in_octave = 0;
  const uint32_t key = radix_select<double>(
      num_members, target - above, &above_in_octave, [&](int i) { return key_of(members[i]); },
      [&](int i) { return static_cast<double>(members[i]); });
  const uint32_t border_bits = key & 0x7fffffffu;  // key_of a number that is not negative
  float border;
  __builtin_memcpy(&border, &border_bits, 4);

  // Of the tokens that weigh the same at the border, as many as it takes, the first ones.
  double sum = above + above_in_octave + static_cast<double>(border);
  int num_ties = 1;
  for (; sum < target && num_ties < n; ++num_ties) sum += static_cast<double>(border);
  const f32x16 borders = f32_set1(border);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 w = load(weights + i);
    store(weights + i, select(w >= borders, w, f32_zero()));
    for (uint32_t hits = bits(w == borders); hits != 0; hits &= hits - 1) {
      if (--num_ties < 0) weights[i + __builtin_ctz(hits)] = 0;
    }
  }
  for (; i < n; ++i) {
    if (weights[i] < border || (weights[i] == border && --num_ties < 0)) weights[i] = 0;
  }
}

// The index at which the running sum passes u · total, 0 <= u < 1; the last that has a weight when rounding keeps the
// sum from it.
int draw_index(const float* weights, int n, double total, double u) {
  const double target = u * total;
  double sum = 0;
  for (int begin = 0; begin < n; begin += kRun) {
    const int end = n - begin < kRun ? n : begin + kRun;
    const double run = static_cast<double>(sum_run(weights + begin, end - begin));
    if (sum + run <= target) {
      sum += run;
      continue;
    }
    int last = begin;
    for (int i = begin; i < end; ++i) {
      if (!(weights[i] > 0)) continue;
      last = i;
      sum += static_cast<double>(weights[i]);
      if (sum > target) break;
    }
    return last;
  }
  int last = n - 1;
  while (last > 0 && !(weights[last] > 0)) --last;
  return last;
}

// A token by temperature, min-p, top-k and top-p. logits, of which some are above kNone, may be `weights` itself.
// weights, ids: [vocab], scratch.
int draw(const float* logits, int vocab, float maximum, const SampleParams& p, float* weights, int32_t* ids) {
  const float min_p = p.min_p > 0 ? (p.min_p < 1.0f ? p.min_p : 1.0f) : 0.0f;  // 1 keeps the likeliest
  const Weighting weighting = {maximum, 1.0f / p.temperature, min_p};
  const bool has_top_k = p.top_k > 0 && p.top_k < vocab;
  int n = vocab;
  if (has_top_k) {  // from here on, index i stands for token ids[i]; i <= ids[i], so that the copy may be in place
    n = collect_best(logits, vocab, p.top_k, ids);
    for (int i = 0; i < n; ++i) weights[i] = logits[ids[i]];
    logits = weights;
  }
  double total = weigh(weights, logits, n, weighting);
  if (p.top_p < 1.0f) {
    const double share = p.top_p > 0 ? static_cast<double>(p.top_p) : 0.0;  // 0 keeps one token
    keep_nucleus(weights, n, share * total, has_top_k ? nullptr : reinterpret_cast<float*>(ids));
    total = mass_from(weights, n, 0.0f);
  }
  const int index = draw_index(weights, n, total, uniform(p.seed, p.position));
  return has_top_k ? ids[index] : index;
}

}  // namespace

SampleResult sample(float* logits, int vocab, const SampleParams& params, int32_t* top_ids, float* top_logprobs,
                    void* scratch) {
  float* work = static_cast<float*>(scratch);
  int32_t* ids = reinterpret_cast<int32_t*>(work + vocab);

  if (!all_finite(logits, vocab)) make_finite(logits, vocab);
  const float raw_max = max_of(logits, vocab);
  const double log_sum = __builtin_log(sum_exp(logits, vocab, raw_max));
  const auto logprob = [&](int32_t id) {
    return static_cast<float>(static_cast<double>(logits[id]) - static_cast<double>(raw_max) - log_sum);
  };
  if (params.num_top > 0) {
    const int count = collect_best(logits, vocab, params.num_top < vocab ? params.num_top : vocab, ids);
    sort_best_first(logits, ids, count);
    for (int i = 0; i < params.num_top; ++i) {
      top_ids[i] = i < count ? ids[i] : -1;
      top_logprobs[i] = i < count ? logprob(ids[i]) : kNone;
    }
  }

  const float* changed = logits;
  float maximum = raw_max;
  if (has_penalties(params) || params.num_bias > 0 || params.allowed != nullptr) {
    __builtin_memcpy(work, logits, static_cast<size_t>(vocab) * sizeof(float));
    if (has_penalties(params)) apply_penalties(work, vocab, params, ids);
    if (params.num_bias > 0) apply_bias(work, vocab, params);
    if (params.allowed != nullptr) apply_mask(work, vocab, params.allowed);
    changed = work;
    maximum = max_of(work, vocab);
  }

  int token;
  if (maximum == kNone) {
    token = first_index_of(logits, vocab, raw_max);
  } else if (!(params.temperature >= kGreedyBelow)) {
    token = first_index_of(changed, vocab, maximum);
  } else {
    token = draw(changed, vocab, maximum, params, work, ids);
  }
  return {token, logprob(token)};
}

}  // namespace motet::MOTET_ISA
