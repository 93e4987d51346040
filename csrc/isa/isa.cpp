// Which instruction set's code runs.

#include <atomic>
#include <cstring>

#include "engine/attention.h"

namespace fm {
namespace {

#if defined(__x86_64__) || defined(__i386__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

std::atomic<const Engine*> chosen{nullptr};

}  // namespace

const Engine* available(int index) {
  if (index == 0) return has_avx512_bf16() ? engine_avx512_bf16() : nullptr;
  if (index == 1) return has_avx512() ? engine_avx512() : nullptr;
  if (index == 2) return has_avx2() ? engine_avx2() : nullptr;
  if (index == 3) return engine_neon();
  return engine_scalar();
}

const Engine& engine() {
  if (const Engine* found = chosen.load(std::memory_order_acquire)) return *found;
  int index = 0;
  while (!available(index)) ++index;
  return *available(index);
}

bool choose(const char* name) {
  if (!*name) {
    chosen.store(nullptr, std::memory_order_release);
    return true;
  }
  for (int index = 0; index < ENGINES; ++index) {
    const Engine* found = available(index);
    if (found && !std::strcmp(found->name, name)) {
      chosen.store(found, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace fm
