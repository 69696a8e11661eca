#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace specdec {
namespace {

#if defined(__x86_64__)
// Not every clang knows it by name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool runs(const Kernels& table) {
#if defined(__x86_64__)
  if (&table == &kAvx512Kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&table == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return true;
}

const Kernels* choose() {
#if defined(__x86_64__)
  static const Kernels* const tables[] = {&kAvx512Kernels, &kAvx2Kernels, &kScalarKernels};
#else
  static const Kernels* const tables[] = {&kScalarKernels};
#endif
  const char* wanted = std::getenv("SPECDEC_CPU_ISA");
  for (const Kernels* table : tables) {
    const bool named = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, table->name) == 0;
    if (named && runs(*table)) return table;
  }
  return nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace specdec
