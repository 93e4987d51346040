// Polynomials for 2^f, relative errors (minimax, p(0) = 1): degree 5 9e-8, degree 6 2e-9. Included within a namespace.

// f in [-1/2, 1/2]
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

// f in [0, 1)
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
