// Keys and values in the layouts that the products read: where they are, or packed once for the whole call. Included
// within a namespace, after scores.h.

template <class Dot>
struct Keys {
  using Unit = typename Dot::Unit;
  const Problem& p;
  const fm_tensor& tensor;
  int64_t dim;
  bool is_stacked, is_in_place;
  int64_t stride;  // units from row to row, or from a stack of STEP rows to the next
  Unit* packed;

  Keys(const Problem& problem, const fm_tensor& t, int64_t size, bool stacked)
      : p(problem), tensor(t), dim(size), is_stacked(stacked), packed(nullptr) {
    is_in_place = stacked ? stacked_in_place<Dot>(t, size) : rows_in_place<Dot>(t, size);
    stride = is_in_place ? t.stride[2] / Dot::STEP : stacked ? padded(size) : units<Dot>(size);
  }

  void take(Parts& parts) {
    if (is_in_place) return;
    packed = parts.take<Unit>(p.call->kv_heads * (is_stacked ? p.key_rows / Dot::STEP : p.key_rows) * stride);
  }

  // From key `first` of a sequence on; for stacks an even one.
  const Unit* at(int64_t batch, int64_t kv_head, int64_t first) const {
    const Sequence& sequence = p.sequences[batch];
    if (is_in_place) return reinterpret_cast<const Unit*>(row_of(tensor, batch, kv_head, sequence.first_k + first));
    const int64_t row = kv_head * p.key_rows + sequence.key_rows + first;
    return packed + (is_stacked ? row / Dot::STEP : row) * stride;
  }

  void pack(int64_t batch, int64_t kv_head, int64_t first, int64_t count) const {
    if (is_in_place) return;
    const char* rows[TILE_N];
    for (int64_t n = 0; n < count; ++n) rows[n] = row_of(tensor, batch, kv_head, p.sequences[batch].first_k + first + n);
    const Elements e{tensor.dtype, tensor.stride[3], dim};
    Unit* to = const_cast<Unit*>(at(batch, kv_head, first));
    if (is_stacked) {
      pack_stacked<Dot>(rows, count, e, to, stride);
    } else {
      pack_rows<Dot>(rows, count, e, to, stride);
    }
  }
};

// A task that is one of `each` parts of a kv head of a sequence.
struct Place {
  int64_t batch, kv_head, part;
};

// Tasks over (batch, kv head, part) where each sequence has as many parts as `parts` says.
template <typename Count>
inline Place place(const Problem& p, int64_t task, Count parts) {
  int64_t batch = 0;
  for (;; ++batch) {
    const int64_t tasks = parts(p.sequences[batch]) * p.call->kv_heads;
    if (task < tasks) break;
    task -= tasks;
  }
  const int64_t each = parts(p.sequences[batch]);
  return {batch, task / each, task % each};
}

inline int64_t tiles_of(const Sequence& sequence) { return (sequence.keys + TILE_N - 1) / TILE_N; }

template <typename Count>
inline int64_t count_tasks(const Problem& p, Count parts) {
  int64_t total = 0;
  for (int64_t b = 0; b < p.call->batch; ++b) total += parts(p.sequences[b]) * p.call->kv_heads;
  return total;
}
