// The engine's small matrix without Python, for sanitizers and emulated processors: every instruction set, dtype and option,
// sizes about the edges of vectors and tiles, tensors that end where their memory does. Results are compared with the scalar
// engine's.
//
//     driver CALLS SEED THREADS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "abi/fusemesh.h"

namespace {

std::mt19937_64 draw;

int64_t pick(std::initializer_list<int64_t> values) { return *(values.begin() + draw() % values.size()); }
bool maybe(double share = 0.5) { return draw() % 1000 < 1000 * share; }

int64_t bytes_of(int32_t dtype) { return dtype == FM_F32 || dtype == FM_I32 ? 4 : dtype == FM_U8 ? 1 : dtype == FM_I64 ? 8 : 2; }

void put(char* at, int32_t dtype, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == FM_F32) {
    std::memcpy(at, &x, 4);
  } else if (dtype == FM_BF16) {
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(at, &half, 2);
  } else {  // f16: numbers between 2^-14 and 2^15 in size, or 0
    const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
    const uint16_t half = exponent <= 0 ? 0 : static_cast<uint16_t>((bits >> 16 & 0x8000u) | exponent << 10 | (bits >> 13 & 1023));
    std::memcpy(at, &half, 2);
  }
}

float get(const char* at, int32_t dtype) {
  uint32_t bits = 0;
  uint16_t half;
  if (dtype == FM_F32) {
    std::memcpy(&bits, at, 4);
  } else {
    std::memcpy(&half, at, 2);
    if (dtype == FM_BF16) {
      bits = static_cast<uint32_t>(half) << 16;
    } else {
      const float x = std::ldexp(half & 0x7c00 ? 1024.0f + (half & 1023) : 2.0f * (half & 1023), ((half >> 10) & 31) - 25);
      return half & 0x8000 ? -x : x;
    }
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A tensor in memory of its own, just as large as its strides need; sometimes with a last dimension that is not the
// innermost one.
struct Tensor {
  fm_tensor t{};
  int64_t size[4];
  std::unique_ptr<char[]> memory;
  int64_t elements = 0;

  Tensor(int32_t dtype, int64_t a, int64_t b, int64_t c, int64_t d, bool may_permute = true) : size{a, b, c, d} {
    int order[4] = {3, 2, 1, 0};
    if (may_permute && maybe(0.3)) std::swap(order[1], order[2]);
    if (may_permute && maybe(0.15)) std::swap(order[0], order[1]);
    int64_t stride = 1;
    elements = 1;
    for (int i : order) {
      t.stride[i] = stride;
      stride *= size[i];
      elements *= size[i];
    }
    t.dtype = dtype;
    memory.reset(new char[static_cast<size_t>(elements * bytes_of(dtype)) + (elements == 0)]);
    t.data = elements ? memory.get() : nullptr;
    std::memset(memory.get(), 0xff, static_cast<size_t>(elements * bytes_of(dtype)));  // NaN
  }
  Tensor& fill(float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < elements; ++i) put(memory.get() + i * bytes_of(t.dtype), t.dtype, normal(draw));
    return *this;
  }
  void clear() { std::memset(memory.get(), 0, static_cast<size_t>(elements * bytes_of(t.dtype))); }
  std::vector<float> values() const {
    std::vector<float> found(static_cast<size_t>(elements));
    for (int64_t i = 0; i < elements; ++i) found[i] = get(memory.get() + i * bytes_of(t.dtype), t.dtype);
    return found;
  }
};

// A view of the same tensor with broadcast dimensions.
Tensor broadcastable(int32_t dtype, const int64_t* full, fm_tensor& view) {
  int64_t size[4];
  for (int i = 0; i < 4; ++i) size[i] = maybe() ? full[i] : (full[i] ? 1 : 0);
  Tensor made(dtype, size[0], size[1], size[2], size[3]);
  view = made.t;
  for (int i = 0; i < 4; ++i) {
    if (size[i] != full[i]) view.stride[i] = 0;
  }
  return made;
}

int failures = 0;

void must(int32_t status, const char* what) {
  if (status != FM_OK) {
    std::printf("%s: %s\n", what, fm_last_error());
    ++failures;
  }
}

// `terms`: about how large the terms are of which a result is the sum. It may be far smaller where they cancel, and is off by
// a part of them: the gradient of the scores of rows that see one key is nothing but rounding.
void compare(const char* name, const std::vector<float>& want, const std::vector<float>& got, int32_t dtype, double terms,
             const char* isa) {
  double most = 0, worst = 0;
  for (float x : want) {
    if (std::isfinite(x)) most = std::fmax(most, std::fabs(x));
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = want[i] == got[i] ? 0 : std::fabs(static_cast<double>(want[i]) - got[i]);
    worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
  }
  const double allowed = (terms + most) * (dtype == FM_F32 ? 1e-4 : dtype == FM_BF16 ? 0.1 : 1e-2);
  if (!(worst <= allowed)) {
    std::printf("%s on %s: off by %g, allowed %g\n", name, isa, worst, allowed);
    ++failures;
  }
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  std::string all = fm_isas();
  for (size_t at = 0; at != std::string::npos;) {
    const size_t comma = all.find(", ", at);
    found.push_back(all.substr(at, comma == std::string::npos ? comma : comma - at));
    at = comma == std::string::npos ? comma : comma + 2;
  }
  return {found.rbegin(), found.rend()};  // scalar first
}

fm_attention sizes(int threads) {
  fm_attention call{};
  call.struct_size = sizeof call;
  call.abi_version = FM_ABI_VERSION;
  call.kv_heads = pick({1, 1, 2, 3});
  call.heads = call.kv_heads * pick({1, 2, 4});
  call.batch = pick({1, 2, 3});
  call.seq_q = pick({0, 1, 2, 15, 17, 63, 64, 65, 130});
  call.seq_k = pick({0, 1, 2, 15, 33, 95, 96, 97, 200});
  call.dim = pick({1, 7, 16, 17, 32, 40, 64, 80});
  call.dim_v = pick({1, 9, 16, 31, 32, 48, 64, 72});
  call.window_left = maybe(0.7) ? -1 : pick({0, 5, 40});
  call.window_right = maybe(0.5) ? -1 : pick({0, 3, 50});
  call.scale = maybe(0.8) ? 1 / std::sqrt(static_cast<double>(call.dim)) : pick({-1, 0, 1}) * 0.3;
  call.softcap = maybe(0.7) ? 0 : 3;
  call.threads = threads;
  return call;
}

int32_t any_dtype() { return static_cast<int32_t>(pick({FM_F32, FM_F32, FM_BF16, FM_BF16, FM_F16})); }

void attention(int threads) {
  fm_attention call = sizes(threads);
  const int32_t dtype = any_dtype();
  const int64_t full[4] = {call.batch, call.heads, call.seq_q, call.seq_k};
  const bool is_packed = maybe(0.3);
  int64_t total_q = call.seq_q, total_k = call.seq_k, batch = call.batch;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  if (is_packed) {
    for (int64_t b = 0; b < call.batch; ++b) {
      cu_q.push_back(cu_q.back() + static_cast<int32_t>(call.seq_q ? draw() % (call.seq_q + 1) : 0));
      cu_k.push_back(cu_k.back() + static_cast<int32_t>(call.seq_k ? draw() % (call.seq_k + 1) : 0));
    }
    total_q = cu_q.back();
    total_k = cu_k.back();
    batch = 1;
    call.cu_seqlens_q = {cu_q.data(), {1, 0, 0, 0}, FM_I32, 0};
    call.cu_seqlens_k = {cu_k.data(), {1, 0, 0, 0}, FM_I32, 0};
    call.align = maybe() ? FM_BOTTOM_RIGHT : FM_ORIGIN;
  } else {
    call.origin_q = pick({0, 7, -3});
    call.origin_k = pick({0, 4});
  }
  Tensor q(dtype, batch, call.heads, total_q, call.dim), k(dtype, batch, call.kv_heads, total_k, call.dim);
  Tensor v(dtype, batch, call.kv_heads, total_k, call.dim_v), dout(dtype, batch, call.heads, total_q, call.dim_v);
  q.fill(), k.fill(), v.fill(), dout.fill();
  Tensor slopes(FM_F32, call.batch, call.heads, 1, 1, false), sinks(FM_F32, 1, call.heads, 1, 1, false);
  Tensor dlse(FM_F32, batch, call.heads, total_q, 1, false);
  slopes.fill(0.1f), sinks.fill(), dlse.fill();
  call.q = q.t, call.k = k.t, call.v = v.t;
  Tensor bias = broadcastable(maybe() ? FM_F32 : dtype, full, call.bias), mask = broadcastable(FM_U8, full, call.mask);
  const fm_tensor bias_view = call.bias;
  bias.fill();
  for (int64_t i = 0; i < mask.elements; ++i) mask.memory[i] = maybe(0.7);
  if (maybe(0.6)) call.bias = {};
  if (maybe(0.7)) call.mask = {};
  if (maybe(0.3) && slopes.elements) call.alibi_slopes = {slopes.t.data, {call.heads, 1, 0, 0}, FM_F32, 0};
  const bool has_sinks = maybe(0.3) && sinks.elements;
  if (has_sinks) call.sinks = {sinks.t.data, {0, 1, 0, 0}, FM_F32, 0};
  if (maybe(0.3)) call.dropout_p = 0.25, call.seed = 12345678901234567ull;
  const bool has_dlse = maybe(0.3), has_dbias = call.bias.data && maybe(0.7);

  std::vector<std::vector<float>> first;
  for (const std::string& isa : isas()) {
    must(fm_set_isa(isa.c_str()), "fm_set_isa");
    Tensor out(dtype, batch, call.heads, total_q, call.dim_v), lse(FM_F32, batch, call.heads, total_q, 1, false);
    call.out = out.t, call.lse = lse.t;
    if (is_packed) {
      for (fm_tensor* t : {&call.q, &call.k, &call.v, &call.out, &call.lse}) t->stride[0] = 0;
    }
    must(fm_attention_forward(&call), "forward");
    fm_gradients g{};
    g.struct_size = sizeof g;
    Tensor dq(dtype, batch, call.heads, total_q, call.dim), dk(dtype, batch, call.kv_heads, total_k, call.dim);
    Tensor dv(dtype, batch, call.kv_heads, total_k, call.dim_v);
    Tensor dbias(FM_F32, bias.size[0], bias.size[1], bias.size[2], bias.size[3], false);
    Tensor rows(FM_F32, batch, call.heads, total_q, 1, false);
    dbias.clear();
    g.dout = dout.t, g.dq = dq.t, g.dk = dk.t, g.dv = dv.t;
    if (has_dlse) g.dlse = dlse.t;
    if (has_sinks) g.dsink_rows = rows.t;
    if (has_dbias) {
      g.dbias = dbias.t;
      for (int i = 0; i < 4; ++i) {
        if (bias_view.stride[i] == 0) g.dbias.stride[i] = 0;
      }
    }
    if (is_packed) {
      for (fm_tensor* t : {&g.dout, &g.dq, &g.dk, &g.dv, &g.dlse, &g.dsink_rows}) t->stride[0] = 0;
    }
    must(fm_attention_backward(&call, &g), "backward");
    const char* names[] = {"out", "lse", "dq", "dk", "dv", "dbias"};
    // Positions in memory differ where strides do, so only like layouts are compared: those of outputs are drawn anew.
    std::vector<std::vector<float>> found;
    for (const Tensor* x : {&out, &lse, &dq, &dk, &dv, &dbias}) {
      std::vector<float> sorted;
      for (int64_t a = 0; a < x->size[0]; ++a) {
        for (int64_t b = 0; b < x->size[1]; ++b) {
          for (int64_t c = 0; c < x->size[2]; ++c) {
            for (int64_t d = 0; d < x->size[3]; ++d) {
              const int64_t at = a * x->t.stride[0] + b * x->t.stride[1] + c * x->t.stride[2] + d * x->t.stride[3];
              sorted.push_back(get(x->memory.get() + at * bytes_of(x->t.dtype), x->t.dtype));
            }
          }
        }
      }
      found.push_back(sorted);
    }
    if (first.empty()) first = found;
    for (size_t i = 0; i < found.size(); ++i) {
      const bool is_of_scores = i == 2 || i == 3 || i == 5;  // made of products of dout and v
      compare(names[i], first[i], found[i], i == 1 ? FM_F32 : dtype, is_of_scores ? std::sqrt(call.dim_v) : 1, isa.c_str());
    }
  }
}

void decode(int threads) {
  fm_attention call = sizes(threads);
  call.seq_q = pick({1, 1, 2, 5});
  const int32_t dtype = any_dtype();
  fm_cache cache{};
  cache.struct_size = sizeof cache;
  cache.page = pick({0, 1, 16, 17});
  call.seq_k = cache.page ? cache.page * pick({1, 3, 8}) : pick({1, 40, 130, 2000});
  const int64_t pages = cache.page ? call.seq_k / cache.page * call.batch + 1 : 0;
  cache.pages = pages;
  cache.added = pick({0, 0, 1, 3});
  if (cache.added > call.seq_k) cache.added = 1;
  Tensor q(dtype, call.batch, call.heads, call.seq_q, call.dim);
  Tensor k(dtype, pages ? pages : call.batch, call.kv_heads, pages ? cache.page : call.seq_k, call.dim);
  Tensor v(dtype, k.size[0], call.kv_heads, k.size[2], call.dim_v);
  Tensor k_new(dtype, call.batch, call.kv_heads, cache.added, call.dim), v_new(dtype, call.batch, call.kv_heads, cache.added, call.dim_v);
  q.fill(), k.fill(), v.fill(), k_new.fill(), v_new.fill();
  std::vector<int64_t> lens, starts;
  std::vector<int32_t> table;
  for (int64_t b = 0; b < call.batch; ++b) {
    lens.push_back(static_cast<int64_t>(draw() % (call.seq_k - cache.added + 1)));
    starts.push_back(static_cast<int64_t>(draw() % (lens.back() + 1)));
    for (int64_t i = 0; pages && i < call.seq_k / cache.page; ++i) {
      table.push_back(static_cast<int32_t>(b * (call.seq_k / cache.page) + i + 1));
    }
  }
  call.q = q.t, call.k = k.t, call.v = v.t;
  cache.cache_lens = {lens.data(), {1, 0, 0, 0}, FM_I64, 0};
  if (maybe(0.3)) cache.cache_starts = {starts.data(), {1, 0, 0, 0}, FM_I64, 0};
  if (pages) cache.block_table = {table.data(), {call.seq_k / cache.page, 1, 0, 0}, FM_I32, 0};
  if (cache.added) cache.k_new = k_new.t, cache.v_new = v_new.t;
  std::vector<float> first;
  for (const std::string& isa : isas()) {
    must(fm_set_isa(isa.c_str()), "fm_set_isa");
    Tensor out(dtype, call.batch, call.heads, call.seq_q, call.dim_v, false);
    call.out = out.t;
    must(fm_attention_decode(&call, &cache), "decode");
    if (first.empty()) first = out.values();
    compare("decode", first, out.values(), dtype, 1, isa.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 100;
  draw.seed(count > 2 ? static_cast<uint64_t>(std::atoi(arguments[2])) : 0);
  const int threads = count > 3 ? std::atoi(arguments[3]) : 2;
  for (int i = 0; i < calls && failures < 10; ++i) {
    attention(threads);
    decode(threads);
  }
  std::printf("%d calls of each kind on %s, %d failures\n", calls, fm_isas(), failures);
  return failures > 0;
}
