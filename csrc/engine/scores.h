// Blocks of query rows, and what happens to their scores between the two matrix products. Included within a namespace,
// after operands.h. Scores lie as [key][query row], so that a row's maximum and sum need no shuffles.

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LEAST_NORMAL = 1.17549435e-38f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Query rows that are computed together, all on one kv head.
struct Block {
  const Sequence* sequence;
  int64_t batch, kv_head;
  int64_t count;    // rows
  int64_t columns;  // the same, padded to whole vectors
  int64_t head[BLOCK_M], row[BLOCK_M];
  int64_t first_key, end_key;    // what any row sees, by position
  int64_t first_full, end_full;  // what all rows see
};

inline void make_block(const Problem& p, int64_t batch, int64_t kv_head, int64_t index, Block& block) {
  const Sequence& sequence = p.sequences[batch];
  const int64_t queries = sequence.queries;
  block.sequence = &sequence;
  block.batch = batch;
  block.kv_head = kv_head;
  int64_t head = kv_head * p.group, row = 0;
  if (queries >= BLOCK_M) {
    const int64_t per_head = (queries + BLOCK_M - 1) / BLOCK_M;
    head += index / per_head;
    row = index % per_head * BLOCK_M;
    block.count = smaller(queries - row, BLOCK_M);
  } else {
    head += index * BLOCK_M / queries;
    row = index * BLOCK_M % queries;
    block.count = smaller(p.group * queries - index * BLOCK_M, BLOCK_M);
  }
  block.columns = padded(block.count);
  int64_t least = row, most = row;
  for (int64_t c = 0; c < block.count; ++c) {
    block.head[c] = head;
    block.row[c] = row;
    least = smaller(least, row);
    most = larger(most, row);
    if (++row == queries) {
      row = 0;
      ++head;
    }
  }
  const fm_attention& call = *p.call;
  const int64_t keys = sequence.keys, left = call.window_left, right = call.window_right;
  block.first_key = block.first_full = sequence.hidden;
  block.end_key = block.end_full = keys;
  if (left >= 0) {
    block.first_key = larger(block.first_key, least + sequence.ahead - left);
    block.first_full = larger(block.first_full, most + sequence.ahead - left);
  }
  if (right >= 0) {
    block.end_key = smaller(block.end_key, most + sequence.ahead + right + 1);
    block.end_full = smaller(block.end_full, least + sequence.ahead + right + 1);
  }
}

// The rows of a tensor that belong to a block; null for the padding.
inline void rows_of(const Block& block, const fm_tensor& t, int64_t first, const char** rows) {
  for (int64_t c = 0; c < block.count; ++c) rows[c] = row_of(t, block.batch, block.head[c], first + block.row[c]);
  for (int64_t c = block.count; c < block.columns; ++c) rows[c] = nullptr;
}

