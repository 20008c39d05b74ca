// Says which tokens a sequence may draw, and follows what it drew. Samples of a step have distinct ones, and are drawn on
// several threads at once.
#pragma once
#include <cstdint>

namespace motet {

class TokenMatcher {
 public:
  virtual ~TokenMatcher() = default;
  // [ceil(vocab/32)] bit mask of the tokens that may come next. null: it cannot say, now or ever, and allows all.
  virtual const uint32_t* allowed() = 0;
  virtual void accept(int32_t token) = 0;
};

}  // namespace motet
