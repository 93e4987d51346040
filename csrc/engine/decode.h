// Attention of a few new queries over a cache. Included within a namespace, after softmax.h and few_rows.h.
//
// A task is a block of query rows of one kv head, of all query heads on it where queries are few, against one of the splits
// of the keys: how many there are depends on the sizes alone. Each keeps its own maximum, sum and output; they are merged in
// order.

template <class Dot>
struct Decode {
  using Unit = typename Dot::Unit;
  const Problem& p;
  const fm_attention& call;
  const fm_cache& cache;
  int64_t tile;        // keys at once
  int64_t padded_dim;  // dim_v in whole vectors
  int64_t splits, split_keys;
  bool keys_in_place, values_in_place;
  Parts shape;
  float* partial;  // [task][top, sum, out]
  char* memory;

  struct Memory {
    Unit *rows;      // [row][unit]
    Unit *spread;    // those as few_rows.h takes them
    char *keys;      // [tile][unit], copies of what cannot be read where it is
    char *values;    // [tile][element]
    char *zeros;     // a row of values
    float *products; // [row][TILE_N]
    float *s, *pairs, *extra;
    Running running;
  };

  Decode(const Problem& problem, const fm_cache& c)
      : p(problem), call(*problem.call), cache(c), partial(nullptr), memory(nullptr) {
    padded_dim = (call.dim_v + Dot::STEP * W - 1) / (Dot::STEP * W) * Dot::STEP * W;
    keys_in_place = rows_in_place<Dot>(call.k, call.dim);
    values_in_place = rows_in_place<Dot>(call.v, call.dim_v) && call.dim_v == padded_dim;
    tile = keys_in_place && values_in_place ? TILE_N : 32;  // small copies stay in the nearest cache
    const int64_t tasks = larger(1, p.blocks * call.kv_heads), tiles = larger(1, (call.seq_k + tile - 1) / tile);
    splits = larger(1, smaller(64 / tasks, tiles * tile / 384));
    split_keys = (tiles + splits - 1) / splits * tile;
    worker_memory(shape);
  }

  Memory worker_memory(Parts& parts) const {
    Memory m;
    m.rows = parts.take<Unit>(units<Dot>(call.dim) * BLOCK_M);
    m.spread = parts.take<Unit>(units<Dot>(call.dim) * (BLOCK_M + W));
    m.keys = parts.take<char>(keys_in_place ? 0 : tile * key_bytes());
    m.values = parts.take<char>(values_in_place ? 0 : tile * value_bytes());
    m.zeros = parts.take<char>(value_bytes());
    m.products = parts.take<float>(BLOCK_M * TILE_N);
    m.s = parts.take<float>(TILE_N * BLOCK_M);
    m.pairs = parts.take<float>(Dot::STEP == 2 ? TILE_N / 2 * BLOCK_M : 0);
    m.extra = parts.take<float>(TILE_N * BLOCK_M);
    m.running = Running::take(parts, BLOCK_M, padded_dim);
    return m;
  }

  int64_t key_bytes() const { return units<Dot>(call.dim) * static_cast<int64_t>(sizeof(Unit)); }
  int64_t value_bytes() const { return padded_dim / Dot::STEP * static_cast<int64_t>(sizeof(Unit)); }
  int64_t partial_size() const { return BLOCK_M * (2 + padded_dim); }

  // Where key `slot` of a sequence lies, and how many follow it at the tensor's stride, at most `count`.
  const char* find(const fm_tensor& t, int64_t batch, int64_t kv_head, int64_t slot, int64_t& count) const {
    if (!cache.block_table.data) return row_of(t, batch, kv_head, slot);
    const int64_t page = number(cache.block_table, batch, slot / cache.page);
    count = smaller(count, cache.page - slot % cache.page);
    return row_of(t, page < 0 ? 0 : page < cache.pages ? page : cache.pages - 1, kv_head, slot % cache.page);
  }

  // Whether the table leads a slot to a page that the cache has. What is read elsewhere is hidden, or is of a page at the
  // cache's ends; but nothing may be written there.
  bool exists(int64_t batch, int64_t slot) const {
    if (!cache.block_table.data) return true;
    const int64_t page = number(cache.block_table, batch, slot / cache.page);
    return page >= 0 && page < cache.pages;
  }

  void append(int64_t batch) const {
    const int64_t length = number(cache.cache_lens, batch);
    if (length < -cache.added || length >= call.seq_k) return;
    for (int64_t i = 0; i < cache.added; ++i) {
      const int64_t slot = length + i;
      if (slot < 0 || slot >= call.seq_k || !exists(batch, slot)) continue;
      for (int64_t h = 0; h < call.kv_heads; ++h) {
        copy(call.k, cache.k_new, batch, h, i, slot, call.dim);
        if (cache.v_new.data) copy(call.v, cache.v_new, batch, h, i, slot, call.dim_v);
      }
    }
  }

