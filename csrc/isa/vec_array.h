// Vectors as plain arrays: right on every processor, the measure for the vectorised ones. Included within a namespace.
//
// Every vec_*.h defines the same names: F, a vector of W floats, M, the outcome of a comparison, and the functions below.
// Tails are counts from 1 to W; lanes beyond are 0 when loaded and left alone when stored.

constexpr int W = 4;        // floats in a vector
constexpr int ROWS = 4;     // rows and
constexpr int COLUMNS = 2;  // vectors of one register tile of a matrix product

struct F {
  float lane[W];
};
struct M {
  bool lane[W];
};

#define FM_EACH for (int l = 0; l < W; ++l)

inline F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F load_tail(const float* p, int count) {
  F x{};
  for (int l = 0; l < count; ++l) x.lane[l] = p[l];
  return x;
}
inline void store_tail(float* p, F x, int count) {
  for (int l = 0; l < count; ++l) p[l] = x.lane[l];
}
inline F splat(float value) {
  F x;
  FM_EACH x.lane[l] = value;
  return x;
}
// N floats as often as they fit.
template <int N>
inline F repeat(const float* p) {
  F x;
  FM_EACH x.lane[l] = p[l % N];
  return x;
}
inline F operator+(F a, F b) {
  FM_EACH a.lane[l] += b.lane[l];
  return a;
}
inline F operator-(F a, F b) {
  FM_EACH a.lane[l] -= b.lane[l];
  return a;
}
inline F operator*(F a, F b) {
  FM_EACH a.lane[l] *= b.lane[l];
  return a;
}
inline F operator/(F a, F b) {
  FM_EACH a.lane[l] /= b.lane[l];
  return a;
}
inline F fma(F a, F b, F c) {
  FM_EACH c.lane[l] += a.lane[l] * b.lane[l];
  return c;
}
inline F max(F a, F b) {  // b where either is NaN
  FM_EACH a.lane[l] = a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l];
  return a;
}
inline F abs(F a) {
  FM_EACH a.lane[l] = __builtin_fabsf(a.lane[l]);
  return a;
}
inline M less(F a, F b) {
  M m;
  FM_EACH m.lane[l] = a.lane[l] < b.lane[l];
  return m;
}
inline F select(M m, F a, F b) {
  FM_EACH a.lane[l] = m.lane[l] ? a.lane[l] : b.lane[l];
  return a;
}
inline F round(F a) {
  FM_EACH a.lane[l] = __builtin_rintf(a.lane[l]);
  return a;
}
// a * 2^n for a whole n within +-127 (smaller: 0)
inline F scale_by_power(F a, F n) {
  FM_EACH {
    const float clamped = n.lane[l] < -126.0f ? -127.0f : n.lane[l];
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(clamped) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    a.lane[l] *= power;
  }
  return a;
}

inline float largest(F a) {
  float most = a.lane[0];
  FM_EACH most = a.lane[l] > most ? a.lane[l] : most;
  return most;
}
inline float total(F a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }

#include "isa/half.h"

inline F load_bf16(const uint16_t* p) {
  F x;
  FM_EACH x.lane[l] = bf16_to_float(p[l]);
  return x;
}
inline void store_bf16(uint16_t* p, F x) { FM_EACH p[l] = float_to_bf16(x.lane[l]); }
inline F load_f16(const uint16_t* p) {
  F x;
  FM_EACH x.lane[l] = f16_to_float(p[l]);
  return x;
}
inline void store_f16(uint16_t* p, F x) { FM_EACH p[l] = float_to_f16(x.lane[l]); }

// x[i] becomes column i of what the W vectors were rows of.
inline void transpose(F* x) {
  for (int i = 0; i < W; ++i) {
    for (int j = i + 1; j < W; ++j) {
      const float kept = x[i].lane[j];
      x[i].lane[j] = x[j].lane[i];
      x[j].lane[i] = kept;
    }
  }
}
#undef FM_EACH

#include "isa/exp2.h"
