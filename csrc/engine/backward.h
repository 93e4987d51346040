// Attention backward. Included within a namespace, after forward.h.
//
//   p = exp(s - lse);  dv = share p^T do;  dp = do v^T;  ds = p (share dp - delta);  dq = scale ds k;  dk = scale ds^T q
//   delta = share sum(do out) - dlse;  share = exp(lse - lse'), lse' the one whose denominator the sink joined; else 1
//
// A task is a kv head of a sequence, or a part of its query blocks. It walks over tiles of keys; the gradients of a tile
// stay in the cache while all query blocks pass, and those of the queries are summed in fp32. Where heads are few, the
// blocks of one are split into parts whose shares of dk and dv are added up afterwards, in order: how many depends on the
// sizes alone, so that the same call gives the same bits whatever the threads.

template <class Dot>
struct Backward {
  using Unit = typename Dot::Unit;
  const Problem& p;
  const fm_attention& call;
  const fm_gradients& g;
  Keys<Dot> keys, values, stacked_keys;
  int64_t dim_p, dim_vp;  // padded
  int64_t parts_of_head;
  bool writes_bias;  // dbias holds each score's own gradient, and is written on the way

  // For each block: q and do transposed and stacked; lse, share and delta of its rows; dq.
  Unit *q_columns, *do_columns, *q_stacked, *do_stacked;
  float *log_sums, *shares, *deltas, *dq;
  float *dk_parts, *dv_parts;
  Parts shape;
  char* memory;

  struct Memory {
    float *s, *dp, *extra, *chain, *p_rows, *ds_rows, *ds_pairs, *dk, *dv;
  };

  Backward(const Problem& problem, const fm_gradients& gradients)
      : p(problem), call(*problem.call), g(gradients), keys(p, call.k, call.dim, false), values(p, call.v, call.dim_v, false),
        stacked_keys(p, call.k, call.dim, true), dim_p(padded(call.dim)), dim_vp(padded(call.dim_v)) {
    const int64_t heads = call.batch * call.kv_heads, blocks = p.blocks * call.kv_heads;
    parts_of_head = heads == 0 ? 1 : larger(1, smaller((16 + heads - 1) / heads, blocks / heads / 8));
    writes_bias = has_own_elements(g.dbias);
    worker_memory(shape);
  }

