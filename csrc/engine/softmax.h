// The running softmax of a block of query rows. Included within a namespace, after scores.h.
//
// Per row: the maximum score so far, the sum of exp(factor (s - maximum)), and the weighted values; all three are rescaled
// when a tile of keys raises the maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

struct Running {
  float* top;   // [columns] maximum
  float* sum;   // [columns]
  float* fade;  // [columns] what the last tile made of earlier sums
  float* out;   // [columns][dim_v, padded]

  static Running take(Parts& parts, int64_t columns, int64_t padded_dim) {
    Running r;
    r.top = parts.take<float>(columns);
    r.sum = parts.take<float>(columns);
    r.fade = parts.take<float>(columns + 16);
    r.out = parts.take<float>(columns * padded_dim);
    return r;
  }

  void start(int64_t columns) const {
    for (int64_t c = 0; c < columns; ++c) {
      top[c] = -INFINITE;
      sum[c] = 0;
    }
  }
};

// Scores s [count][stride] become probabilities, less the factor that `running` keeps: in place, or in pairs of keys.
template <class Dot>
inline void soften(float* s, int64_t count, int64_t stride, float scale, const Running& running, float* pairs) {
  const F factor = splat(scale * LOG2_E);
  for (int64_t c = 0; c < stride; c += W) {
    float* column = s + c;
    F high[4] = {splat(-INFINITE), splat(-INFINITE), splat(-INFINITE), splat(-INFINITE)};
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
      for (int64_t i = 0; i < 4; ++i) high[i] = max(load(column + (n + i) * stride), high[i]);
    }
    for (; n < count; ++n) high[0] = max(load(column + n * stride), high[0]);
    const F old = load(running.top + c);
    const F now = max(max(max(high[0], high[1]), max(high[2], high[3])), old);
    // While a row has seen no key its maximum is -inf; 0 in its place keeps -inf - -inf from being NaN.
    const F shift = select(less(splat(-INFINITE), now), now, splat(0.0f));
    const F fade = exp2<6>((old - shift) * factor);
    // Several sums, which rounds less than one.
    F total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    const auto soft = [&](int64_t row, F& sum) {
      // The difference first: rounded products of large scores would differ by more than exp can take.
      const F p = exp2<Dot::EXP_DEGREE>((load(column + row * stride) - shift) * factor);
      sum = sum + p;
      return p;
    };
    for (n = 0; n + 4 <= count; n += 4) {
      F p[4];
      for (int64_t i = 0; i < 4; ++i) p[i] = soft(n + i, total[i]);
      if constexpr (Dot::STEP == 1) {
        for (int64_t i = 0; i < 4; ++i) store(column + (n + i) * stride, p[i]);
      } else {
        store(pairs + n / 2 * stride + c, Dot::pair(p[0], p[1]));
        store(pairs + (n / 2 + 1) * stride + c, Dot::pair(p[2], p[3]));
      }
    }
    for (; n < count; n += Dot::STEP) {
      const F p = soft(n, total[0]);
      if constexpr (Dot::STEP == 1) {
        store(column + n * stride, p);
      } else {
        const F next = n + 1 < count ? soft(n + 1, total[1]) : splat(0.0f);
        store(pairs + n / 2 * stride + c, Dot::pair(p, next));
      }
    }
    const F sum = (total[0] + total[1]) + (total[2] + total[3]);
    store(running.top + c, now);
    store(running.fade + c, fade);
    store(running.sum + c, fma(load(running.sum + c), fade, sum));
  }
}

// soften for scores [row][stride] of few rows, in place or rounded to bf16 along rows; 0 from count to the next vector.
template <class Dot>
inline void soften_rows(float* s, int64_t rows, int64_t count, int64_t stride, float scale, const Running& running, uint16_t* halves) {
  const F factor = splat(scale * LOG2_E), none = splat(-INFINITE);
  float lanes[W];
  for (int l = 0; l < W; ++l) lanes[l] = static_cast<float>(l);
  const F lane = load(lanes);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * stride;
    F high = none;
    for (int64_t n = 0; n < count; n += W) {
      F x = load(row + n);
      if (count - n < W) {
        x = select(less(lane, splat(static_cast<float>(count - n))), x, none);
        store(row + n, x);
      }
      high = max(x, high);
    }
    const float old = running.top[r], most = largest(high), now = most > old ? most : old;
    const float shift = now == -INFINITE ? 0.0f : now;
    const F shifts = splat(shift);
    F sum = splat(0.0f);
    for (int64_t n = 0; n < count; n += W) {
      const F p = exp2<Dot::EXP_DEGREE>((load(row + n) - shifts) * factor);
      sum = sum + p;
      if constexpr (Dot::STEP == 1) {
        store(row + n, p);
      } else {
        store_bf16(halves + r * stride + n, p);
      }
    }
    running.top[r] = now;
    running.fade[r] = __builtin_exp2f((old - shift) * scale * LOG2_E);
    running.sum[r] = running.sum[r] * running.fade[r] + total(sum);
  }
}

// Dropout on what soften left: factors [count][stride].
template <class Dot>
inline void drop(float* s, float* pairs, int64_t count, int64_t stride, const float* factors) {
  if constexpr (Dot::STEP == 1) {
    for (int64_t i = 0; i < count * stride; i += W) store(s + i, load(s + i) * load(factors + i));
  } else {
    for (int64_t n = 0; n < count; n += 2) {
      for (int64_t c = 0; c < stride; c += W) {
        float* at = pairs + n / 2 * stride + c;
        const F second = n + 1 < count ? load(factors + (n + 1) * stride + c) : splat(0.0f);
        store(at, Dot::multiply(load(at), load(factors + n * stride + c), second));
      }
    }
  }
}

// The block's rows of out and lse.
inline void finish(const fm_attention& call, const Block& block, const Running& running, int64_t padded_dim, float factor) {
  const char* rows[BLOCK_M];
  if (call.dim_v > 0) rows_of(block, call.out, block.sequence->first_q, rows);
  for (int64_t c = 0; c < block.count; ++c) {
    const bool is_empty = running.sum[c] == 0;
    float whole = running.sum[c];
    if (call.sinks.data && !is_empty) {
      const float sink = *reinterpret_cast<const float*>(row_of(call.sinks, 0, block.head[c], 0));
      whole += __builtin_expf(sink - running.top[c] * factor);
    }
    float* out = running.out + c * padded_dim;
    if (is_empty) {  // what stands there may be anything
      for (int64_t d = 0; d < padded_dim; ++d) out[d] = 0;
    }
    if (call.dim_v > 0) {
      write_row(const_cast<char*>(rows[c]), {call.out.dtype, call.out.stride[3], call.dim_v}, out, is_empty ? 0.0f : 1.0f / whole);
    }
    if (call.lse.data) {
      const char* at = row_of(call.lse, block.batch, block.head[c], block.sequence->first_q + block.row[c]);
      *reinterpret_cast<float*>(const_cast<char*>(at)) =
          is_empty ? -INFINITE : running.top[c] * factor + __builtin_logf(running.sum[c]);
    }
  }
}
