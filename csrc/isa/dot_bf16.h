// Products of pairs of bf16 (AVX-512 BF16), summed in fp32. Included within a namespace, after product.h.

struct DotBf16 {
  using Unit = uint32_t;  // a pair, the first element low
  static constexpr int STEP = 2;
  static constexpr int EXP_DEGREE = 5;
  using B = __m512bh;
  static B vector(const Unit* p) { return reinterpret_cast<B>(_mm512_loadu_si512(p)); }
  static B scalar(const Unit* p) {
    int32_t pair;  // perhaps not aligned
    __builtin_memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<B>(_mm512_set1_epi32(pair));
  }
  static F step(F c, B a, B b) { return {_mm512_dpbf16_ps(c.v, a, b)}; }
  static B of_bits(F x) { return reinterpret_cast<B>(x.v); }
  template <int C>
  static void stack(const char* const* rows, int64_t column, B* b) {
    static_assert(C % 2 == 0, "a vector of bf16 becomes two of pairs");
#pragma GCC unroll 16
    for (int v = 0; v < C; v += 2) interleave(rows[0] + 2 * (column + v * W), rows[1] + 2 * (column + v * W), b[v], b[v + 1]);
  }

  // The first 2 W elements of two rows side by side.
  static void interleave(const char* first, const char* second, B& low, B& high) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i order = _mm512_load_si512(LOW), a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    low = reinterpret_cast<B>(_mm512_permutex2var_epi16(a, order, b));
    high = reinterpret_cast<B>(_mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b));
  }

  // first[l] low and second[l] high, rounded; as the bits of floats.
  static F pair(F first, F second) {
    const __m512i low = _mm512_cvtepu16_epi32(to_bf16(first)), high = _mm512_cvtepu16_epi32(to_bf16(second));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }

  // Two rows of bf16 side by side as far as whole vectors go, if they lie so; returns how many elements that were.
  static int64_t pair_rows(const char* first, const char* second, const Elements& e, float* to) {
    if (e.stride != 1 || !first || !second) return 0;
    int64_t d = 0;
    for (; d + 2 * W <= e.count; d += 2 * W) {
      B low, high;
      interleave(first + 2 * d, second + 2 * d, low, high);
      _mm512_storeu_si512(to + d, reinterpret_cast<__m512i>(low));
      _mm512_storeu_si512(to + d + W, reinterpret_cast<__m512i>(high));
    }
    return d;
  }

  // Each element of pairs times its factor, rounded.
  static F multiply(F pairs, F first, F second) {
    const __m512i bits = _mm512_castps_si512(pairs.v);
    const F low{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    const F high{_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
    return pair(low * first, high * second);
  }
};
