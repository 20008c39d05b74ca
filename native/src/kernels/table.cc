// The table of one instruction set.
#include "variant.h"

#define MOTET_STRING_OF(x) #x
#define MOTET_STRING(x) MOTET_STRING_OF(x)

namespace motet::MOTET_ISA {

constinit const Kernels table = {
    .name = MOTET_STRING(MOTET_ISA),
    .q_bytes = kQBytes,
    .quantize_rows = quantize_rows,
    .matmul_q = matmul_q,
    .matmul_f = matmul_f,
    .unpack_row = unpack_row,
    .rmsnorm = rmsnorm,
    .rope = rope,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .add = add,
    .kv_write = kv_write,
    .attention = attention,
    .attention_fold = attention_fold,
    .lora_shrink = lora_shrink,
    .lora_expand = lora_expand,
    .sample = sample,
};

}  // namespace motet::MOTET_ISA
