// One instruction set's functions: the entries of Kernels (kernels.h has their contracts), each defined in
// the file of its operation. Everything in a kernel file lives in namespace motet::MOTET_ISA, and none uses
// inline functions of the standard library: the linker keeps one copy of those, which might be the AVX-512
// one.
#pragma once
#include "kernels.h"

namespace motet::MOTET_ISA {

// Bytes of a group in QuantizedRows::q. AMX multiplies by low and middle parts side by side; the others read less without the latter.
#if defined(MOTET_ISA_amx)
inline constexpr int kQBytes = 2 * kActivationGroup;
#else
inline constexpr int kQBytes = kActivationGroup;
#endif

void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin, int group_end);
void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin,
              int tile_end, const Ahead* ahead, int num_ahead);
void matmul_f(float* y, int64_t ldy, const PackedMatrix& w, const float* x, int64_t ldx, int num_rows,
              int tile_begin, int tile_end);
void unpack_row(float* out, const PackedMatrix& w, int32_t n);
void rmsnorm(float* y, int64_t ldy, const float* x, int64_t ldx, const float* weight, int num_rows, int n,
             float eps);
void rope(float* x, int64_t ldx, int num_heads, int head_dim, const int32_t* positions, int num_rows,
          const float* cos, const float* sin);
void silu_mul(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu,
              int num_rows, int n);
void gelu_mul(float* out, int64_t ldo, const float* gate, int64_t ldg, const float* up, int64_t ldu,
              int num_rows, int n);
void add(float* y, const float* x, int64_t n);
void kv_write(const KvLayer& kv, int32_t page, int32_t position, const float* k, const float* v);
void attention(const KvLayer& kv, const AttentionJob& job);
void attention_fold(float* out, const float* partials, int num_heads, int num_partitions, int head_dim);
void lora_shrink(const LoraJob* jobs, int num_jobs, const float* x, int64_t ldx, int k, int row_begin,
                 int row_end, int j_begin, int j_end);
void lora_expand(float* y, int64_t ldy, const float* base, int64_t ldb, const LoraJob* jobs, int num_jobs,
                 int n, int tile_begin, int tile_end);
SampleResult sample(float* logits, int vocab, const SampleParams& params, int32_t* top_ids,
                    float* top_logprobs, void* scratch);

extern const Kernels table;

}  // namespace motet::MOTET_ISA
