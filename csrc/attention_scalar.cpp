// Attention forward in plain C++, fp32: right on every processor, the measure for the vectorised ones.
//
// One query row at a time meets the keys in tiles of TILE. Scores of a tile are computed, the running maximum and sum
// are updated once per tile (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), and the tile's
// weighted values are summed apart before they join the running output, so that rounding errors grow with the number of
// tiles and not of keys. Rows are independent: which thread computes one leaves no trace in its bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"
#include "threading.h"

namespace fm {
namespace {

constexpr int64_t TILE = 64;           // keys whose scores are held at once
constexpr int64_t ROWS_PER_TASK = 16;  // query rows of one head that a thread takes at a time
constexpr int64_t LANES = 8;           // partial sums of a dot product, which compilers turn into vector adds
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Strip {  // a row along the last dimension
  const float* data;
  int64_t stride;
};

template <typename T>
const T* at(const fm_tensor& tensor, int64_t i0, int64_t i1, int64_t i2) {
  return static_cast<const T*>(tensor.data) + i0 * tensor.stride[0] + i1 * tensor.stride[1] + i2 * tensor.stride[2];
}

// The row as unit-stride floats: itself if it is so already, else a copy in `scratch`.
const float* contiguous(Strip row, int64_t size, float* scratch) {
  if (row.stride == 1) return row.data;
  for (int64_t d = 0; d < size; ++d) scratch[d] = row.data[d * row.stride];
  return scratch;
}

float dot(const float* a, const float* b, int64_t size) {
  float lane[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    for (int64_t l = 0; l < LANES; ++l) lane[l] += a[d + l] * b[d + l];
  }
  for (int64_t l = 0; d < size; ++d, ++l) lane[l] += a[d] * b[d];
  for (int64_t width = LANES / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

struct Forward {
  const fm_attention& call;
  int64_t group;           // query heads on one kv head
  int64_t tasks_per_head;  // tasks that the rows of one head make
  int64_t scratch_size;    // floats for each worker
  float* scratch;

  // Floats for one query row, one key or value row, the running output and the tile's share of it.
  static int64_t scratch_floats(const fm_attention& call) { return call.dim + std::max(call.dim, call.dim_v) + 2 * call.dim_v; }

  void row(int64_t i_b, int64_t i_h, int64_t i_q, float* memory) const noexcept;
};

void Forward::row(int64_t i_b, int64_t i_h, int64_t i_q, float* memory) const noexcept {
  const int64_t dim = call.dim, dim_v = call.dim_v, i_hkv = i_h / group;
  float* b_gathered = memory + dim;
  float* b_out = b_gathered + std::max(dim, dim_v);
  float* b_tile_out = b_out + dim_v;
  const float* b_q = contiguous({at<float>(call.q, i_b, i_h, i_q), call.q.stride[3]}, dim, memory);
  const uint8_t* p_mask = call.mask.data ? at<uint8_t>(call.mask, i_b, i_h, i_q) : nullptr;
  const float* p_bias = call.bias.data ? at<float>(call.bias, i_b, i_h, i_q) : nullptr;
  const float scale = static_cast<float>(call.scale);

  // The keys that the window shows: key j is at distance j - here from the query.
  const int64_t here = call.origin_q + i_q - call.origin_k;
  int64_t first = 0, end = call.seq_k;
  if (call.window_left >= 0 && here > call.window_left) first = std::min(here - call.window_left, call.seq_k);
  if (call.window_right >= 0 && here < call.seq_k - call.window_right) end = std::max<int64_t>(here + call.window_right + 1, 0);

  float top = -INFINITE, sum = 0;
  std::fill_n(b_out, dim_v, 0.0f);
  for (int64_t tile = first; tile < end; tile += TILE) {
    const int64_t size = std::min(TILE, end - tile);
    float b_s[TILE];
    float tile_top = top;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t key = tile + j;
      if (p_mask && !p_mask[key * call.mask.stride[3]]) {
        b_s[j] = -INFINITE;
        continue;
      }
      const float* b_k = contiguous({at<float>(call.k, i_b, i_hkv, key), call.k.stride[3]}, dim, b_gathered);
      b_s[j] = scale * dot(b_q, b_k, dim) + (p_bias ? p_bias[key * call.bias.stride[3]] : 0.0f);
      tile_top = std::max(tile_top, b_s[j]);
    }
    // While no key has been seen the maximum is -inf; 0 in its place keeps exp(-inf - -inf) from being NaN.
    const float shift = tile_top == -INFINITE ? 0.0f : tile_top;
    const float fade = std::exp(top - shift);
    float tile_sum = 0;
    std::fill_n(b_tile_out, dim_v, 0.0f);
    for (int64_t j = 0; j < size; ++j) {
      const float p = std::exp(b_s[j] - shift);
      if (p == 0) continue;  // an unseen key: whatever its value holds, even NaN, stays out
      tile_sum += p;
      const float* b_v = contiguous({at<float>(call.v, i_b, i_hkv, tile + j), call.v.stride[3]}, dim_v, b_gathered);
      for (int64_t d = 0; d < dim_v; ++d) b_tile_out[d] += p * b_v[d];
    }
    for (int64_t d = 0; d < dim_v; ++d) b_out[d] = b_out[d] * fade + b_tile_out[d];
    sum = sum * fade + tile_sum;
    top = tile_top;
  }

  const bool is_empty = sum == 0;
  float* p_out = const_cast<float*>(at<float>(call.out, i_b, i_h, i_q));
  for (int64_t d = 0; d < dim_v; ++d) p_out[d * call.out.stride[3]] = is_empty ? 0.0f : b_out[d] / sum;
  if (call.lse.data) *const_cast<float*>(at<float>(call.lse, i_b, i_h, i_q)) = is_empty ? -INFINITE : top + std::log(sum);
}

void forward_task(const void* context, int worker, int64_t task) noexcept {
  const auto& f = *static_cast<const Forward*>(context);
  const int64_t head = task / f.tasks_per_head;
  const int64_t first = task % f.tasks_per_head * ROWS_PER_TASK;
  const int64_t end = std::min(first + ROWS_PER_TASK, f.call.seq_q);
  for (int64_t i_q = first; i_q < end; ++i_q) {
    f.row(head / f.call.heads, head % f.call.heads, i_q, f.scratch + worker * f.scratch_size);
  }
}

}  // namespace

void forward_scalar(const fm_attention& call) {
  const int64_t tasks_per_head = (call.seq_q + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  const int64_t tasks = call.batch * call.heads * tasks_per_head;
  if (tasks == 0) return;
  const int workers = worker_count(call.threads, tasks);
  // Workers' memories are a cache line apart, lest they slow each other down.
  const int64_t scratch_size = Forward::scratch_floats(call) + 16;
  std::vector<float> scratch(static_cast<size_t>(workers * scratch_size));
  const Forward f{call, call.heads / call.kv_heads, tasks_per_head, scratch_size, scratch.data()};
  parallel_for(workers, tasks, forward_task, &f);
}

}  // namespace fm
