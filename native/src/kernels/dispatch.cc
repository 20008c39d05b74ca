// Chooses the instruction set once, at first use. Compiled for the plain processor.
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

}  // namespace
#endif

const Kernels* kernels_by_name(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return has_avx512() ? &avx512::table : nullptr;
  if (std::strcmp(name, "avx2") == 0) return has_avx2() ? &avx2::table : nullptr;
#endif
  return std::strcmp(name, "scalar") == 0 ? &scalar::table : nullptr;
}

namespace {

const Kernels& choose() {
  if (const char* wanted = std::getenv("MOTET_ISA"); wanted != nullptr && *wanted != '\0') {
    if (const Kernels* named = kernels_by_name(wanted)) return *named;
    throw std::runtime_error(
        "MOTET_ISA: expected an instruction set of this processor (scalar, avx2 or avx512), got " +
        std::string(wanted));
  }
  for (const char* name : {"avx512", "avx2"}) {
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
