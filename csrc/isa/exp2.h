// 2^x for vectors that have round and scale_by_power. Included within a namespace.

// 2^f by polynomials (minimax, p(0) = 1), relative errors: degree 5 9e-8, degree 6 2e-9. f in [-1/2, 1/2].
template <int DEGREE>
inline F power_about_zero(F f) {
  if constexpr (DEGREE == 5) {
    F p = fma(f, splat(0.001326472731307149f), splat(0.009671512991189957f));
    p = fma(f, p, splat(0.05550733581185341f));
    p = fma(f, p, splat(0.24022242426872253f));
    p = fma(f, p, splat(0.6931470036506653f));
    return fma(f, p, splat(1.0f));
  } else {
    static_assert(DEGREE == 6, "known degrees");
    F p = fma(f, splat(0.00015353361959569156f), splat(0.0013398875016719103f));
    p = fma(f, p, splat(0.00961843691766262f));
    p = fma(f, p, splat(0.055503323674201965f));
    p = fma(f, p, splat(0.24022647738456726f));
    p = fma(f, p, splat(0.6931471824645996f));
    return fma(f, p, splat(1.0f));
  }
}

// 2^x, 0 below 2^-126
template <int DEGREE>
inline F exp2(F x) {
  const F clamped = max(splat(-200.0f), x), whole = round(clamped);
  return scale_by_power(power_about_zero<DEGREE>(clamped - whole), whole);
}
