// Attention forward. Included within a namespace, after softmax.h and keys.h.
//
// A task is a block of query rows of one kv head. Its rows, transposed once, meet tiles of keys: scores = keys * rows,
// softmax over keys, out = fade * out + probabilities * values. Which thread does a task leaves no trace in its bits.

template <class Dot>
struct Forward {
  using Unit = typename Dot::Unit;
  const Problem& p;
  const fm_attention& call;
  Keys<Dot> keys, values;
  int64_t padded_dim;
  Parts shape;  // sizes of a worker's memory
  char* memory;

  struct Memory {
    Unit* rows;    // [units][columns]
    float* s;      // [TILE_N][columns]
    float* pairs;  // [TILE_N / 2][columns], of bf16 alone
    float* extra;  // [TILE_N][columns]
    Running running;
  };

  explicit Forward(const Problem& problem)
      : p(problem), call(*problem.call), keys(p, call.k, call.dim, false), values(p, call.v, call.dim_v, true),
        padded_dim(padded(call.dim_v)), memory(nullptr) {
    worker_memory(shape);
  }

  Memory worker_memory(Parts& parts) const {
    Memory m;
    m.rows = parts.take<Unit>(units<Dot>(call.dim) * BLOCK_M);
    m.s = parts.take<float>(TILE_N * BLOCK_M);
    m.pairs = parts.take<float>(Dot::STEP == 2 ? TILE_N / 2 * BLOCK_M : 0);
    m.extra = parts.take<float>(TILE_N * BLOCK_M);
    m.running = Running::take(parts, BLOCK_M, padded_dim);
    return m;
  }

  void attend(const Memory& m, const Place& at) const {
    const Sequence& sequence = p.sequences[at.batch];
    Block block;
    // The last blocks see the most keys under a causal mask: they begin, so that none is waited for at the end.
    make_block(p, at.batch, at.kv_head, blocks_of(sequence.queries, p.group) - 1 - at.part, block);
    const int64_t columns = block.columns;
    const char* rows[BLOCK_M];
    rows_of(block, call.q, sequence.first_q, rows);
    pack_transposed<Dot>(rows, columns, {call.q.dtype, call.q.stride[3], call.dim}, m.rows, columns);
    const Scores scores(p, block, m.extra);
    m.running.start(columns);
    bool is_first = true;
    // Pairs of keys begin at even ones.
    for (int64_t first = larger(block.first_key, 0) & ~int64_t{1}; first < block.end_key; first += TILE_N, is_first = false) {
      const int64_t count = smaller(TILE_N, block.end_key - first);
      multiply<Dot, SET>({keys.at(at.batch, at.kv_head, first), keys.stride, 1, m.rows, columns, m.s, columns, nullptr,
                          units<Dot>(call.dim)},
                         count, columns);
      scores.apply(first, count, m.s, nullptr);
      soften<Dot>(m.s, count, columns, scores.factor, m.running, m.pairs);
      if (call.dropout_p > 0) {
        scores.draw(first, count);
        drop<Dot>(m.s, m.pairs, count, columns, m.extra);
      }
      const auto* weights = reinterpret_cast<const Unit*>(Dot::STEP == 2 ? m.pairs : m.s);
      const Product<Dot> weighted{weights,  1, columns, values.at(at.batch, at.kv_head, first), values.stride, m.running.out,
                                  padded_dim, m.running.fade, units<Dot>(count)};
      if (is_first) {
        multiply<Dot, SET>(weighted, block.count, padded_dim);
      } else {
        multiply<Dot, FADE>(weighted, block.count, padded_dim);
      }
    }
    finish(call, block, m.running, padded_dim, scores.factor);
  }

  static void pack_task(const void* context, int, int64_t task) noexcept {
    const auto& f = *static_cast<const Forward*>(context);
    const Place at = place(f.p, task, tiles_of);
    const int64_t first = at.part * TILE_N, count = smaller(TILE_N, f.p.sequences[at.batch].keys - first);
    f.keys.pack(at.batch, at.kv_head, first, count);
    f.values.pack(at.batch, at.kv_head, first, count);
  }

  static void attend_task(const void* context, int worker, int64_t task) noexcept {
    const auto& f = *static_cast<const Forward*>(context);
    Parts parts{f.memory + worker * f.shape.used};
    f.attend(f.worker_memory(parts), place(f.p, task, [&f](const Sequence& s) { return blocks_of(s.queries, f.p.group); }));
  }

  void run() {
    const int64_t tasks = p.blocks * call.kv_heads;
    if (tasks == 0) return;
    const int workers = worker_count(call.threads, tasks);
    Parts whole;
    const auto lay_out = [&] {
      whole.used = 0;
      keys.take(whole);
      values.take(whole);
      memory = whole.take<char>(workers * shape.used);
    };
    lay_out();
    const Scratch scratch(whole.used);
    whole.data = scratch.data();
    lay_out();
    if (!keys.is_in_place || !values.is_in_place) parallel_for(workers, count_tasks(p, tiles_of), pack_task, this);
    parallel_for(workers, tasks, attend_task, this);
  }
};