  void copy(const fm_tensor& to, const fm_tensor& from, int64_t batch, int64_t head, int64_t i, int64_t slot, int64_t dim) const {
    int64_t one = 1;
    char* target = const_cast<char*>(find(to, batch, head, slot, one));
    const char* source = row_of(from, batch, head, i);
    const int64_t size = size_of(to.dtype);
    for (int64_t d = 0; d < dim; ++d) {
      __builtin_memcpy(target + d * to.stride[3] * size, source + d * from.stride[3] * size, static_cast<size_t>(size));
    }
  }

  // A tile of the cache: its rows, null beyond the last one.
  struct Tile {
    const char* rows[TILE_N];
    int64_t bytes;
  };

  // Makes a tile's rows readable as units: they stay where they are, or are copied.
  static void fetch(Tile& tile, int64_t count, const Elements& e, bool is_in_place, char* copies, int64_t bytes) {
    if (is_in_place) return;
    pack_rows<Dot>(tile.rows, count, e, copies, bytes / static_cast<int64_t>(sizeof(Unit)));
    for (int64_t n = 0; n < count; ++n) tile.rows[n] = copies + n * bytes;
  }

  void look_up(const fm_tensor& t, int64_t dim, const Block& block, int64_t first, int64_t count, Tile& tile) const {
    const int64_t size = size_of(t.dtype);
    for (int64_t n = 0, run; n < count; n += run) {
      run = count - n;
      const char* at = find(t, block.batch, block.kv_head, first + n, run);
      for (int64_t i = 0; i < run; ++i) tile.rows[n + i] = at + i * t.stride[2] * size;
    }
    for (int64_t n = larger(count, 0); n < TILE_N; ++n) tile.rows[n] = nullptr;
    tile.bytes = t.stride[3] == 1 ? dim * size : 0;
  }

  // Scores of `count` keys with the block's rows, and something in place of keys to the next vector.
  void score(const Memory& m, const Block& block, Tile& keys, int64_t count, int span, const Tile& upcoming) const {
    fetch(keys, count, {call.k.dtype, call.k.stride[3], call.dim}, keys_in_place, m.keys, key_bytes());
    for (int64_t n = count; n < padded(count); ++n) keys.rows[n] = keys.rows[count - 1];
    multiply_few<Dot>(span, m.spread, block.count, keys.rows, padded(count), units<Dot>(call.dim), m.products, TILE_N,
                      {upcoming.rows, upcoming.bytes});
  }

  // The scores as [key][row], as scores.h has them.
  void turn(const Memory& m, const Block& block, int64_t count) const {
    for (int64_t c = 0; c < block.columns; c += W) {
      for (int64_t n = 0; n < count; n += W) {
        F x[W];
        for (int64_t i = 0; i < W; ++i) x[i] = c + i < block.count ? load(m.products + (c + i) * TILE_N + n) : splat(0.0f);
        transpose(x);
        for (int64_t i = 0; i < W; ++i) store(m.s + (n + i) * block.columns + c, x[i]);
      }
    }
  }

  // running.out = fade * running.out + probabilities * values of `count` keys
  void weigh(const Memory& m, const Block& block, Tile& values, int64_t count, bool is_first, bool is_turned,
             const Tile& upcoming) const {
    fetch(values, count, {call.v.dtype, call.v.stride[3], call.dim_v}, values_in_place, m.values, value_bytes());
    if (count % Dot::STEP != 0) values.rows[count] = m.zeros;  // a pair's second key
    // [key][row] if turned, else [row][key]; bf16 in pairs of keys either way.
    const float* found = Dot::STEP == 2 ? m.pairs : is_turned ? m.s : m.products;
    const int64_t row = is_turned ? 1 : TILE_N / Dot::STEP, depth = is_turned ? block.columns : 1;
    const Weighted<Dot> weighted{reinterpret_cast<const Unit*>(found), row, depth, values.rows, units<Dot>(count),
                                 m.running.out, padded_dim, m.running.fade, {upcoming.rows, upcoming.bytes}};
    if (is_first) {
      weigh_few<Dot, SET>(weighted, block.count, padded_dim);
    } else {
      weigh_few<Dot, FADE>(weighted, block.count, padded_dim);
    }
  }

