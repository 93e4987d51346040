// Operands of the products: rows of tensors of any dtype and stride, brought into the layouts that product.h reads.
// Included within a namespace, after product.h.
//
//   rows        [row][unit]           broadcast, depth along a row
//   transposed  [unit][row]           vectors over rows, depth along a row
//   stacked     [row / STEP][element] vectors over elements, depth over rows; a unit holds STEP rows' elements
//
// What has no counterpart in the tensor is 0: elements after dim, rows that a null pointer stands for.

struct Elements {  // how to read along a row
  int32_t dtype;
  int64_t stride;
  int64_t count;
};

inline int64_t size_of(int32_t dtype) {
  return dtype == FM_F32 || dtype == FM_I32 ? 4 : dtype == FM_U8 ? 1 : dtype == FM_I64 ? 8 : 2;
}

inline float read_one(const char* row, int32_t dtype, int64_t index) {
  if (dtype == FM_F32) return reinterpret_cast<const float*>(row)[index];
  if (dtype == FM_U8) return row[index] ? 1.0f : 0.0f;
  const uint16_t half = reinterpret_cast<const uint16_t*>(row)[index];
  return dtype == FM_BF16 ? bf16_to_float(half) : f16_to_float(half);
}

// Elements first to first + W of a row as floats.
inline F read(const char* row, const Elements& e, int64_t first) {
  const int64_t left = e.count - first;
  if (!row || left <= 0) return splat(0.0f);
  if (e.stride == 1) {
    if (e.dtype == FM_F32) {
      const float* p = reinterpret_cast<const float*>(row) + first;
      return left >= W ? load(p) : load_tail(p, static_cast<int>(left));
    }
    if (left >= W && e.dtype != FM_U8) {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + first;
      return e.dtype == FM_BF16 ? load_bf16(p) : load_f16(p);
    }
  }
  float gathered[W] = {};
  for (int64_t l = 0; l < W && l < left; ++l) gathered[l] = read_one(row, e.dtype, (first + l) * e.stride);
  return load(gathered);
}

inline void write_one(char* row, int32_t dtype, int64_t index, float x) {
  if (dtype == FM_F32) {
    reinterpret_cast<float*>(row)[index] = x;
  } else {
    reinterpret_cast<uint16_t*>(row)[index] = dtype == FM_BF16 ? float_to_bf16(x) : float_to_f16(x);
  }
}

// count floats times factor into a row of any dtype and stride.
inline void write_row(char* row, const Elements& e, const float* from, float factor) {
  int64_t i = 0;
  if (e.stride == 1) {
    const F f = splat(factor);
    for (; i + W <= e.count; i += W) {
      const F x = load(from + i) * f;
      if (e.dtype == FM_F32) {
        store(reinterpret_cast<float*>(row) + i, x);
      } else if (e.dtype == FM_BF16) {
        store_bf16(reinterpret_cast<uint16_t*>(row) + i, x);
      } else {
        store_f16(reinterpret_cast<uint16_t*>(row) + i, x);
      }
    }
  }
  for (; i < e.count; ++i) write_one(row, e.dtype, i * e.stride, from[i] * factor);
}

template <class Dot>
inline int64_t units(int64_t elements) {
  return (elements + Dot::STEP - 1) / Dot::STEP;
}

inline int64_t padded(int64_t elements) { return (elements + W - 1) / W * W; }

// W units of a row from unit `first` on, as the bits of W floats. Pairs exist of bf16 alone.
template <class Dot>
inline F read_units(const char* row, const Elements& e, int64_t first) {
  if constexpr (Dot::STEP == 1) {
    return read(row, e, first);
  } else {
    const int64_t left = e.count - 2 * first;
    if (!row || left <= 0) return splat(0.0f);
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row);
    float bits[W] = {};
    if (e.stride == 1) {
      if (left >= 2 * W) return load(reinterpret_cast<const float*>(p + 2 * first));
      __builtin_memcpy(bits, p + 2 * first, 2 * left);
    } else {
      uint16_t gathered[2 * W] = {};
      for (int64_t l = 0; l < 2 * W && l < left; ++l) gathered[l] = p[(2 * first + l) * e.stride];
      __builtin_memcpy(bits, gathered, sizeof bits);
    }
    return load(bits);
  }
}

