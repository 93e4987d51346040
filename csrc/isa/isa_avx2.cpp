// The engine on AVX2 with FMA and F16C. setup.py compiles this file with its flags.

#include "engine/attention.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include "engine/threading.h"

namespace fm {
namespace {
namespace avx2 {

#include "isa/vec_avx2.h"
#include "engine/kernels.h"

}  // namespace avx2
}  // namespace

const Engine* engine_avx2() {
  static const Engine found{"avx2", avx2::run_forward, avx2::run_backward, avx2::run_decode};
  return &found;
}

}  // namespace fm

#else

namespace fm {
const Engine* engine_avx2() { return nullptr; }
}  // namespace fm

#endif
