// The engine on AVX-512. setup.py compiles this file with its flags.

#include "engine/attention.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

#include "engine/threading.h"

namespace fm {
namespace {
namespace avx512 {

#include "isa/vec_avx512.h"
#include "engine/kernels.h"

}  // namespace avx512
}  // namespace

const Engine* engine_avx512() {
  static const Engine found{"avx512", avx512::run_forward, avx512::run_backward, avx512::run_decode};
  return &found;
}

}  // namespace fm

#else

namespace fm {
const Engine* engine_avx512() { return nullptr; }
}  // namespace fm

#endif
