// The products that AMX computes, with its registers as arrays (kernels/tile_registers.h): the bits of the contract also where the
// processor has none. What it has itself is tested by matmul_test.
#if defined(__x86_64__)
#include "reference.h"

namespace motet::amx_emulated {
void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin, int group_end);
void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin, int tile_end, const Ahead* ahead,
              int num_ahead);
}  // namespace motet::amx_emulated

namespace motet {
namespace {

using namespace reference;

TEST(TileRegistersTest, ProductsHaveTheBitsOfAvx512) {
  const Kernels* const avx512 = kernels_by_name("avx512");
  if (avx512 == nullptr) GTEST_SKIP() << "no AVX-512 on this processor, which the rest of a product with AMX uses";
  Random random(31);
  const int q_bytes = 2 * kActivationGroup;
  for (int f = 0; f < kNumWeightFormats; ++f) {
    const auto format = static_cast<WeightFormat>(f);
    if (!is_quantized(format)) continue;
    for (const auto& [num_rows, n, k] : {std::tuple{1, 48, 96}, {15, 64, 160}, {16, 16, 128}, {17, 80, 352}, {40, 64, 576}, {300, 48, 1632}}) {
      const Matrix w = random_matrix(random, format, n, k);
      const AlignedVector<uint8_t> bytes = pack(w);
      std::vector<float> x = random.normals(size_t(num_rows) * k);
      // Some peaks are so wide that they have a high part.
      for (size_t i = 0; i < x.size(); i += 97) x[i] *= 1000;
      Rows rows(num_rows, k, q_bytes), plain(num_rows, k, avx512->q_bytes);
      amx_emulated::quantize_rows(rows.view(), x.data(), k, 0, num_rows, 0, k / kActivationGroup);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(rows.q, quantize(x, num_rows, k, q_bytes).q, "q"));
      avx512->quantize_rows(plain.view(), x.data(), k, 0, num_rows, 0, k / kActivationGroup);
      const PackedMatrix packed{format, n, k, bytes.data()};
      std::vector<float> y(size_t(num_rows) * n), expected(y.size());
      amx_emulated::matmul_q(y.data(), n, packed, rows.view(), 0, n / kTileColumns, nullptr, 0);
      avx512->matmul_q(expected.data(), n, packed, plain.view(), 0, n / kTileColumns, nullptr, 0);
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(y, expected, "format " + std::to_string(f) + ", rows " + std::to_string(num_rows)));
    }
  }
}

}  // namespace
}  // namespace motet
#endif
