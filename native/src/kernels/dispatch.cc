// Chooses the instruction set once, at first use. Compiled for the plain processor.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace motet {

namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avxvnni {
void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin, int tile_end, const Ahead* ahead,
              int num_ahead);
}
namespace amx {
void quantize_rows(const QuantizedRows& out, const float* x, int64_t ldx, int row_begin, int row_end, int group_begin, int group_end);
void matmul_q(float* y, int64_t ldy, const PackedMatrix& w, const QuantizedRows& x, int tile_begin, int tile_end, const Ahead* ahead,
              int num_ahead);
}

namespace {

// gcc's checks ask the processor for the instructions and the operating system (XGETBV) for the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// The 256-bit integer products that processors without AVX-512 have.
bool has_avxvnni() {
  uint32_t a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

// Tile registers have to be asked for, once in a process; the answer counts for threads that start later too.
bool has_amx() {
  uint32_t a, b, c, d;
  if (!has_avx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool has_tile = (d >> 24 & 1) != 0, has_int8 = (d >> 25 & 1) != 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_granted = has_tile && has_int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_granted;
}

// One set with another integer product.
Kernels avxvnni_of(Kernels table) {
  table.name = "avxvnni";
  table.matmul_q = avxvnni::matmul_q;
  return table;
}

// The same with rows that lie as the tile registers want them.
Kernels amx_of(Kernels table) {
  table.name = "amx";
  table.q_bytes = 2 * kActivationGroup;
  table.quantize_rows = amx::quantize_rows;
  table.matmul_q = amx::matmul_q;
  return table;
}

}  // namespace
#endif

const Kernels* kernels_by_name(const char* name) {
#if defined(__x86_64__)
  static const Kernels amx_table = amx_of(avx512::table);
  static const Kernels avxvnni_table = avxvnni_of(avx2::table);
  if (std::strcmp(name, "amx") == 0) return has_amx() ? &amx_table : nullptr;
  if (std::strcmp(name, "avxvnni") == 0) return has_avxvnni() ? &avxvnni_table : nullptr;
  if (std::strcmp(name, "avx512") == 0) return has_avx512() ? &avx512::table : nullptr;
  if (std::strcmp(name, "avx2") == 0) return has_avx2() ? &avx2::table : nullptr;
#endif
  return std::strcmp(name, "scalar") == 0 ? &scalar::table : nullptr;
}

namespace {

const Kernels& choose() {
  if (const char* wanted = std::getenv("MOTET_ISA"); wanted != nullptr && *wanted != '\0') {
    if (const Kernels* named = kernels_by_name(wanted)) return *named;
    std::string expected;
    for (const char* name : kInstructionSets)
      if (kernels_by_name(name) != nullptr) expected += (expected.empty() ? "" : ", ") + std::string(name);
    throw std::runtime_error("MOTET_ISA: expected an instruction set of this processor (" + expected +
                             "), got " + std::string(wanted));
  }
  for (const char* name : kInstructionSets) {
    if (const Kernels* best = kernels_by_name(name)) return *best;
  }
  return scalar::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace motet
