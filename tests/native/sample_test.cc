// sample: each parameter's effect against a plain implementation that sorts, draws against their distribution over
// many seeds, and the odd ends: ties, masks that leave nothing, numbers that are not finite.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "kernels/kernels.h"
#include "reference.h"

namespace motet {
namespace {

using reference::available_kernels;

constexpr SampleParams kGreedy = {.temperature = 0, .top_k = 0, .top_p = 1, .min_p = 0, .repetition_penalty = 1,
                                  .presence_penalty = 0, .frequency_penalty = 0, .seed = 1, .position = 0,
                                  .prompt_tokens = nullptr, .num_prompt_tokens = 0, .output_tokens = nullptr,
                                  .num_output_tokens = 0, .bias_ids = nullptr, .bias_values = nullptr, .num_bias = 0,
                                  .allowed = nullptr, .num_top = 0};

// `p` keeps pointers into both.
void set_history(SampleParams& p, const std::vector<int32_t>& prompt, const std::vector<int32_t>& output) {
  p.prompt_tokens = prompt.data();
  p.num_prompt_tokens = static_cast<int>(prompt.size());
  p.output_tokens = output.data();
  p.num_output_tokens = static_cast<int>(output.size());
}

SampleParams warm(float temperature = 1) {
  SampleParams p = kGreedy;
  p.temperature = temperature;
  return p;
}

struct Outcome {
  int32_t token;
  float logprob;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
  bool operator==(const Outcome&) const = default;
};

Outcome sample(const Kernels& kernels, std::vector<float> logits, const SampleParams& p) {
  const int vocab = static_cast<int>(logits.size());
  std::vector<uint64_t> scratch(vocab);
  Outcome o = {.token = -1, .logprob = 0, .top_ids = std::vector<int32_t>(p.num_top),
               .top_logprobs = std::vector<float>(p.num_top)};
  const SampleResult r =
      kernels.sample(logits.data(), vocab, p, o.top_ids.data(), o.top_logprobs.data(), scratch.data());
  o.token = r.token;
  o.logprob = r.logprob;
  return o;
}

int32_t token(const std::vector<float>& logits, const SampleParams& p) { return sample(kernels(), logits, p).token; }

// Like a language model's: mostly noise, a few likely tokens.
std::vector<float> random_logits(int vocab, uint32_t seed, float spread = 2) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(vocab);
  for (float& l : logits) l = normal(random);
  for (int i = 0; i < 5; ++i) logits[random() % vocab] += 6;
  return logits;
}

std::vector<int32_t> best_first(const std::vector<float>& values) {
  std::vector<int32_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return ids;
}

std::vector<double> log_softmax(const std::vector<float>& logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float l : logits) sum += std::exp(l - largest);
  std::vector<double> result;
  for (const float l : logits) result.push_back(l - largest - std::log(sum));
  return result;
}

// What the draw should follow: the plain implementation, by sorting.
std::vector<double> distribution(const std::vector<float>& logits, const SampleParams& p) {
  const std::vector<int32_t> order = best_first(logits);
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i)
    weights[i] = std::exp((static_cast<double>(logits[i]) - logits[order[0]]) / p.temperature);
  for (double& w : weights) w = w >= p.min_p ? w : 0;
  if (p.top_k > 0) {
    for (size_t i = p.top_k; i < order.size(); ++i) weights[order[i]] = 0;
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double before = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const double own = weights[order[i]];
    if (i > 0 && before >= p.top_p * total) weights[order[i]] = 0;
    before += own;
  }
  const double kept = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& w : weights) w /= kept;
  return weights;
}

// Draws at many positions; every token must be possible, and the counts must fit by a chi-square test.
void expect_distribution(const std::vector<float>& logits, SampleParams p, int num_draws) {
  const std::vector<double> expected = distribution(logits, p);
  std::map<int32_t, int> counts;
  for (int i = 0; i < num_draws; ++i) {
    p.seed = i / 1000;
    p.position = i % 1000;
    ++counts[token(logits, p)];
  }
  double chi_square = 0, rare_expected = 0;
  int cells = 0, rare_count = 0;
  for (size_t id = 0; id < logits.size(); ++id) {
    const double e = expected[id] * num_draws;
    const int seen = counts.contains(id) ? counts[id] : 0;
    if (e == 0) {
      ASSERT_EQ(seen, 0) << "token " << id << " is not among the kept";
    } else if (e < 8) {  // too few to approximate: all such tokens are one cell
      rare_expected += e;
      rare_count += seen;
    } else {
      chi_square += (seen - e) * (seen - e) / e;
      ++cells;
    }
  }
  if (rare_expected >= 8) {
    chi_square += (rare_count - rare_expected) * (rare_count - rare_expected) / rare_expected;
    ++cells;
  }
  // Mean cells − 1, variance twice that; five deviations, and the seeds are fixed.
  const double freedom = std::max(1, cells - 1);
  EXPECT_LT(chi_square, freedom + 5 * std::sqrt(2 * freedom)) << cells << " cells";
}