  // Whether no two scores share an element of the bias's gradient.
  bool has_own_elements(const fm_tensor& d) const {
    const int64_t sizes[] = {call.batch, call.heads, call.seq_q, call.seq_k};
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] > 1 && d.stride[i] == 0) return false;
    }
    return d.data != nullptr;
  }

  Memory worker_memory(Parts& parts) const {
    const int64_t tile = TILE_N * BLOCK_M;
    Memory m;
    m.s = parts.take<float>(tile);
    m.dp = parts.take<float>(tile);
    m.extra = parts.take<float>(tile);
    m.chain = parts.take<float>(call.softcap > 0 ? tile : 0);
    m.p_rows = Dot::STEP == 1 ? m.s : parts.take<float>(tile / 2);
    m.ds_rows = Dot::STEP == 1 ? m.dp : parts.take<float>(tile / 2);
    m.ds_pairs = Dot::STEP == 1 ? m.dp : parts.take<float>(tile / 2);
    m.dk = parts.take<float>(TILE_N * dim_p);
    m.dv = parts.take<float>(TILE_N * dim_vp);
    return m;
  }

  void lay_out(Parts& whole, int workers) {
    const int64_t blocks = p.blocks * call.kv_heads;
    keys.take(whole);
    values.take(whole);
    stacked_keys.take(whole);
    q_columns = whole.take<Unit>(blocks * units<Dot>(call.dim) * BLOCK_M);
    do_columns = whole.take<Unit>(blocks * units<Dot>(call.dim_v) * BLOCK_M);
    q_stacked = whole.take<Unit>(blocks * BLOCK_M / Dot::STEP * dim_p);
    do_stacked = whole.take<Unit>(blocks * BLOCK_M / Dot::STEP * dim_vp);
    log_sums = whole.take<float>(blocks * BLOCK_M);
    shares = whole.take<float>(blocks * BLOCK_M);
    deltas = whole.take<float>(blocks * BLOCK_M);
    dq = whole.take<float>(blocks * BLOCK_M * dim_p);
    const int64_t rows = parts_of_head > 1 ? parts_of_head * call.kv_heads * p.key_rows : 0;
    dk_parts = whole.take<float>(rows * dim_p);
    dv_parts = whole.take<float>(rows * dim_vp);
    memory = whole.take<char>(workers * shape.used);
  }

  int64_t number_of(const Place& at) const { return at.kv_head * p.blocks + p.sequences[at.batch].blocks + at.part; }

  // Packs a block's rows, and finds its delta.
  void prepare(const Place& at) const {
    const Sequence& sequence = p.sequences[at.batch];
    Block block;
    make_block(p, at.batch, at.kv_head, at.part, block);
    const int64_t number = number_of(at), columns = block.columns;
    const char *q_rows[BLOCK_M], *do_rows[BLOCK_M], *out_rows[BLOCK_M];
    rows_of(block, call.q, sequence.first_q, q_rows);
    rows_of(block, g.dout, sequence.first_q, do_rows);
    rows_of(block, call.out, sequence.first_q, out_rows);
    const Elements q{call.q.dtype, call.q.stride[3], call.dim}, dout{g.dout.dtype, g.dout.stride[3], call.dim_v};
    const Elements out{call.out.dtype, call.out.stride[3], call.dim_v};
    for (int64_t c = 0; c < columns; ++c) {
      // A row without a key has +inf, so that exp(s - inf) is 0.
      float log_sum = INFINITE, share = 1, delta = 0;
      if (c < block.count) {
        const int64_t row = sequence.first_q + block.row[c];
        const float lse = *reinterpret_cast<const float*>(row_of(call.lse, block.batch, block.head[c], row));
        float dsink = 0;
        if (lse != -INFINITE) {
          F sum = splat(0.0f);
          for (int64_t d = 0; d < call.dim_v; d += W) sum = fma(read(do_rows[c], dout, d), read(out_rows[c], out, d), sum);
          delta = total(sum);
          log_sum = lse;
          if (call.sinks.data) {
            const float sink = *reinterpret_cast<const float*>(row_of(call.sinks, 0, block.head[c], 0));
            const float high = sink > lse ? sink : lse;
            const float whole = high + __builtin_logf(__builtin_expf(sink - high) + __builtin_expf(lse - high));
            dsink = -delta * __builtin_expf(sink - whole);
            share = __builtin_expf(lse - whole);
            delta *= share;
          }
          if (g.dlse.data) {
            delta -= *reinterpret_cast<const float*>(row_of(g.dlse, block.batch, block.head[c], row));
          }
        } else {
          do_rows[c] = nullptr;  // what comes in for such a row is dropped, whatever it is
        }
        if (g.dsink_rows.data) {
          *reinterpret_cast<float*>(const_cast<char*>(row_of(g.dsink_rows, block.batch, block.head[c], row))) = dsink;
        }
      }
      log_sums[number * BLOCK_M + c] = log_sum;
      shares[number * BLOCK_M + c] = share;
      deltas[number * BLOCK_M + c] = delta;
    }
    pack_transposed<Dot>(q_rows, columns, q, q_columns + number * units<Dot>(call.dim) * BLOCK_M, columns);
    pack_transposed<Dot>(do_rows, columns, dout, do_columns + number * units<Dot>(call.dim_v) * BLOCK_M, columns);
    pack_stacked<Dot>(q_rows, columns, q, q_stacked + number * BLOCK_M / Dot::STEP * dim_p, dim_p);
    pack_stacked<Dot>(do_rows, columns, dout, do_stacked + number * BLOCK_M / Dot::STEP * dim_vp, dim_vp);
    float* to = dq + number * BLOCK_M * dim_p;
    for (int64_t i = 0; i < block.count * dim_p; i += W) store(to + i, splat(0.0f));
  }

  // Probabilities and the gradients of the products, between a block and the keys first to first + count: m.s and m.dp.
  void score(const Memory& m, const Block& block, int64_t number, int64_t first, int64_t count, bool adds_bias) const {
    const int64_t columns = block.columns;
    multiply<Dot, SET>({keys.at(block.batch, block.kv_head, first), keys.stride, 1,
                        q_columns + number * units<Dot>(call.dim) * BLOCK_M, columns, m.s, columns, nullptr, units<Dot>(call.dim)},
                       count, columns);
    multiply<Dot, SET>({values.at(block.batch, block.kv_head, first), values.stride, 1,
                        do_columns + number * units<Dot>(call.dim_v) * BLOCK_M, columns, m.dp, columns, nullptr,
                        units<Dot>(call.dim_v)},
                       count, columns);
    const Scores scores(p, block, m.extra);
    scores.apply(first, count, m.s, call.softcap > 0 ? m.chain : nullptr);
    if (call.dropout_p > 0) scores.draw(first, count);
    const F factor = splat(scores.factor), log2_e = splat(LOG2_E);
    const bool drops = call.dropout_p > 0, has_chain = call.softcap > 0, has_sinks = call.sinks.data != nullptr;
    for (int64_t c = 0; c < columns; c += W) {
      const F minus = splat(0.0f) - load(log_sums + number * BLOCK_M + c), delta = load(deltas + number * BLOCK_M + c);
      const F share = load(shares + number * BLOCK_M + c);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t at = n * columns + c;
        F weight = exp2<Dot::EXP_DEGREE>(fma(load(m.s + at), factor, minus) * log2_e);
        F ds = load(m.dp + at);
        if (has_sinks) ds = ds * share;
        const F kept = drops ? load(m.extra + at) : splat(1.0f);
        if (drops) ds = ds * kept;
        ds = weight * (ds - delta);
        if (has_sinks) weight = weight * share;
        if (drops) weight = weight * kept;
        store(m.s + at, weight);
        store(m.dp + at, ds);
      }
    }
    if (adds_bias) add_bias_gradient(block, first, count, m.dp);
    if (has_chain) {
      for (int64_t i = 0; i < count * columns; i += W) store(m.dp + i, load(m.dp + i) * load(m.chain + i));
    }
  }

  // bf16: p and ds rounded, along rows, and ds in pairs of keys besides.
  void round(const Memory& m, int64_t count, int64_t columns) const {
    if constexpr (Dot::STEP == 2) {
      auto* p_rows = reinterpret_cast<uint16_t*>(m.p_rows);
      auto* ds_rows = reinterpret_cast<uint16_t*>(m.ds_rows);
      for (int64_t n = 0; n < count; n += 2) {
        for (int64_t c = 0; c < columns; c += W) {
          const int64_t at = n * columns + c;
          const F ds = load(m.dp + at), next = n + 1 < count ? load(m.dp + at + columns) : splat(0.0f);
          store_bf16(p_rows + at, load(m.s + at));
          store_bf16(ds_rows + at, ds);
          if (n + 1 < count) {
            store_bf16(p_rows + at + columns, load(m.s + at + columns));
            store_bf16(ds_rows + at + columns, next);
          }
          store(m.ds_pairs + n / 2 * columns + c, Dot::pair(ds, next));
        }
      }
    }
  }

  void add_bias_gradient(const Block& block, int64_t first, int64_t count, const float* ds) const {
    const fm_tensor& t = g.dbias;
    for (int64_t c = 0; c < block.count; ++c) {
      auto* row = reinterpret_cast<float*>(const_cast<char*>(row_of(t, block.batch, block.head[c], block.row[c])));
      row += first * t.stride[3];
      for (int64_t n = 0; n < count; ++n) row[n * t.stride[3]] += ds[n * block.columns + c];
    }
  }

  // One part of a kv head's query blocks against all its keys.
  void walk(const Memory& m, const Place& at) const {
    const Sequence& sequence = p.sequences[at.batch];
    const int64_t blocks = blocks_of(sequence.queries, p.group);
    const int64_t begin = blocks * at.part / parts_of_head, end = blocks * (at.part + 1) / parts_of_head;
    for (int64_t first = 0; first < sequence.keys; first += TILE_N) {
      const int64_t tile = smaller(TILE_N, sequence.keys - first);
      bool is_new = true;
      for (int64_t index = begin; index < end; ++index) {
        Block block;
        make_block(p, at.batch, at.kv_head, index, block);
        if (first >= block.end_key || first + tile <= block.first_key) continue;
        const int64_t number = number_of({at.batch, at.kv_head, index}), columns = block.columns;
        score(m, block, number, first, tile, writes_bias);
        round(m, tile, columns);
        const auto* p_rows = reinterpret_cast<const Unit*>(m.p_rows);
        const auto* ds_rows = reinterpret_cast<const Unit*>(m.ds_rows);
        const auto* ds_pairs = reinterpret_cast<const Unit*>(m.ds_pairs);
        const int64_t depth = columns / Dot::STEP;
        const Product<Dot> to_v{p_rows, depth, 1, do_stacked + number * BLOCK_M / Dot::STEP * dim_vp, dim_vp, m.dv, dim_vp,
                                nullptr, depth};
        const Product<Dot> to_k{ds_rows, depth, 1, q_stacked + number * BLOCK_M / Dot::STEP * dim_p, dim_p, m.dk, dim_p,
                                nullptr, depth};
        if (is_new) {
          multiply<Dot, SET>(to_v, tile, dim_vp);
          multiply<Dot, SET>(to_k, tile, dim_p);
        } else {
          multiply<Dot, ADD>(to_v, tile, dim_vp);
          multiply<Dot, ADD>(to_k, tile, dim_p);
        }
        is_new = false;
        const Product<Dot> to_q{ds_pairs, 1, columns, stacked_keys.at(at.batch, at.kv_head, first), stacked_keys.stride,
                                dq + number * BLOCK_M * dim_p, dim_p, nullptr, units<Dot>(tile)};
        multiply<Dot, ADD>(to_q, block.count, dim_p);
      }
      if (is_new) {
        for (int64_t i = 0; i < tile * dim_p; i += W) store(m.dk + i, splat(0.0f));
        for (int64_t i = 0; i < tile * dim_vp; i += W) store(m.dv + i, splat(0.0f));
      }
      keep(m, at, first, tile);
    }
    for (int64_t index = begin; index < end; ++index) write_dq({at.batch, at.kv_head, index});
  }

  int64_t part_row(const Place& at, int64_t first) const {
    return (at.part * call.kv_heads + at.kv_head) * p.key_rows + p.sequences[at.batch].key_rows + first;
  }

  // A tile's gradients to where they belong: dk and dv, or this part's share of them.
  void keep(const Memory& m, const Place& at, int64_t first, int64_t count) const {
    if (parts_of_head > 1) {
      float* to_k = dk_parts + part_row(at, first) * dim_p;
      float* to_v = dv_parts + part_row(at, first) * dim_vp;
      for (int64_t i = 0; i < count * dim_p; i += W) store(to_k + i, load(m.dk + i));
      for (int64_t i = 0; i < count * dim_vp; i += W) store(to_v + i, load(m.dv + i));
      return;
    }
    for (int64_t n = 0; n < count; ++n) write_key(at, first + n, m.dk + n * dim_p, m.dv + n * dim_vp);
  }

  void write_key(const Place& at, int64_t key, const float* dk, const float* dv) const {
    const int64_t row = p.sequences[at.batch].first_k + key;
    if (call.dim > 0) {
      write_row(const_cast<char*>(row_of(g.dk, at.batch, at.kv_head, row)), {g.dk.dtype, g.dk.stride[3], call.dim}, dk,
                static_cast<float>(call.scale));
    }
    if (call.dim_v > 0) {
      write_row(const_cast<char*>(row_of(g.dv, at.batch, at.kv_head, row)), {g.dv.dtype, g.dv.stride[3], call.dim_v}, dv, 1.0f);
    }
  }

  void write_dq(const Place& at) const {
    if (call.dim == 0) return;
    Block block;
    make_block(p, at.batch, at.kv_head, at.part, block);
    const char* rows[BLOCK_M];
    rows_of(block, g.dq, block.sequence->first_q, rows);
    for (int64_t c = 0; c < block.count; ++c) {
      write_row(const_cast<char*>(rows[c]), {g.dq.dtype, g.dq.stride[3], call.dim},
                dq + (number_of(at) * BLOCK_M + c) * dim_p, static_cast<float>(call.scale));
    }
  }

  // The parts' shares of a tile's dk and dv, added up in order.
  void add_parts(const Place& at) const {
    const int64_t first = at.part * TILE_N, count = smaller(TILE_N, p.sequences[at.batch].keys - first);
    float* dk = dk_parts + part_row({at.batch, at.kv_head, 0}, first) * dim_p;
    float* dv = dv_parts + part_row({at.batch, at.kv_head, 0}, first) * dim_vp;
    for (int64_t part = 1; part < parts_of_head; ++part) {
      const float* more_k = dk_parts + part_row({at.batch, at.kv_head, part}, first) * dim_p;
      const float* more_v = dv_parts + part_row({at.batch, at.kv_head, part}, first) * dim_vp;
      for (int64_t i = 0; i < count * dim_p; i += W) store(dk + i, load(dk + i) + load(more_k + i));
      for (int64_t i = 0; i < count * dim_vp; i += W) store(dv + i, load(dv + i) + load(more_v + i));
    }
    for (int64_t n = 0; n < count; ++n) write_key(at, first + n, dk + n * dim_p, dv + n * dim_vp);
  }

  // A tile of keys against all blocks of all sequences and heads, for a gradient of the bias that they share.
  void sum_bias(const Memory& m, int64_t tile) const {
    const int64_t first = tile * TILE_N;
    for (int64_t batch = 0; batch < call.batch; ++batch) {
      const Sequence& sequence = p.sequences[batch];
      if (first >= sequence.keys) continue;
      const int64_t count = smaller(TILE_N, sequence.keys - first);
      for (int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
        for (int64_t index = 0; index < blocks_of(sequence.queries, p.group); ++index) {
          Block block;
          make_block(p, batch, kv_head, index, block);
          if (first >= block.end_key || first + count <= block.first_key) continue;
          score(m, block, number_of({batch, kv_head, index}), first, count, true);
        }
      }
    }
  }

  Memory memory_of(int worker) const {
    Parts parts{memory + worker * shape.used};
    return worker_memory(parts);
  }

  static const Backward& self(const void* context) { return *static_cast<const Backward*>(context); }

  static void pack_task(const void* context, int, int64_t task) noexcept {
    const Backward& b = self(context);
    const Place at = place(b.p, task, tiles_of);
    const int64_t first = at.part * TILE_N, count = smaller(TILE_N, b.p.sequences[at.batch].keys - first);
    b.keys.pack(at.batch, at.kv_head, first, count);
    b.values.pack(at.batch, at.kv_head, first, count);
    b.stacked_keys.pack(at.batch, at.kv_head, first, count);
  }

  static void prepare_task(const void* context, int, int64_t task) noexcept {
    const Backward& b = self(context);
    b.prepare(place(b.p, task, [&b](const Sequence& s) { return blocks_of(s.queries, b.p.group); }));
  }

  static void walk_task(const void* context, int worker, int64_t task) noexcept {
    const Backward& b = self(context);
    b.walk(b.memory_of(worker), place(b.p, task, [&b](const Sequence&) { return b.parts_of_head; }));
  }

  static void add_task(const void* context, int, int64_t task) noexcept {
    const Backward& b = self(context);
    b.add_parts(place(b.p, task, tiles_of));
  }

  static void bias_task(const void* context, int worker, int64_t task) noexcept {
    const Backward& b = self(context);
    b.sum_bias(b.memory_of(worker), task);
  }

  static void whole_bias_task(const void* context, int worker, int64_t) noexcept {
    const Backward& b = self(context);
    for (int64_t tile = 0; tile * TILE_N < b.call.seq_k; ++tile) b.sum_bias(b.memory_of(worker), tile);
  }

  void run() {
    const int64_t blocks = p.blocks * call.kv_heads, tiles = call.heads > 0 ? count_tasks(p, tiles_of) : 0;
    const int64_t tasks = call.batch * call.kv_heads * parts_of_head;
    const int workers = worker_count(call.threads, larger(tasks, larger(blocks, tiles)));
    Parts whole;
    lay_out(whole, workers);
    const Scratch scratch(whole.used);
    whole = Parts{scratch.data()};
    lay_out(whole, workers);
    if (blocks > 0) parallel_for(workers, tiles, pack_task, this);
    parallel_for(workers, blocks, prepare_task, this);
    parallel_for(workers, tasks, walk_task, this);
    if (parts_of_head > 1) parallel_for(workers, tiles, add_task, this);
    if (g.dbias.data && !writes_bias) {
      // Tiles of keys share no element of the gradient, unless it is the same for all keys.
      const bool is_shared = g.dbias.stride[3] == 0 && call.seq_k > 1;
      parallel_for(is_shared ? 1 : workers, is_shared ? 1 : (call.seq_k + TILE_N - 1) / TILE_N,
                   is_shared ? whole_bias_task : bias_task, this);
    }
  }
};