  void attend(const Memory& m, const Place& at, int64_t split, int64_t task) const {
    Block block;
    make_block(p, at.batch, at.kv_head, at.part, block);
    const char* rows[BLOCK_M];
    rows_of(block, call.q, 0, rows);
    pack_rows<Dot>(rows, block.count, {call.q.dtype, call.q.stride[3], call.dim}, m.rows, units<Dot>(call.dim));
    const int span = span_of(block.count, units<Dot>(call.dim));
    spread<Dot>(m.rows, block.count, units<Dot>(call.dim), span, m.spread);
    const Scores scores(p, block, m.extra);
    Running running = m.running;
    if (splits > 1) {
      running.top = partial + task * partial_size();
      running.sum = running.top + BLOCK_M;
      running.out = running.sum + BLOCK_M;
    }
    running.start(block.columns);
    __builtin_memset(m.zeros, 0, static_cast<size_t>(value_bytes()));
    if (!values_in_place) __builtin_memset(m.values, 0, static_cast<size_t>(tile * value_bytes()));
    Memory own = m;
    own.running = running;
    const int64_t begin = larger(block.first_key, split * split_keys), end = smaller(block.end_key, (split + 1) * split_keys);
    Tile keys, values;
    look_up(call.k, call.dim, block, begin, smaller(tile, end - begin), keys);
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t count = smaller(tile, end - first), next = first + tile;
      look_up(call.v, call.dim_v, block, first, count, values);
      score(own, block, keys, count, span, values);
      const bool is_turned = scores.is_general || first < block.first_full || first + count > block.end_full;
      if (is_turned) {
        turn(m, block, count);
        scores.apply(first, count, m.s, nullptr);
        soften<Dot>(m.s, count, block.columns, scores.factor, running, m.pairs);
      } else {
        soften_rows<Dot>(m.products, block.count, count, TILE_N, scores.factor, running, reinterpret_cast<uint16_t*>(m.pairs));
      }
      look_up(call.k, call.dim, block, next, smaller(tile, end - next), keys);
      weigh(own, block, values, count, first == begin, is_turned, keys);
    }
    if (splits == 1) finish(call, block, running, padded_dim, scores.factor);
  }

  void merge(const Memory& m, const Place& at, int64_t task) const {
    Block block;
    make_block(p, at.batch, at.kv_head, at.part, block);
    const Running& all = m.running;
    const float scale = Scores(p, block, m.extra).factor, factor = scale * LOG2_E;
    all.start(block.columns);
    for (int64_t i = 0; i < block.columns * padded_dim; i += W) store(all.out + i, splat(0.0f));
    for (int64_t split = 0; split < splits; ++split) {
      const float* top = partial + (task * splits + split) * partial_size();
      const float *sum = top + BLOCK_M, *out = sum + BLOCK_M;
      for (int64_t c = 0; c < block.count; ++c) {
        if (sum[c] == 0) continue;
        const float now = top[c] > all.top[c] ? top[c] : all.top[c];
        const float fade = __builtin_exp2f((all.top[c] - now) * factor), share = __builtin_exp2f((top[c] - now) * factor);
        all.sum[c] = all.sum[c] * fade + sum[c] * share;
        all.top[c] = now;
        float* to = all.out + c * padded_dim;
        const float* from = out + c * padded_dim;
        for (int64_t d = 0; d < padded_dim; d += W) {
          store(to + d, fma(load(to + d), splat(fade), load(from + d) * splat(share)));
        }
      }
    }
    finish(call, block, all, padded_dim, scale);
  }

  Memory memory_of(int worker) const {
    Parts parts{memory + worker * shape.used};
    return worker_memory(parts);
  }

  Place place_of(int64_t task) const {
    return place(p, task, [this](const Sequence& s) { return blocks_of(s.queries, p.group); });
  }

  static const Decode& self(const void* context) { return *static_cast<const Decode*>(context); }
  static void append_task(const void* context, int, int64_t task) noexcept { self(context).append(task); }
  static void attend_task(const void* context, int worker, int64_t task) noexcept {
    const Decode& d = self(context);
    d.attend(d.memory_of(worker), d.place_of(task / d.splits), task % d.splits, task);
  }
  static void merge_task(const void* context, int worker, int64_t task) noexcept {
    const Decode& d = self(context);
    d.merge(d.memory_of(worker), d.place_of(task), task);
  }

  void run() {
    const int64_t blocks = p.blocks * call.kv_heads, tasks = blocks * splits;
    const int workers = worker_count(call.threads, larger(tasks, call.batch));
    Parts whole;
    const auto lay_out = [&] {
      whole.used = 0;
      partial = whole.take<float>(splits > 1 ? tasks * partial_size() : 0);
      memory = whole.take<char>(workers * shape.used);
    };
    lay_out();
    const Scratch scratch(whole.used);
    whole.data = scratch.data();
    lay_out();
    if (cache.k_new.data) parallel_for(call.batch < 8 ? 1 : workers, call.batch, append_task, this);
    parallel_for(workers, tasks, attend_task, this);
    if (splits > 1) parallel_for(workers, blocks, merge_task, this);
  }
};
