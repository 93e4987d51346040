// Vectors of AVX-512 (F, BW, VL, DQ). Included within a namespace; what the names mean stands in vec_array.h.

constexpr int W = 16;
constexpr int ROWS = 6;
constexpr int COLUMNS = 4;

struct F {
  __m512 v;
};
struct M {
  __mmask16 m;
};

inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
inline F load_tail(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline void store_tail(float* p, F x, int count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
inline F splat(float value) { return {_mm512_set1_ps(value)}; }
// N floats as often as they fit.
template <int N>
inline F repeat(const float* p) {
  if constexpr (N == 16) return load(p);
  if constexpr (N == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
  if constexpr (N == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
  if constexpr (N <= 2) {  // of any alignment
    long long bits = 0;
    __builtin_memcpy(&bits, p, 4 * N);
    return {_mm512_castsi512_ps(N == 2 ? _mm512_set1_epi64(bits) : _mm512_set1_epi32(static_cast<int>(bits)))};
  }
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }

inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }
inline float total(F a) { return _mm512_reduce_add_ps(a.v); }

#include "isa/half.h"

inline F load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline __m256i to_bf16(F x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
#endif
}
inline void store_bf16(uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
inline F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void transpose(F* x) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
      b[i + 2 * h + 1] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
    }
  }
  // b[4 r + c] holds, in its lane q of 128 bits, column 4 q + c of rows 4 r to 4 r + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), odd2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    x[c].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
    x[4 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    x[12 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

// 2^f by polynomials as those of exp2.h, f in [0, 1).
template <int DEGREE>
inline F power_above_zero(F f) {
  if constexpr (DEGREE == 5) {
    F p = fma(f, splat(0.001867130515165627f), splat(0.009017029777169228f));
    p = fma(f, p, splat(0.05579991266131401f));
    p = fma(f, p, splat(0.24016444385051727f));
    p = fma(f, p, splat(0.6931512951850891f));
    return fma(f, p, splat(1.0f));
  } else {
    static_assert(DEGREE == 6, "known degrees");
    F p = fma(f, splat(0.00021612919226754457f), splat(0.0012467845808714628f));
    p = fma(f, p, splat(0.009675451554358006f));
    p = fma(f, p, splat(0.055485282093286514f));
    p = fma(f, p, splat(0.2402293086051941f));
    p = fma(f, p, splat(0.6931470632553101f));
    return fma(f, p, splat(1.0f));
  }
}

// 2^x: scalef takes the floor of x, of which reduce leaves the fraction; of -inf they make 0 and 2^0.
template <int DEGREE>
inline F exp2(F x) {
  const F fraction{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(power_above_zero<DEGREE>(fraction).v, x.v)};
}