// rows[0] to rows[columns] into to[unit][column]; columns is a multiple of W, and so is `stride`.
template <class Dot>
inline void pack_transposed(const char* const* rows, int64_t columns, const Elements& e, void* to, int64_t stride) {
  float* out = static_cast<float*>(to);
  const int64_t depth = units<Dot>(e.count);
  const bool is_plain = e.stride == 1 && (Dot::STEP == 2 || e.dtype == FM_F32);
  const int64_t whole = is_plain ? e.count / (W * Dot::STEP) * W : 0;  // units that are read as they lie
  for (int64_t c = 0; c < columns; c += W) {
    bool is_full = true;
    for (int64_t i = 0; i < W; ++i) is_full &= rows[c + i] != nullptr;
    int64_t u = 0;
    for (; is_full && u < whole; u += W) {
      F x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load(reinterpret_cast<const float*>(rows[c + i]) + u);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (u + i) * stride + c, x[i]);
    }
    for (; u < depth; u += W) {
      const int64_t count = depth - u < W ? depth - u : W;
      F x[W];
      for (int i = 0; i < W; ++i) x[i] = read_units<Dot>(rows[c + i], e, u);
      transpose(x);
      for (int64_t i = 0; i < count; ++i) store(out + (u + i) * stride + c, x[i]);
    }
  }
}

// The whole vectors at a row's beginning as floats, where they lie side by side; returns how many elements that were.
inline int64_t convert(const char* row, const Elements& e, float* to) {
  if (!row || e.stride != 1) return 0;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  int64_t d = 0;
  if (e.dtype == FM_F16) {
    for (; d + W <= e.count; d += W) store(to + d, load_f16(halves + d));
  } else if (e.dtype == FM_BF16) {
    for (; d + W <= e.count; d += W) store(to + d, load_bf16(halves + d));
  }
  return d;
}

// to[row][unit], rows `stride` units apart.
template <class Dot>
inline void pack_rows(const char* const* rows, int64_t count, const Elements& e, void* to, int64_t stride) {
  const int64_t depth = units<Dot>(e.count);
  for (int64_t r = 0; r < count; ++r) {
    float* out = static_cast<float*>(to) + r * stride;
    for (int64_t u = Dot::STEP == 1 ? convert(rows[r], e, out) : 0; u < depth; u += W) {
      const F x = read_units<Dot>(rows[r], e, u);
      if (depth - u >= W) {
        store(out + u, x);
      } else {
        store_tail(out + u, x, static_cast<int>(depth - u));
      }
    }
  }
}

// to[row / STEP][element], `stride` units apart, elements up to padded(count). rows[] has units<Dot>(count) * STEP entries.
template <class Dot>
inline void pack_stacked(const char* const* rows, int64_t count, const Elements& e, void* to, int64_t stride) {
  for (int64_t r = 0; r < count; r += Dot::STEP) {
    float* out = static_cast<float*>(to) + r / Dot::STEP * stride;
    const char* second = r + 1 < count ? rows[r + 1] : nullptr;
    int64_t d = 0;
    if constexpr (Dot::STEP == 2) {
      d = Dot::pair_rows(rows[r], second, e, out);
    } else {
      d = convert(rows[r], e, out);
    }
    for (; d < e.count; d += W) {
      if constexpr (Dot::STEP == 1) {
        store(out + d, read(rows[r], e, d));
      } else {
        store(out + d, Dot::pair(read(rows[r], e, d), read(second, e, d)));
      }
    }
  }
}

// Whether the rows of a tensor can be broadcast, or read in vectors over elements, where they are.
template <class Dot>
inline bool rows_in_place(const fm_tensor& t, int64_t dim) {
  return t.stride[3] == 1 && t.dtype == (Dot::STEP == 1 ? FM_F32 : FM_BF16) && dim % Dot::STEP == 0 &&
         t.stride[2] % Dot::STEP == 0;
}
template <class Dot>
inline bool stacked_in_place(const fm_tensor& t, int64_t dim) {
  return Dot::STEP == 1 && t.stride[3] == 1 && t.dtype == FM_F32 && dim % W == 0;
}

inline const char* row_of(const fm_tensor& t, int64_t i0, int64_t i1, int64_t i2) {
  return static_cast<const char*>(t.data) + (i0 * t.stride[0] + i1 * t.stride[1] + i2 * t.stride[2]) * size_of(t.dtype);
}