TEST(Greedy, TakesTheLikeliestAndTheLowestIdOfATie) {
  for (const int vocab : {1, 2, 15, 16, 17, 100, 5000}) {
    const std::vector<float> logits = random_logits(vocab, vocab);
    EXPECT_EQ(token(logits, kGreedy), best_first(logits)[0]) << vocab;
    EXPECT_EQ(token(std::vector<float>(vocab, -3.0f), kGreedy), 0) << vocab;
  }
  std::vector<float> tie(50, 0.0f);
  tie[33] = tie[20] = tie[48] = 2;
  EXPECT_EQ(token(tie, kGreedy), 20);
}

TEST(Greedy, IgnoresTheOtherParametersOfTheDraw) {
  SampleParams p = kGreedy;
  p.top_k = 3;
  p.top_p = 0.1f;
  p.min_p = 0.5f;
  const std::vector<float> logits = random_logits(200, 4);
  EXPECT_EQ(token(logits, p), best_first(logits)[0]);
}

TEST(Logprobs, AreOfTheRawDistributionWhateverIsDone) {
  const std::vector<float> logits = random_logits(3001, 9);
  const std::vector<double> expected = log_softmax(logits);
  const std::vector<int32_t> order = best_first(logits);
  const std::vector<int32_t> history = {order[0], order[1], order[2]};
  SampleParams p = warm(0.3f);
  p.top_k = 10;
  p.repetition_penalty = 1.7f;
  p.output_tokens = history.data();
  p.num_output_tokens = 3;
  p.num_top = 20;
  for (const Kernels* k : available_kernels()) {
    for (p.position = 0; p.position < 20; ++p.position) {
      const Outcome o = sample(*k, logits, p);
      // Sums in f32 lanes of a few hundred terms, double beyond; then a rounding to f32.
      EXPECT_NEAR(o.logprob, expected[o.token], 2e-6) << k->name;
      for (int i = 0; i < p.num_top; ++i) {
        EXPECT_EQ(o.top_ids[i], order[i]) << k->name;
        EXPECT_NEAR(o.top_logprobs[i], expected[order[i]], 2e-6) << k->name;
      }
    }
  }
}

TEST(Logprobs, TopTokensEqualASortForAnyCountAndVocabulary) {
  for (const int vocab : {1, 5, 64, 1000, 1500, 49152}) {
    for (const float step : {0.0f, 0.5f}) {  // with a step most values are ties
      std::vector<float> logits = random_logits(vocab, vocab + 1);
      for (float& l : logits) l = step > 0 ? std::round(l / step) * step : l;
      const std::vector<int32_t> order = best_first(logits);
      for (const int num_top : {0, 1, 2, 20, 300}) {
        SampleParams p = kGreedy;
        p.num_top = num_top;
        const Outcome o = sample(kernels(), logits, p);
        for (int i = 0; i < num_top; ++i) {
          ASSERT_EQ(o.top_ids[i], i < vocab ? order[i] : -1) << "vocab " << vocab << " top " << num_top << " " << i;
          if (i >= vocab) {
            ASSERT_EQ(o.top_logprobs[i], -INFINITY);
          }
        }
      }
    }
  }
}

TEST(Logprobs, TopTokensEqualASortOverRandomCounts) {
  std::mt19937 random(21);
  for (int round = 0; round < 300; ++round) {
    const std::vector<float> logits = random_logits(1025 + random() % 4000, round, 1);
    SampleParams p = kGreedy;
    p.num_top = 1 + random() % (round % 2 == 0 ? 3 : 250);
    std::vector<int32_t> expected = best_first(logits);
    expected.resize(p.num_top);
    ASSERT_EQ(sample(kernels(), logits, p).top_ids, expected) << "round " << round;
  }
}

TEST(Logprobs, TopTokensOfRisingLogitsAreFoundThoughEachBeatsThoseBefore) {
  std::vector<float> logits(20000);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = i * 1e-3f;
  SampleParams p = kGreedy;
  p.num_top = 7;
  const std::vector<int32_t> expected = {19999, 19998, 19997, 19996, 19995, 19994, 19993};
  EXPECT_EQ(sample(kernels(), logits, p).top_ids, expected);
}

