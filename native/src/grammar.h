// Grammars that outputs must follow, by llguidance: a vocabulary, grammars compiled for it, and matchers, one a sequence.
// llguidance bounds the work of compiling a grammar and of making a mask; what goes beyond its bounds fails with the reason.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "llguidance.h"
#include "token_matcher.h"

namespace motet {

// A grammar that is wrong, or that takes more than the bounds.
struct GrammarError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Vocabulary {
 public:
  // bytes: what the tokens stand for, one after the other; ends [vocabSize]: where each ends. A token without bytes is never
  // allowed. Special tokens begin with 0xff, and only a grammar that names them allows them. eos: at least one; those that end an output.
  Vocabulary(std::span<const uint8_t> bytes, std::span<const int32_t> ends, std::span<const int32_t> eos);
  const LlgTokenizer* tokenizer() const { return tokenizer_.get(); }
  int size() const { return size_; }

 private:
  struct Free {
    void operator()(LlgTokenizer* t) const { llg_free_tokenizer(t); }
  };
  std::unique_ptr<LlgTokenizer, Free> tokenizer_;
  int size_;
};

struct FreeMatcher {
  void operator()(LlgMatcher* m) const { llg_free_matcher(m); }
};

// A matcher at the beginning of a grammar; others are copied from it. Making masks takes less time the more of the grammar a matcher has
// seen, so those that have ended are set back and used again.
class Grammar {
 public:
  // kind: "json_schema", "regex" or "lark".
  Grammar(std::shared_ptr<const Vocabulary> vocabulary, const std::string& kind, const std::string& text);
  ~Grammar();
  int vocab_size() const { return vocabulary_->size(); }

  // At the beginning. On any thread, as give_back.
  std::unique_ptr<LlgMatcher, FreeMatcher> take() const;
  void give_back(std::unique_ptr<LlgMatcher, FreeMatcher> matcher) const;

 private:
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::unique_ptr<LlgMatcher, FreeMatcher> first_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<LlgMatcher, FreeMatcher>> used_;  // the last one was used last
};

class GrammarMatcher final : public TokenMatcher {
 public:
  explicit GrammarMatcher(std::shared_ptr<const Grammar> grammar);
  ~GrammarMatcher() override;
  const uint32_t* allowed() override;
  void accept(int32_t token) override;
  // Why it cannot say what is allowed; empty: it can.
  const std::string& error() const { return error_; }

 private:
  void fail();
  std::shared_ptr<const Grammar> grammar_;  // first: what is below uses its vocabulary
  std::unique_ptr<LlgMatcher, FreeMatcher> matcher_;
  std::vector<uint32_t> mask_;
  std::string error_;
};

}  // namespace motet
