// Products of a few rows with many that are read once, where they lie. Included within a namespace, after scores.h.
//
// Packing is worth its time for rows that meet many others (product.h). Here a vector holds several of the few rows, SPAN
// units of each, and meets SPAN units of one of the many, repeated: only sums are transposed.

// Rows of which one after the other is asked for while others are read, so that memory never waits. Null rows, or none.
struct Upcoming {
  const char* const* rows = nullptr;
  int64_t bytes = 0;  // of each,
  int64_t first = 0;  // from this one on

  void ask_for(int64_t row) const {
    if (!rows || !rows[row]) return;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(rows[row] + first + byte, 0, 3);
  }
};

// Units that share a vector for each of `rows` rows, so that no whole row is left out and `depth` is a multiple.
inline int span_of(int64_t rows, int64_t depth) {
  int span = W;
  while (span > 1 && (span * rows > W || depth % span != 0)) span /= 2;
  return span;
}

// a [row][unit] into to[vector of rows][unit / span][row * span + unit % span], 0 after the last row.
template <class Dot>
inline void spread(const typename Dot::Unit* a, int64_t rows, int64_t depth, int span, typename Dot::Unit* to) {
  for (int64_t r = 0; r < padded(rows * span) / span; ++r) {
    typename Dot::Unit* vectors = to + r * span / W * depth * (W / span) + r * span % W;
    for (int64_t u = 0; u < depth; ++u) vectors[u / span * W + u % span] = r < rows ? a[r * depth + u] : 0;
  }
}

// sum[g][n] of COUNT rows, lane by lane: over the steps, vector g of a times SPAN units of row n, repeated. Sums of 32
// steps are added up, which rounds less than one long sum.
template <class Dot, int SPAN, int GROUPS, int COUNT>
inline void meet(const typename Dot::Unit* a, const char* const* rows, int64_t depth, F (*sum)[W], int first) {
  const float* row[COUNT];
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n) {
    row[n] = reinterpret_cast<const float*>(rows[first + n]);
    for (int g = 0; g < GROUPS; ++g) sum[g][first + n] = splat(0.0f);
  }
  const int64_t group = depth * (W / SPAN);
  for (int64_t u = 0, end; u < depth; u = end) {
    end = smaller(depth, u + 32 * SPAN);
    F own[GROUPS][COUNT];
#pragma GCC unroll 16
    for (int n = 0; n < COUNT; ++n) {
#pragma GCC unroll 16
      for (int g = 0; g < GROUPS; ++g) own[g][n] = splat(0.0f);
    }
    for (int64_t at = u; at < end; at += SPAN, a += W) {
      typename Dot::B vector[GROUPS];
#pragma GCC unroll 16
      for (int g = 0; g < GROUPS; ++g) vector[g] = Dot::vector(a + g * group);
#pragma GCC unroll 16
      for (int n = 0; n < COUNT; ++n) {
        const typename Dot::B units = Dot::of_bits(repeat<SPAN>(row[n] + at));
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) own[g][n] = Dot::step(own[g][n], vector[g], units);
      }
    }
#pragma GCC unroll 16
    for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 16
      for (int n = 0; n < COUNT; ++n) sum[g][first + n] = sum[g][first + n] + own[g][n];
    }
  }
}

// c[row][n] of W rows of the many and GROUPS vectors of the few.
template <class Dot, int SPAN, int GROUPS>
inline void one_square(const typename Dot::Unit* a, int64_t a_rows, const char* const* rows, int64_t depth, float* c,
                       int64_t columns) {
  constexpr int FIT = (ROWS * COLUMNS < 16 ? 8 : 16) / GROUPS, COUNT = FIT < W ? FIT : W, EACH = W / SPAN;
  F sum[GROUPS][W];
  for (int n = 0; n < W; n += COUNT) meet<Dot, SPAN, GROUPS, COUNT>(a, rows, depth, sum, n);
  for (int g = 0; g < GROUPS; ++g) {
    transpose(sum[g]);
    for (int r = 0; r < EACH && g * EACH + r < a_rows; ++r) {
      F all = sum[g][r * SPAN];
#pragma GCC unroll 16
      for (int e = 1; e < SPAN; ++e) all = all + sum[g][r * SPAN + e];
      store(c + (g * EACH + r) * columns, all);
    }
  }
}