TEST(Penalties, RepetitionDividesPositiveAndMultipliesNegativeLogitsOfPromptAndOutputOnce) {
  const std::vector<int32_t> prompt = {0, 0, 0}, output = {1, 0, 1};
  SampleParams p = kGreedy;
  p.repetition_penalty = 2;
  set_history(p, prompt, output);
  EXPECT_EQ(token({4.0f, 1.0f, 1.9f}, p), 0);     // 2, 0.5, 1.9: once, or 0 would be at 1
  EXPECT_EQ(token({4.0f, 1.0f, 2.1f}, p), 2);     // 2, 0.5, 2.1
  EXPECT_EQ(token({-1.0f, -1.0f, -1.9f}, p), 2);  // −2, −2, −1.9
  EXPECT_EQ(token({-1.0f, -1.0f, -2.1f}, p), 0);  // −2, −2, −2.1
}

TEST(Penalties, PresenceCountsOutputOnceAndPromptNever) {
  const std::vector<int32_t> prompt = {0}, output = {1, 1, 1};
  SampleParams p = kGreedy;
  p.presence_penalty = 1;
  set_history(p, prompt, output);
  EXPECT_EQ(token({1.0f, 2.1f, 0.0f}, p), 1);  // 1, 1.1
  EXPECT_EQ(token({1.0f, 1.9f, 0.0f}, p), 0);  // 1, 0.9
}

TEST(Penalties, FrequencyCountsEveryOutputAndPromptNever) {
  const std::vector<int32_t> prompt = {0, 0, 0, 0}, output = {1, 0, 1, 1};
  SampleParams p = kGreedy;
  p.frequency_penalty = 0.5f;
  set_history(p, prompt, output);
  EXPECT_EQ(token({1.0f, 2.1f, 0.0f}, p), 1);  // 0.5, 0.6
  EXPECT_EQ(token({1.0f, 1.9f, 0.0f}, p), 0);  // 0.5, 0.4
  p.frequency_penalty = -2;                    // negative ones favour
  EXPECT_EQ(token({9.0f, 6.0f, 10.0f}, p), 1);
}

TEST(Penalties, RepetitionComesBeforePresence) {
  const std::vector<int32_t> output = {0};
  SampleParams p = kGreedy;
  p.repetition_penalty = 2;
  p.presence_penalty = 1;
  p.output_tokens = output.data();
  p.num_output_tokens = 1;
  EXPECT_EQ(token({4.0f, 1.2f}, p), 1);  // 4 / 2 − 1 = 1; the other order gives 1.5
}

TEST(Bias, IsAddedAndMinusInfinityForbids) {
  const std::vector<int32_t> ids = {2, 0, 99, -1};
  std::vector<float> values = {5, -INFINITY, 100, 100};
  SampleParams p = kGreedy;
  p.bias_ids = ids.data();
  p.bias_values = values.data();
  p.num_bias = 4;  // the last two name no token and are left out
  EXPECT_EQ(token({9.0f, 1.0f, 0.0f, 4.0f}, p), 2);
  values[0] = 0;
  EXPECT_EQ(token({9.0f, 1.0f, 0.0f, 4.0f}, p), 3);
  EXPECT_EQ(token({9.0f, -3.0f, -2.0f, -4.0f}, p), 2);
}

TEST(Allowed, OnlyTokensOfTheMaskAreTaken) {
  for (const int vocab : {1, 31, 32, 33, 70, 3000}) {
    const std::vector<float> logits = random_logits(vocab, vocab);
    std::vector<uint32_t> allowed((vocab + 31) / 32);
    std::set<int32_t> members;
    for (int id = vocab - 1; id >= 0; id -= 7) {
      allowed[id / 32] |= 1u << id % 32;
      members.insert(id);
    }
    SampleParams p = warm(5);
    p.allowed = allowed.data();
    for (p.position = 0; p.position < 200; ++p.position) ASSERT_TRUE(members.contains(token(logits, p))) << vocab;
    p.top_k = 50;
    p.top_p = 0.99f;
    for (p.position = 0; p.position < 200; ++p.position) ASSERT_TRUE(members.contains(token(logits, p))) << vocab;
    p.temperature = 0;
    int32_t best = *members.begin();
    for (const int32_t id : members) best = logits[id] > logits[best] ? id : best;
    EXPECT_EQ(token(logits, p), best) << vocab;
  }
}

