// The engine on AVX-512 with dot products of bf16. setup.py compiles this file with its flags.

#include "engine/attention.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

#include "engine/threading.h"

namespace fm {
namespace {
namespace avx512_bf16 {

#include "isa/vec_avx512.h"
#define FM_DOT_BF16
#include "engine/kernels.h"

}  // namespace avx512_bf16
}  // namespace

const Engine* engine_avx512_bf16() {
  static const Engine found{"avx512-bf16", avx512_bf16::run_forward, avx512_bf16::run_backward, avx512_bf16::run_decode};
  return &found;
}

}  // namespace fm

#else

namespace fm {
const Engine* engine_avx512_bf16() { return nullptr; }
}  // namespace fm

#endif
