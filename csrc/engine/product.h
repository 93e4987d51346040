// Matrix products of small tiles: the inner loop of everything. Included within a namespace, after a vec_*.h.
//
// c[r][v] (+)= sum over depth t of a[r][t] * b[t][v]: a is broadcast from memory, b comes in vectors, and a register tile
// of about ROWS x COLUMNS vectors stays in registers over the whole depth. What one step multiplies is the Dot's matter: one
// float with a vector of floats, or a pair of bf16 with a vector of pairs.

struct DotF32 {
  using Unit = float;             // what is broadcast at one depth
  static constexpr int STEP = 1;  // elements in a unit
  static constexpr int EXP_DEGREE = 6;
  using B = F;
  static B vector(const Unit* p) { return load(p); }
  static B scalar(const Unit* p) { return splat(*p); }
  static F step(F c, B a, B b) { return fma(a, b, c); }
  static B of_bits(F x) { return x; }
  // C vectors over the elements of STEP rows, from `column` on.
  template <int C>
  static void stack(const char* const* rows, int64_t column, B* b) {
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) b[v] = load(reinterpret_cast<const float*>(rows[0]) + column + v * W);
  }
};

// What happens to what c held: it is replaced, added to, or first multiplied by fade[r].
enum Mode { SET, ADD, FADE };

template <class Dot>
struct Product {
  using Unit = typename Dot::Unit;
  const Unit* a;
  int64_t a_row, a_depth;  // strides in units
  const Unit* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  const float* fade;
  int64_t depth;
};

template <class Dot, Mode MODE, int R, int C>
__attribute__((noinline)) void register_tile(const Product<Dot>& p) {
  F sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) sum[r][v] = splat(0.0f);
  }
  const auto* a = p.a;
  const auto* b = p.b;
  const int64_t a_row = p.a_row, a_depth = p.a_depth, b_depth = p.b_depth;
  for (int64_t t = p.depth; t > 0; --t, a += a_depth, b += b_depth) {
    typename Dot::B b_v[C];
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) b_v[v] = Dot::vector(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto a_r = Dot::scalar(a + r * a_row);
#pragma GCC unroll 16
      for (int v = 0; v < C; ++v) sum[r][v] = Dot::step(sum[r][v], a_r, b_v[v]);
    }
  }
  float* c = p.c;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += p.c_row) {
    F fade;
    if constexpr (MODE == FADE) fade = splat(p.fade[r]);
#pragma GCC unroll 16
    for (int v = 0; v < C; ++v) {
      if constexpr (MODE == ADD) sum[r][v] = sum[r][v] + load(c + v * W);
      if constexpr (MODE == FADE) sum[r][v] = fma(fade, load(c + v * W), sum[r][v]);
      store(c + v * W, sum[r][v]);
    }
  }
}

// Rows of a register tile of C vectors: as many accumulators as fit, and enough to hide an addition's latency.
constexpr int tile_rows(int C) { return ROWS * COLUMNS / C < 16 ? ROWS * COLUMNS / C : 16; }

template <class Dot, Mode MODE, int R, int C>
inline int64_t whole_tiles(Product<Dot>& p, int64_t rows) {
  for (; rows >= R; rows -= R) {
    register_tile<Dot, MODE, R, C>(p);
    p.a += R * p.a_row;
    p.c += R * p.c_row;
    p.fade += R;
  }
  return rows;
}

template <class Dot, Mode MODE, int C>
inline void column_panel(Product<Dot> p, int64_t rows) {
  rows = whole_tiles<Dot, MODE, tile_rows(C), C>(p, rows);
  if constexpr (tile_rows(C) > 4) rows = whole_tiles<Dot, MODE, 4, C>(p, rows);
  rows = whole_tiles<Dot, MODE, 2, C>(p, rows);
  whole_tiles<Dot, MODE, 1, C>(p, rows);
}

template <class Dot, Mode MODE, int C = COLUMNS>
inline void last_panel(const Product<Dot>& p, int64_t rows, int64_t vectors) {
  if constexpr (C > 0) {
    if (vectors == C) {
      column_panel<Dot, MODE, C>(p, rows);
    } else {
      last_panel<Dot, MODE, C - 1>(p, rows, vectors);
    }
  }
}

// c [rows][columns], columns a multiple of W.
template <class Dot, Mode MODE>
inline void multiply(Product<Dot> p, int64_t rows, int64_t columns) {
  for (int64_t vectors = columns / W; vectors > 0; vectors -= COLUMNS) {
    last_panel<Dot, MODE>(p, rows, vectors < COLUMNS ? vectors : COLUMNS);
    p.b += COLUMNS * W;
    p.c += COLUMNS * W;
  }
}