TEST(Allowed, AMaskThatLeavesNothingFallsBackToTheLikeliestRawToken) {
  const std::vector<uint32_t> nothing(4, 0);
  const std::vector<float> logits = random_logits(100, 3);
  for (const Kernels* k : available_kernels()) {
    for (SampleParams p : {kGreedy, warm()}) {
      p.allowed = nothing.data();
      EXPECT_EQ(sample(*k, logits, p).token, best_first(logits)[0]) << k->name;
    }
  }
}

TEST(Draw, FollowsTheSoftmax) { expect_distribution(random_logits(1100, 1, 1), warm(), 30000); }

TEST(Draw, FollowsTheTemperature) {
  expect_distribution(random_logits(40, 2, 1), warm(0.5f), 50000);
  expect_distribution(random_logits(40, 2, 1), warm(3), 50000);
}

TEST(Draw, FollowsTopK) {
  for (const int top_k : {1, 2, 5, 39, 40, 41, 1000}) {
    SampleParams p = warm(1.5f);
    p.top_k = top_k;
    expect_distribution(random_logits(40, 3, 1), p, 50000);
  }
  SampleParams p = warm(1);
  p.top_k = 60;
  expect_distribution(random_logits(5000, 3, 1), p, 20000);
}

TEST(Draw, FollowsTopP) {
  for (const float top_p : {0.0f, 0.1f, 0.5f, 0.9f, 0.999f}) {
    SampleParams p = warm();
    p.top_p = top_p;
    expect_distribution(random_logits(40, 4, 1), p, 50000);
    expect_distribution(random_logits(5000, 4, 1), p, 6000);
  }
}

TEST(Draw, FollowsMinP) {
  for (const float min_p : {0.01f, 0.2f, 1.0f}) {
    SampleParams p = warm(1.3f);
    p.min_p = min_p;
    expect_distribution(random_logits(40, 5, 1), p, 50000);
  }
}

TEST(Draw, FollowsAllOfThemTogether) {
  SampleParams p = warm(1.4f);
  p.top_k = 30;
  p.top_p = 0.8f;
  p.min_p = 0.05f;
  expect_distribution(random_logits(300, 6, 1), p, 50000);
}

TEST(Draw, KeptSetsEqualASortOverRandomParameters) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform;
  for (int round = 0; round < 60; ++round) {
    SampleParams p = warm(0.2f + 2 * uniform(random));
    p.top_k = random() % 3 == 0 ? 0 : 1 + random() % 100;
    p.top_p = random() % 3 == 0 ? 1 : uniform(random);
    p.min_p = random() % 3 == 0 ? uniform(random) * 0.2f : 0;
    const std::vector<float> logits = random_logits(1 + random() % 3000, round);
    const std::vector<double> expected = distribution(logits, p);
    for (p.position = 0; p.position < 300; ++p.position)
      ASSERT_GT(expected[token(logits, p)], 0) << "round " << round << " position " << p.position;
  }
}

TEST(Draw, TopKOneAndTopPZeroAndMinPOneAreGreedy) {
  std::vector<float> tie(2000, 1.0f);
  tie[700] = tie[1500] = 3;
  SampleParams k = warm(2), p = warm(2);
  k.top_k = 1;
  p.top_p = 0;
  for (k.position = p.position = 0; p.position < 50; ++p.position, ++k.position) {
    EXPECT_EQ(token(tie, k), 700);
    EXPECT_EQ(token(tie, p), 700);
  }
  SampleParams m = warm(2);
  m.min_p = 1;
  std::set<int32_t> seen;
  for (m.position = 0; m.position < 50; ++m.position) seen.insert(token(tie, m));
  EXPECT_EQ(seen, (std::set<int32_t>{700, 1500}));  // min-p keeps both of a tie
}

TEST(Draw, ATinyTemperatureIsGreedyAndAHugeOneUniform) {
  const std::vector<float> logits = random_logits(64, 8);
  for (const float temperature : {1e-30f, 1e-6f, 1e-4f})
    EXPECT_EQ(token(logits, warm(temperature)), best_first(logits)[0]);
  expect_distribution(logits, warm(1e30f), 20000);
  expect_distribution(logits, warm(INFINITY), 20000);
}

TEST(Draw, DependsOnSeedAndPositionOnly) {
  const std::vector<float> logits = random_logits(5000, 10, 1);
  std::set<int32_t> by_seed, by_position;
  for (int i = 0; i < 100; ++i) {
    SampleParams p = warm();
    p.seed = i;
    by_seed.insert(token(logits, p));
    EXPECT_EQ(token(logits, p), token(logits, p));
    p.seed = 0;
    p.position = i;
    by_position.insert(token(logits, p));
  }
  EXPECT_GT(by_seed.size(), 10u);
  EXPECT_GT(by_position.size(), 10u);
}

