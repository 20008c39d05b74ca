// How fast this machine multiplies int8: the roof of prefill and of decode with many rows.
//
//   int8_peak_bench [threads] [runs]      default: one thread per usable CPU, 5 runs
//
// Independent accumulators, operands in registers. One multiply and one add are two operations. Prints one
// JSON object, in 10^9 operations a second, best of the runs; null where the CPU lacks the instruction:
//   {"threads", "vnni512": vpdpbusd on 64 bytes, "vnni256": vpdpbusd on 32, "amx": tdpbusd on tiles of 16 ×
//   64}
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "device.h"
#include "thread_pool.h"

namespace {

#if defined(__x86_64__)

#define MOTET_SIXTEEN(I) I(0) I(1) I(2) I(3) I(4) I(5) I(6) I(7) I(8) I(9) I(10) I(11) I(12) I(13) I(14) I(15)
#define MOTET_CLOBBERS                                                                                       \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15"

// Assembly, because compilers put moves between the intrinsics of such a loop, which halves the rate.
#define MOTET_DOT512(n) "vpdpbusd %%zmm16, %%zmm17, %%zmm" #n "\n\t"
__attribute__((target("avx512f,avx512vnni"))) void dots_512(int64_t turns) {
  for (int64_t i = 0; i < turns; ++i)
    asm volatile(MOTET_SIXTEEN(MOTET_DOT512)::: MOTET_CLOBBERS, "xmm16", "xmm17");
}

#define MOTET_DOT256(n) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #n "\n\t"
__attribute__((target("avxvnni"))) void dots_256(int64_t turns) {
  for (int64_t i = 0; i < turns; ++i)
    asm volatile(MOTET_DOT256(0) MOTET_DOT256(1) MOTET_DOT256(2) MOTET_DOT256(3) MOTET_DOT256(4)
                     MOTET_DOT256(5) MOTET_DOT256(6) MOTET_DOT256(7) MOTET_DOT256(8) MOTET_DOT256(9)
                         MOTET_DOT256(10) MOTET_DOT256(11)::
                             : MOTET_CLOBBERS);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 accumulate; 4 and 5, 6 and 7 are the operands, as in a GEMM that holds 2 × 2 tiles.
__attribute__((target("amx-tile,amx-int8"))) void dots_amx(int64_t turns) {
  const TileConfig config;
  asm volatile(
      "ldtilecfg %0\n\ttilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
      "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" ::"m"(config));
  for (int64_t i = 0; i < turns; ++i)
    asm volatile(
        "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\ttdpbusd %%tmm7, %%tmm5, %%tmm3" ::);
  asm volatile("tilerelease" ::);
}

bool cpu_has(int leaf, int subleaf, int register_index, int bit) {
  unsigned registers[4] = {};
  return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
         (registers[register_index] >> bit & 1);
}

// Linux grants the tiles' state to a process that asks.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return cpu_has(7, 0, 3, 25) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool has_vnni512() { return cpu_has(7, 0, 2, 11) && __builtin_cpu_supports("avx512f"); }
bool has_vnni256() { return cpu_has(7, 1, 0, 4) && __builtin_cpu_supports("avx2"); }

#else
void dots_512(int64_t) {}
void dots_256(int64_t) {}
void dots_amx(int64_t) {}
bool has_amx() { return false; }
bool has_vnni512() { return false; }
bool has_vnni256() { return false; }
#endif

void print_peak(motet::ThreadPool& pool, int runs, const char* name, bool is_there, void (*dots)(int64_t),
                int64_t turns, double operations_per_turn) {
  if (!is_there) {
    std::printf(", \"%s\": null", name);
    return;
  }
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pool.num_threads(), [&](int, int) { dots(turns); });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf(", \"%s\": %.0f", name, operations_per_turn * turns * pool.num_threads() / best / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : motet::available_cpus();
  const int runs = argc > 2 ? std::atoi(argv[2]) : 5;
  if (threads < 1 || runs < 1) {
    std::fprintf(stderr, "usage: int8_peak_bench [threads >= 1] [runs >= 1]\n");
    return 2;
  }
  const bool amx = has_amx();  // before the pool's threads are made: they inherit the permission
  motet::ThreadPool pool(threads);
  std::printf("{\"threads\": %d", threads);
  print_peak(pool, runs, "vnni512", has_vnni512(), dots_512, 1'500'000, 16 * 128);
  print_peak(pool, runs, "vnni256", has_vnni256(), dots_256, 2'000'000, 12 * 64);
  print_peak(pool, runs, "amx", amx, dots_amx, 1'000'000, 4 * 2 * 16 * 16 * 64);
  std::printf("}\n");
}
