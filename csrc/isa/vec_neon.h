// Vectors of ARM's Advanced SIMD (NEON, 64-bit). Included within a namespace; what the names mean stands in vec_array.h.

constexpr int W = 4;
constexpr int ROWS = 6;
constexpr int COLUMNS = 4;

struct F {
  float32x4_t v;
};
struct M {
  uint32x4_t m;
};

inline F load(const float* p) {
  F x;  // of any alignment
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F load_tail(const float* p, int count) {
  float lanes[W] = {};
  for (int l = 0; l < count; ++l) lanes[l] = p[l];
  return load(lanes);
}
inline void store_tail(float* p, F x, int count) {
  float lanes[W];
  store(lanes, x);
  for (int l = 0; l < count; ++l) p[l] = lanes[l];
}
inline F splat(float value) { return {vdupq_n_f32(value)}; }
// N floats as often as they fit.
template <int N>
inline F repeat(const float* p) {
  if constexpr (N == 4) return load(p);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, p, 4 * (N == 4 ? 1 : N));
  return {N == 2 ? vreinterpretq_f32_u64(vdupq_n_u64(bits)) : vreinterpretq_f32_u32(vdupq_n_u32(static_cast<uint32_t>(bits)))};
}
inline F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }  // vmaxq_f32 has another rule for NaN
inline F abs(F a) { return {vabsq_f32(a.v)}; }
inline M less(F a, F b) { return {vcltq_f32(a.v, b.v)}; }
inline F select(M m, F a, F b) { return {vbslq_f32(m.m, a.v, b.v)}; }
inline F round(F a) { return {vrndnq_f32(a.v)}; }
// a * 2^n for a whole n within +-127 (smaller: 0)
inline F scale_by_power(F a, F n) {
  const float32x4_t clamped = vbslq_f32(vcltq_f32(n.v, vdupq_n_f32(-126.0f)), vdupq_n_f32(-127.0f), n.v);
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(clamped), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}

inline float largest(F a) { return vmaxvq_f32(a.v); }
inline float total(F a) { return vaddvq_f32(a.v); }

#include "isa/half.h"

inline uint16x4_t load_halves(const uint16_t* p) {
  uint16x4_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store_halves(uint16_t* p, uint16x4_t x) { __builtin_memcpy(p, &x, sizeof x); }
inline F load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(load_halves(p), 16))}; }
inline void store_bf16(uint16_t* p, F x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  store_halves(p, vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet), 16));
}
inline F load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p)))}; }
inline void store_f16(uint16_t* p, F x) { store_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }

inline void transpose(F* x) {
  const float32x4x2_t low = vtrnq_f32(x[0].v, x[1].v), high = vtrnq_f32(x[2].v, x[3].v);
  for (int i = 0; i < 2; ++i) {
    x[i].v = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
    x[2 + i].v = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
  }
}

#include "isa/exp2.h"