inline F tanh(F x) {
  // Cephes' tanhf: an odd polynomial about 0, 1 - 2 / (e^2x + 1) beyond.
  const F z = x * x, a = abs(x);
  F p = fma(z, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
  p = fma(z, p, splat(-5.37397155531e-2f));
  p = fma(z, p, splat(1.33314422036e-1f));
  p = fma(z, p, splat(-3.33332819422e-1f));
  const F near = fma(p * z, x, x);
  const F large = select(less(splat(20.0f), a), splat(20.0f), a);  // where tanh is 1
  const F far = splat(1.0f) - splat(2.0f) / (exp2<6>(large * splat(2 * LOG2_E)) + splat(1.0f));
  const F signed_far = select(less(x, splat(0.0f)), splat(0.0f) - far, far);
  return select(less(a, splat(0.625f)), near, signed_far);
}

// What a call does to the scores of one block.
struct Scores {
  const fm_attention& call;
  const Block& block;
  bool is_general;  // more than scale and window: apply then multiplies by the scale, too
  float factor;     // of scores as apply leaves them, to what the softmax sees: the scale, or 1
  float slope[BLOCK_M];
  int64_t stride;
  float* extra;  // [TILE_N][stride]

  Scores(const Problem& p, const Block& b, float* memory) : call(*p.call), block(b), stride(b.columns), extra(memory) {
    const float scale = static_cast<float>(call.scale);
    // A scale that makes 0 of everything would make NaN of hidden scores.
    is_general = call.softcap > 0 || call.alibi_slopes.data || call.bias.data || call.mask.data || !(scale >= LEAST_NORMAL);
    factor = is_general ? 1.0f : scale;
    for (int64_t c = 0; c < stride; ++c) {
      slope[c] = c < block.count && call.alibi_slopes.data
                     ? *reinterpret_cast<const float*>(row_of(call.alibi_slopes, block.batch, block.head[c], 0))
                     : 0.0f;
    }
  }

  // From products to what the softmax sees, for keys first to first + count. `chain`, if given, receives the derivative.
  void apply(int64_t first, int64_t count, float* s, float* chain) const {
    if (is_general) {
      modify(first, count, s, chain);
      if (call.bias.data) add_bias(first, count, s);
      if (call.mask.data) apply_mask(first, count, s);
    }
    if (first < block.first_full || first + count > block.end_full) hide(first, count, s);
  }

  void modify(int64_t first, int64_t count, float* s, float* chain) const {
    const float cap = static_cast<float>(call.softcap);
    const F scale = splat(static_cast<float>(call.scale));
    for (int64_t c = 0; c < stride; c += W) {
      const F slopes = load(slope + c);
      float centre[W];
      for (int l = 0; l < W; ++l) {
        centre[l] = c + l < block.count ? static_cast<float>(block.row[c + l] + block.sequence->ahead - first) : 0.0f;
      }
      const F here = load(centre);
      for (int64_t n = 0; n < count; ++n) {
        float* at = s + n * stride + c;
        F x = load(at) * scale;
        if (cap > 0) {
          const F t = tanh(x / splat(cap));
          x = t * splat(cap);
          if (chain) store(chain + n * stride + c, splat(1.0f) - t * t);
        }
        if (call.alibi_slopes.data) x = x - slopes * abs(here - splat(static_cast<float>(n)));
        store(at, x);
      }
    }
  }

  // The part of a [rows, keys] tensor that belongs to a tile, into extra.
  void fetch(const fm_tensor& t, int64_t first, int64_t count) const {
    const char* rows[BLOCK_M];
    rows_of(block, t, 0, rows);
    for (int64_t c = 0; c < block.count; ++c) rows[c] += first * t.stride[3] * size_of(t.dtype);
    pack_transposed<DotF32>(rows, stride, {t.dtype, t.stride[3], count}, extra, stride);
  }

  void add_bias(int64_t first, int64_t count, float* s) const {
    fetch(call.bias, first, count);
    for (int64_t i = 0; i < count * stride; i += W) store(s + i, load(s + i) + load(extra + i));
  }

  void apply_mask(int64_t first, int64_t count, float* s) const {
    fetch(call.mask, first, count);
    for (int64_t i = 0; i < count * stride; i += W) {
      store(s + i, select(less(splat(0.5f), load(extra + i)), load(s + i), splat(-INFINITE)));
    }
  }

  // -inf where a query does not see a key by position.
  void hide(int64_t first, int64_t count, float* s) const {
    for (int64_t c = 0; c < stride; c += W) {
      float low[W], high[W];
      for (int l = 0; l < W; ++l) {
        const int64_t row = block.row[c + l < block.count ? c + l : 0];
        const int64_t centre = row + block.sequence->ahead - first;
        int64_t least = block.sequence->hidden - first, most = count;
        if (call.window_left >= 0) least = larger(least, centre - call.window_left);
        if (call.window_right >= 0) most = smaller(most, centre + call.window_right);
        low[l] = static_cast<float>(smaller(larger(least, -1), count));
        high[l] = static_cast<float>(smaller(larger(most, -1), count));
      }
      const F least = load(low), most = load(high), none = splat(-INFINITE);
      for (int64_t n = 0; n < count; ++n) {
        const F here = splat(static_cast<float>(n));
        float* at = s + n * stride + c;
        store(at, select(less(here, least), none, select(less(most, here), none, load(at))));
      }
    }
  }

  // Into extra, for each probability: 1 / (1 - p) where dropout keeps it, else 0.
  void draw(int64_t first, int64_t count) const {
    const double p = call.dropout_p;
    const uint32_t threshold = static_cast<uint32_t>(p * 4294967296.0);
    const float kept = static_cast<float>(1.0 / (1.0 - p));
    uint32_t query[BLOCK_M], head[BLOCK_M], words[4][BLOCK_M];
    for (int64_t c = 0; c < stride; ++c) {
      const int64_t at = c < block.count ? c : 0;
      query[c] = static_cast<uint32_t>(block.row[at] + block.sequence->ahead + call.origin_k);
      head[c] = static_cast<uint32_t>(block.head[at] + call.origin_head);
    }
    const uint32_t batch = static_cast<uint32_t>(block.batch + call.origin_batch);
    // Positions are 32-bit words with a sign.
    const uint32_t start = static_cast<uint32_t>(first + call.origin_k);
    for (int64_t n = 0; n < count; ++n) {
      const uint32_t key = start + static_cast<uint32_t>(n);
      if (n == 0 || (key & 3) == 0) philox(static_cast<uint32_t>(static_cast<int32_t>(key) >> 2), query, head, batch, words);
      const uint32_t* word = words[key & 3];
      for (int64_t c = 0; c < stride; ++c) extra[n * stride + c] = word[c] >= threshold ? kept : 0.0f;
    }
  }

  // Philox 4x32-10 (Salmon et al., SC 2011) of counters (key, query, head, batch), for all columns.
  void philox(uint32_t key, const uint32_t* query, const uint32_t* head, uint32_t batch, uint32_t (*words)[BLOCK_M]) const {
    uint32_t *a = words[0], *b = words[1], *c = words[2], *d = words[3];
    for (int64_t i = 0; i < stride; ++i) {
      a[i] = key;
      b[i] = query[i];
      c[i] = head[i];
      d[i] = batch;
    }
    uint32_t key_a = static_cast<uint32_t>(call.seed), key_b = static_cast<uint32_t>(call.seed >> 32);
    for (int round = 0; round < 10; ++round, key_a += 0x9E3779B9u, key_b += 0xBB67AE85u) {
      for (int64_t i = 0; i < stride; ++i) {
        const uint64_t left = uint64_t{0xD2511F53u} * a[i], right = uint64_t{0xCD9E8D57u} * c[i];
        a[i] = static_cast<uint32_t>(right >> 32) ^ b[i] ^ key_a;
        c[i] = static_cast<uint32_t>(left >> 32) ^ d[i] ^ key_b;
        b[i] = static_cast<uint32_t>(right);
        d[i] = static_cast<uint32_t>(left);
      }
    }
  }
};