// c[row][n] = a[row] . rows[n]; a is spread, count a multiple of W, and c's rows are `columns` apart.
template <class Dot, int SPAN>
__attribute__((noinline)) void few_products(const typename Dot::Unit* a, int64_t a_rows, const char* const* rows, int64_t count,
                                            int64_t depth, float* c, int64_t columns, const Upcoming& upcoming) {
  constexpr int EACH = W / SPAN;
  for (int64_t n = 0; n < count; n += W) {
    for (int i = 0; i < W; ++i) upcoming.ask_for(n + i);
    int64_t r = 0;
    for (; a_rows - r > EACH; r += 2 * EACH) {
      one_square<Dot, SPAN, 2>(a + r * depth, a_rows - r, rows + n, depth, c + r * columns + n, columns);
    }
    if (r < a_rows) one_square<Dot, SPAN, 1>(a + r * depth, a_rows - r, rows + n, depth, c + r * columns + n, columns);
  }
}

template <class Dot, int SPAN = W>
inline void multiply_few(int span, const typename Dot::Unit* a, int64_t a_rows, const char* const* rows, int64_t count,
                         int64_t depth, float* c, int64_t columns, const Upcoming& upcoming) {
  if constexpr (SPAN > 1) {
    if (span < SPAN) return multiply_few<Dot, SPAN / 2>(span, a, a_rows, rows, count, depth, c, columns, upcoming);
  }
  few_products<Dot, SPAN>(a, a_rows, rows, count, depth, c, columns, upcoming);
}

// out[r] = sum over n of weights[r][n] values[n], added to fade[r] * out[r] or alone.
template <class Dot>
struct Weighted {
  using Unit = typename Dot::Unit;
  const Unit* weights;
  int64_t row, depth;         // strides of weights, in units
  const char* const* values;  // rows that lie in units' elements, a multiple of STEP of them
  int64_t units;              // rows / STEP
  float* out;
  int64_t out_row;
  const float* fade;
  Upcoming upcoming;  // of which each step asks for some bytes of a row
};

template <class Dot, Mode MODE, int R, int C>
__attribute__((noinline)) void weighted_tile(const Weighted<Dot>& p, int64_t column) {
  F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) sum[r][v] = splat(0.0f);
  }
  const auto* weight = p.weights;
  const char* const* values = p.values;
  const int64_t row = p.row, depth = p.depth;
  for (int64_t t = 0; t < p.units; ++t, weight += depth, values += Dot::STEP) {
    for (int i = 0; i < Dot::STEP; ++i) p.upcoming.ask_for(t * Dot::STEP + i);
    typename Dot::B b[C];
    Dot::template stack<C>(values, column, b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto a = Dot::scalar(weight + r * row);
#pragma GCC unroll 16
      for (int v = 0; v < C; ++v) sum[r][v] = Dot::step(sum[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* out = p.out + r * p.out_row + column;
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) {
      if constexpr (MODE == FADE) sum[r][v] = fma(splat(p.fade[r]), load(out + v * W), sum[r][v]);
      store(out + v * W, sum[r][v]);
    }
  }
}

// Vectors of a register tile of so many rows; two hold pairs of bf16 from one.
constexpr int columns_for(int rows) {
  int columns = 8;
  while (columns > 2 && columns * rows > ROWS * COLUMNS) columns /= 2;
  return columns;
}

template <class Dot, Mode MODE, int R, int C = columns_for(R)>
inline void weighted_panels(Weighted<Dot> p, int64_t column, int64_t columns) {
  const Upcoming all = p.upcoming;
  const int64_t lines = (all.bytes + 63) / 64;
  for (; column + C * W <= columns; column += C * W) {
    // Each panel asks for its share of the bytes.
    const int64_t begin = column * lines / columns * 64, end = (column + C * W) * lines / columns * 64;
    p.upcoming = {all.rows, end - begin, begin};
    weighted_tile<Dot, MODE, R, C>(p, column);
  }
  p.upcoming = all;
  if constexpr (C > Dot::STEP) {
    if (column < columns) weighted_panels<Dot, MODE, R, C / 2>(p, column, columns);
  }
}

// `rows` rows of `columns` elements, a multiple of W * STEP.
template <class Dot, Mode MODE, int R = ROWS * COLUMNS < 16 ? 4 : 8>
inline void weigh_few(Weighted<Dot> p, int64_t rows, int64_t columns) {
  for (; rows >= R; rows -= R) {
    weighted_panels<Dot, MODE, R>(p, 0, columns);
    p.weights += R * p.row;
    p.out += R * p.out_row;
    p.fade += R;
    p.upcoming = {};
  }
  if constexpr (R > 1) {
    if (rows > 0) weigh_few<Dot, MODE, R / 2>(p, rows, columns);
  }
}