TEST(Draw, NeighbouringSeedsAndPositionsAreIndependent) {
  // Pairs of draws of one fair bit: each of four outcomes a quarter of the time, within five deviations.
  constexpr int kDraws = 20000;
  for (const bool by_seed : {true, false}) {
    int counts[4] = {};
    for (int i = 0; i < kDraws; ++i) {
      SampleParams p = warm();
      int pair = 0;
      for (int j = 0; j < 2; ++j) {
        p.seed = by_seed ? i + j : 7;
        p.position = by_seed ? 3 : i + j;
        pair = pair * 2 + token({0.0f, 0.0f}, p);
      }
      ++counts[pair];
    }
    for (const int count : counts) EXPECT_NEAR(count, kDraws / 4, 5 * std::sqrt(kDraws * 3 / 16.0));
  }
}

TEST(Sample, GivesTheSameOutcomeOnEveryInstructionSet) {
  std::mt19937 random(12);
  std::uniform_real_distribution<float> uniform;
  for (int round = 0; round < 200; ++round) {
    const int vocab = 1 + random() % 4000;
    const std::vector<float> logits = random_logits(vocab, round);
    std::vector<int32_t> history(50);
    for (int32_t& id : history) id = random() % vocab;
    SampleParams p = warm(round % 5 == 0 ? 0 : 2 * uniform(random));
    p.top_k = random() % 2 * (random() % 200);
    p.top_p = random() % 2 ? uniform(random) : 1;
    p.min_p = random() % 2 ? 0.1f * uniform(random) : 0;
    p.repetition_penalty = 1 + uniform(random);
    p.frequency_penalty = uniform(random);
    p.prompt_tokens = history.data();
    p.num_prompt_tokens = 30;
    p.output_tokens = history.data() + 30;
    p.num_output_tokens = 20;
    p.num_top = random() % 25;
    p.seed = round;
    const Outcome expected = sample(*kernels_by_name("scalar"), logits, p);
    for (const Kernels* k : available_kernels()) ASSERT_EQ(sample(*k, logits, p), expected) << k->name << " round " << round;
  }
}

TEST(Sample, ReturnsATokenWhenLogitsAreNotFinite) {
  std::vector<float> some_nan = random_logits(1000, 13);
  for (int i = 0; i < 1000; i += 3) some_nan[i] = NAN;
  std::vector<float> infinite = random_logits(1000, 14);
  infinite[400] = INFINITY;
  infinite[401] = -INFINITY;
  const std::vector<std::vector<float>> all = {some_nan, infinite, std::vector<float>(1000, NAN),
                                               std::vector<float>(1000, INFINITY), std::vector<float>(1000, -INFINITY)};
  for (const Kernels* k : available_kernels()) {
    for (const std::vector<float>& logits : all) {
      for (SampleParams p : {kGreedy, warm()}) {
        for (const int top_k : {0, 5}) {
          for (const float top_p : {0.5f, 1.0f}) {
            p.top_k = top_k;
            p.top_p = top_p;
            p.num_top = 3;
            const Outcome o = sample(*k, logits, p);
            EXPECT_GE(o.token, 0);
            EXPECT_LT(o.token, 1000);
            EXPECT_FALSE(std::isnan(o.logprob));
            if (&logits == &all[0]) {
              EXPECT_FALSE(std::isnan(logits[o.token])) << "NaN is the least likely";
            }
            if (&logits == &all[1]) {
              EXPECT_EQ(o.token, 400);
            }
          }
        }
      }
    }
  }
}

TEST(Sample, OfOneTokenIsThatToken) {
  SampleParams p = warm();
  p.num_top = 2;
  for (const Kernels* k : available_kernels()) {
    const Outcome o = sample(*k, {-5.0f}, p);
    EXPECT_EQ(o.token, 0);
    EXPECT_EQ(o.logprob, 0);
    EXPECT_EQ(o.top_ids, (std::vector<int32_t>{0, -1}));
  }
}

TEST(Sample, IgnoresHistoryOutsideOfTheVocabulary) {
  const std::vector<int32_t> history = {-1, 100, 1 << 30, 4};
  SampleParams p = kGreedy;
  p.repetition_penalty = 10;
  p.output_tokens = history.data();
  p.num_output_tokens = 4;
  std::vector<float> logits(10, 1.0f);
  logits[4] = 5;
  EXPECT_EQ(token(logits, p), 0);
}

}  // namespace
}  // namespace motet
