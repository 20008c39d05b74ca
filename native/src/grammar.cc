#include "grammar.h"

#include <atomic>

namespace motet {
namespace {

// Of one matcher, which lives as long as its sequence: a state takes some kilobytes.
constexpr size_t kMaxLexerStates = 20'000;
constexpr size_t kMaxErrorBytes = 400;

// Of all grammars together.
constexpr int kMaxUsed = 64;
std::atomic<int> num_used = 0;

std::string error_of(LlgMatcher* matcher) {
  const char* const text = llg_matcher_get_error(matcher);
  std::string error = text ? text : "unknown";
  error = error.substr(0, error.find("\n<non-verbose/>"));
  if (error == "NoExtensionBias") return "no output can follow it";
  if (error.size() <= kMaxErrorBytes) return error;
  size_t end = kMaxErrorBytes;
  while (end > 0 && (static_cast<uint8_t>(error[end]) & 0xc0) == 0x80) --end;  // not inside of a character
  return error.substr(0, end) + "…";
}

}  // namespace

Vocabulary::Vocabulary(std::span<const uint8_t> bytes, std::span<const int32_t> ends, std::span<const int32_t> eos) : size_(static_cast<int>(ends.size())) {
  if (eos.empty()) throw GrammarError("the model has no token that ends an output");
  std::vector<uint32_t> lengths;
  int32_t begin = 0;
  for (const int32_t end : ends) {
    if (end < begin || static_cast<size_t>(end) > bytes.size()) throw GrammarError("ends: expected ascending offsets into the bytes");
    lengths.push_back(static_cast<uint32_t>(end - begin));
    begin = end;
  }
  const std::vector<LlgToken> ids(eos.begin(), eos.end());
  LlgTokenizerInitV2 init{};
  init.struct_size = sizeof init;
  init.vocab_size = static_cast<uint32_t>(size_);
  init.tok_eos = ids[0];
  init.tok_eos_extra = ids.data() + 1;
  init.tok_eos_extra_count = static_cast<uint32_t>(ids.size() - 1);
  init.token_lens = lengths.data();
  init.token_bytes = bytes.data();
  init.use_approximate_greedy_tokenize_fn = true;  // no text is tokenized: tokens are not forced ahead
  char error[kMaxErrorBytes] = "";
  tokenizer_.reset(llg_new_tokenizer_v2(&init, error, sizeof error));
  if (!tokenizer_) throw GrammarError(error);
}

Grammar::Grammar(std::shared_ptr<const Vocabulary> vocabulary, const std::string& kind, const std::string& text) : vocabulary_(std::move(vocabulary)) {
  LlgConstraintInit init{};
  llg_constraint_init_set_defaults(&init, vocabulary_->tokenizer());
  init.log_buffer_level = init.log_stderr_level = 0;
  init.limits.max_lexer_states = kMaxLexerStates;
  init.limits.verbose_errors = false;  // they would repeat what was generated
  first_.reset(llg_new_matcher(&init, kind.c_str(), text.c_str()));
  // The first mask is made here: it takes longest, and copies have what it found.
  std::vector<uint32_t> mask(llg_matcher_get_mask_byte_size(first_.get()) / sizeof(uint32_t));
  if (llg_matcher_is_error(first_.get()) || llg_matcher_compute_mask_into(first_.get(), mask.data(), mask.size() * sizeof(uint32_t)) != 0)
    throw GrammarError(error_of(first_.get()));
}

Grammar::~Grammar() { num_used -= static_cast<int>(used_.size()); }

std::unique_ptr<LlgMatcher, FreeMatcher> Grammar::take() const {
  {
    const std::lock_guard lock(mutex_);
    if (!used_.empty()) {
      auto matcher = std::move(used_.back());
      used_.pop_back();
      --num_used;
      return matcher;
    }
  }
  return std::unique_ptr<LlgMatcher, FreeMatcher>(llg_clone_matcher(first_.get()));
}

void Grammar::give_back(std::unique_ptr<LlgMatcher, FreeMatcher> matcher) const {
  if (llg_matcher_reset(matcher.get()) != 0) return;
  const std::lock_guard lock(mutex_);
  if (++num_used <= kMaxUsed) used_.push_back(std::move(matcher));
  else --num_used;
}

GrammarMatcher::GrammarMatcher(std::shared_ptr<const Grammar> grammar)
    : grammar_(std::move(grammar)), matcher_(grammar_->take()), mask_(llg_matcher_get_mask_byte_size(matcher_.get()) / sizeof(uint32_t)) {}

GrammarMatcher::~GrammarMatcher() {
  if (error_.empty()) grammar_->give_back(std::move(matcher_));
}

const uint32_t* GrammarMatcher::allowed() {
  if (error_.empty() && llg_matcher_compute_mask_into(matcher_.get(), mask_.data(), mask_.size() * sizeof(uint32_t)) != 0) fail();
  return error_.empty() ? mask_.data() : nullptr;
}

void GrammarMatcher::accept(int32_t token) {
  // After its end a sequence may draw once more, what nobody sees.
  if (!error_.empty() || llg_matcher_is_stopped(matcher_.get())) return;
  if (llg_matcher_consume_token(matcher_.get(), static_cast<LlgToken>(token)) != 0) fail();
}

void GrammarMatcher::fail() { error_ = error_of(matcher_.get()); }

}  // namespace motet
