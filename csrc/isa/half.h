// Half precision, one number at a time. Included within a namespace.

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// To the nearest, ties to even.
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return float_of(sign | (rest + 0x1c000u) << 13);
  const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
  return float_of(sign | bits_of(value));
}

inline uint16_t float_to_f16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (rest < 0x38800000u) {
    // Below 2^-14: the sum's last bit is worth 2^-24, so that the addition does the rounding.
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13);
}
