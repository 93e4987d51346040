// The engine on ARM's Advanced SIMD, which every 64-bit ARM processor has.

#include "engine/attention.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)

#include <arm_neon.h>

#include "engine/threading.h"

namespace fm {
namespace {
namespace neon {

#include "isa/vec_neon.h"
#include "engine/kernels.h"

}  // namespace neon
}  // namespace

const Engine* engine_neon() {
  static const Engine found{"neon", neon::run_forward, neon::run_backward, neon::run_decode};
  return &found;
}

}  // namespace fm

#else

namespace fm {
const Engine* engine_neon() { return nullptr; }
}  // namespace fm

#endif
