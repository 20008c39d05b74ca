// The gated activations of the MLP, and the residual sum. Both activations are x · sigmoid(z):
//   silu(x): z = x
//   gelu(x), tanh approximation (Hendrycks & Gimpel, 2016): ½x(1 + tanh u) = x · sigmoid(2u),
//     u = √(2/π) · (x + 0.044715 x³)
// exp overflows to infinity, so that the sigmoid goes to 0 and no finite x gives NaN.
#include "simd.h"
#include "variant.h"

namespace motet::MOTET_ISA {

namespace {

MOTET_INLINE f32x16 times_sigmoid(f32x16 x, f32x16 z) {
  const f32x16 one = f32_set1(1.0f);
  return x / (one + exp(neg(z)));
}

struct Silu {
  MOTET_INLINE static f32x16 apply(f32x16 x) { return times_sigmoid(x, x); }
};

struct Gelu {
  MOTET_INLINE static f32x16 apply(f32x16 x) {
    constexpr float kTwiceRootTwoOverPi = 1.5957691216057308f;
    const f32x16 inner = fma(x * x, f32_set1(0.044715f), f32_set1(1.0f));
    return times_sigmoid(x, f32_set1(kTwiceRootTwoOverPi) * x * inner);
  }
};

template <class Activation>
void activation_mul(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu,
                    int num_rows, int n) {
  for (int r = 0; r < num_rows; ++r) {
    float* o = out + r * ldo;
    const float* g = gate + r * ldg;
    const float* u = up + r * ldu;
    int i = 0;
    for (; i + 16 <= n; i += 16) store(o + i, Activation::apply(load(g + i)) * load(u + i));
    if (i < n) store_n(o + i, Activation::apply(load_n(g + i, n - i)) * load_n(u + i, n - i), n - i);
  }
}

}  // namespace

void silu_mul(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu, int num_rows,
              int n) {
  activation_mul<Silu>(out, ldo, gate, ldg, up, ldu, num_rows, n);
}

void gelu_mul(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu, int num_rows,
              int n) {
  activation_mul<Gelu>(out, ldo, gate, ldg, up, ldu, num_rows, n);
}

void add(float* y, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load(y + i) + load(x + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(y + i, load_n(y + i, rest) + load_n(x + i, rest), rest);
  }
}

}  // namespace motet::MOTET_ISA
