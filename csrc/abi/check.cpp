// Checks of the ABI's structs.

#include "abi/check.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "engine/attention.h"

namespace fm {
namespace {

constexpr int64_t FARTHEST = int64_t{1} << 60;  // positions beyond would overflow when they are subtracted

thread_local char message[512] = "";

const char* name_of(int32_t dtype) {
  switch (dtype) {
    case FM_NONE: return "none";
    case FM_F32: return "f32";
    case FM_BF16: return "bf16";
    case FM_F16: return "f16";
    case FM_U8: return "u8";
    case FM_I32: return "i32";
    case FM_I64: return "i64";
    default: return "unknown";
  }
}

template <typename Struct>
int32_t read_struct(const Struct* given, Struct& known, const char* type) {
  const size_t size = given->struct_size;
  if (size < sizeof(Struct)) {
    return fail(FM_INVALID, "struct_size: expected at least %zu bytes, the first version's of %s, received %zu",
                sizeof(Struct), type, size);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i]) {
      return fail(FM_UNSUPPORTED, "struct_size: byte %zu of %s sets an option that this engine, which knows %zu bytes, lacks",
                  i, type, sizeof(Struct));
    }
  }
  std::memcpy(&known, given, sizeof(Struct));
  return FM_OK;
}

int32_t check_tensor(const char* name, const fm_tensor& tensor, bool is_required, int32_t dtype, int32_t other = FM_NONE) {
  if (!tensor.data) {
    if (is_required) return fail(FM_INVALID, "%s: expected a tensor, received NULL", name);
    return FM_OK;
  }
  if (tensor.dtype != dtype && (other == FM_NONE || tensor.dtype != other)) {
    const bool is_known = tensor.dtype > FM_NONE && tensor.dtype <= FM_I64;
    return fail(is_known ? FM_UNSUPPORTED : FM_INVALID, "%s: this engine expected dtype %s%s%s, received %s (%d)", name,
                name_of(dtype), other && other != dtype ? " or " : "", other && other != dtype ? name_of(other) : "", name_of(tensor.dtype), tensor.dtype);
  }
  return FM_OK;
}

int32_t check_sizes(const fm_attention& call) {
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"batch", call.batch}, {"heads", call.heads}, {"kv_heads", call.kv_heads}, {"seq_q", call.seq_q},
               {"seq_k", call.seq_k}, {"dim", call.dim},     {"dim_v", call.dim_v}};
  for (const auto& size : sizes) {
    if (size.value < 0) return fail(FM_INVALID, "%s: expected at least 0, received %" PRId64, size.name, size.value);
  }
  if (call.heads > 0 && (call.kv_heads == 0 || call.heads % call.kv_heads != 0)) {
    return fail(FM_INVALID, "heads: expected a multiple of kv_heads = %" PRId64 ", received %" PRId64, call.kv_heads,
                call.heads);
  }
  // Far above any memory, and low enough that products and sums of sizes stay within 64 bits.
  const double batch = static_cast<double>(call.batch > 0 ? call.batch : 1), dims = static_cast<double>(call.dim) + call.dim_v + 64;
  const double rows = batch * (call.heads > 0 ? call.heads : 1) * (call.seq_q + 64.0);
  const double keys = batch * (call.kv_heads > 0 ? call.kv_heads : 1) * (call.seq_k + 96.0);
  if (call.dim > (1 << 24) || call.dim_v > (1 << 24) || rows * dims > FARTHEST / 64.0 || keys * dims > FARTHEST / 64.0 || call.batch > (int64_t{1} << 40)) {
    return fail(FM_INVALID, "sizes: expected dims up to 2^24, batch up to 2^40, and tensors of up to 2^54 elements");
  }
  return FM_OK;
}

int32_t check_options(const fm_attention& call) {
  const struct {
    const char* name;
    int64_t value;
  } origins[] = {{"origin_q", call.origin_q},
                 {"origin_k", call.origin_k},
                 {"origin_head", call.origin_head},
                 {"origin_batch", call.origin_batch}};
  for (const auto& origin : origins) {
    if (origin.value > FARTHEST || origin.value < -FARTHEST) {
      return fail(FM_INVALID, "%s: expected a position within +-2^60, received %" PRId64, origin.name, origin.value);
    }
  }
  if (call.window_left < -1 || call.window_right < -1) {
    return fail(FM_INVALID, "window: expected sides of at least 0, or -1 for open, received (%" PRId64 ", %" PRId64 ")",
                call.window_left, call.window_right);
  }
  if (call.align != FM_ORIGIN && call.align != FM_BOTTOM_RIGHT) {
    return fail(FM_INVALID, "align: expected 0 (origin) or 1 (bottom right), received %d", call.align);
  }
  if (!(call.dropout_p >= 0 && call.dropout_p < 1)) {
    return fail(FM_INVALID, "dropout_p: expected at least 0 and below 1, received %g", call.dropout_p);
  }
  if (call.softcap != 0 && !(call.softcap > 1e-37 && call.softcap < 1e38)) {
    return fail(FM_INVALID, "softcap: expected 0, or a number that fp32 holds above 0, received %g", call.softcap);
  }
  if (!call.cu_seqlens_q.data != !call.cu_seqlens_k.data) {
    return fail(FM_INVALID, "cu_seqlens: expected both of them or none, received cu_seqlens_%s alone",
                call.cu_seqlens_q.data ? "q" : "k");
  }
  if (call.threads < 0) return fail(FM_INVALID, "threads: expected at least 0, received %d", call.threads);
  if (call.flags || call.reserved) {
    return fail(FM_UNSUPPORTED, "flags: this engine defines none, received %u", call.flags | call.reserved);
  }
  return FM_OK;
}

// Whether any sequence has a row: of queries by cu_seqlens_q, of keys by cu_seqlens_k.
bool has_rows(const fm_attention& call, const fm_tensor& cu, int64_t longest) {
  if (call.batch == 0 || call.heads == 0) return false;
  return cu.data ? number(cu, call.batch) > number(cu, 0) : longest > 0;
}

int32_t check_lengths(const char* name, const fm_tensor& cu, int64_t batch, int64_t longest) {
  if (int32_t status = check_tensor(name, cu, false, FM_I32, FM_I64)) return status;
  int64_t before = 0;
  for (int64_t b = 0; cu.data && b <= batch; ++b) {
    const int64_t at = number(cu, b);
    if (at < before) {
      return fail(FM_INVALID, "%s: expected numbers that do not fall, from 0, received %" PRId64 " after %" PRId64, name, at,
                  before);
    }
    if (b > 0 && at - before > longest) {
      return fail(FM_INVALID, "%s: expected no length above the longest, %" PRId64 ", received one of %" PRId64, name, longest,
                  at - before);
    }
    before = at;
  }
  return FM_OK;
}

}  // namespace

int32_t fail(fm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

const char* last_error() { return message; }

int32_t dtype_of(const fm_attention& call) { return call.q.data ? call.q.dtype : call.k.data ? call.k.dtype : call.v.dtype; }

int32_t read_call(const fm_attention* given, fm_attention& call) {
  if (!given) return fail(FM_INVALID, "call: expected a pointer to fm_attention, received NULL");
  if (given->abi_version != FM_ABI_VERSION) {
    return fail(FM_INVALID, "abi_version: this engine speaks %d, received %u; rebuild whichever is older", FM_ABI_VERSION,
                given->abi_version);
  }
  return read_struct(given, call, "fm_attention");
}

int32_t read_gradients(const fm_gradients* given, fm_gradients& gradients) {
  if (!given) return fail(FM_INVALID, "gradients: expected a pointer to fm_gradients, received NULL");
  return read_struct(given, gradients, "fm_gradients");
}

int32_t read_cache(const fm_cache* given, fm_cache& cache) {
  if (!given) return fail(FM_INVALID, "cache: expected a pointer to fm_cache, received NULL");
  return read_struct(given, cache, "fm_cache");
}

int32_t check(const fm_attention& call) {
  if (int32_t status = check_sizes(call)) return status;
  if (int32_t status = check_options(call)) return status;
  if (int32_t status = check_lengths("cu_seqlens_q", call.cu_seqlens_q, call.batch, call.seq_q)) return status;
  if (int32_t status = check_lengths("cu_seqlens_k", call.cu_seqlens_k, call.batch, call.seq_k)) return status;
  const bool has_queries = has_rows(call, call.cu_seqlens_q, call.seq_q);
  const bool has_keys = has_rows(call, call.cu_seqlens_k, call.seq_k);
  const bool has_both = has_queries && has_keys;
  const int32_t dtype = dtype_of(call);
  if (dtype != FM_NONE && dtype != FM_F32 && dtype != FM_BF16 && dtype != FM_F16) {
    const bool is_known = dtype > FM_NONE && dtype <= FM_I64;
    return fail(is_known ? FM_UNSUPPORTED : FM_INVALID, "q: this engine expected dtype f32, bf16 or f16, received %s (%d)",
                name_of(dtype), dtype);
  }
  const struct {
    const char* name;
    const fm_tensor& tensor;
    bool is_required;
    int32_t dtype, other;
  } tensors[] = {
      {"q", call.q, has_both && call.dim > 0, dtype, FM_NONE},
      {"k", call.k, has_both && call.dim > 0, dtype, FM_NONE},
      {"v", call.v, has_both && call.dim_v > 0, dtype, FM_NONE},
      {"out", call.out, has_queries && call.dim_v > 0, dtype ? dtype : call.out.dtype, FM_F32},
      {"lse", call.lse, false, FM_F32, FM_NONE},
      {"mask", call.mask, false, FM_U8, FM_NONE},
      {"bias", call.bias, false, FM_F32, dtype},
      {"alibi_slopes", call.alibi_slopes, false, FM_F32, FM_NONE},
      {"sinks", call.sinks, false, FM_F32, FM_NONE},
  };
  for (const auto& t : tensors) {
    if (int32_t status = check_tensor(t.name, t.tensor, t.is_required, t.dtype, t.other)) return status;
  }
  return FM_OK;
}

int32_t check(const fm_attention& call, const fm_gradients& g) {
  if (int32_t status = check(call)) return status;
  if (g.reserved) return fail(FM_UNSUPPORTED, "reserved: this engine defines none, received %u", g.reserved);
  const bool has_queries = has_rows(call, call.cu_seqlens_q, call.seq_q);
  const bool has_keys = has_rows(call, call.cu_seqlens_k, call.seq_k);
  const struct {
    const char* name;
    const fm_tensor& tensor;
    bool is_required;
    int32_t dtype;
  } tensors[] = {
      {"lse", call.lse, has_queries, FM_F32},
      {"dout", g.dout, has_queries && call.dim_v > 0, dtype_of(call)},
      {"dlse", g.dlse, false, FM_F32},
      {"dq", g.dq, has_queries && call.dim > 0, dtype_of(call)},
      {"dk", g.dk, has_keys && call.dim > 0, dtype_of(call)},
      {"dv", g.dv, has_keys && call.dim_v > 0, dtype_of(call)},
      {"dbias", g.dbias, false, FM_F32},
      {"dsink_rows", g.dsink_rows, false, FM_F32},
  };
  for (const auto& t : tensors) {
    if (int32_t status = check_tensor(t.name, t.tensor, t.is_required, t.dtype)) return status;
  }
  return FM_OK;
}

int32_t check(const fm_attention& call, const fm_cache& cache) {
  if (int32_t status = check(call)) return status;
  const char* name = call.cu_seqlens_q.data           ? "cu_seqlens"
                     : call.dropout_p != 0            ? "dropout_p"
                     : call.align != FM_ORIGIN        ? "align"
                     : call.origin_q || call.origin_k || call.origin_head || call.origin_batch ? "origin"
                                                      : nullptr;
  if (name) return fail(FM_INVALID, "%s: decode takes none; leave it out", name);
  if (cache.block_table.data && (cache.page <= 0 || cache.pages <= 0) && call.seq_k > 0) {
    return fail(FM_INVALID, "page, pages: expected numbers above 0 with a block_table, received %" PRId64 " and %" PRId64,
                cache.page, cache.pages);
  }
  if (cache.reserved) return fail(FM_UNSUPPORTED, "reserved: this engine defines none, received %u", cache.reserved);
  if (cache.v_new.data && !cache.k_new.data) return fail(FM_INVALID, "v_new: expected NULL without k_new, received a tensor");
  if (cache.k_new.data && (!call.k.data || (cache.v_new.data && !call.v.data))) {
    return fail(FM_INVALID, "k_new: expected a cache to write it to, received NULL");
  }
  if (cache.added < 0 || cache.added > call.seq_k) {
    return fail(FM_INVALID, "added: expected from 0 to seq_k = %" PRId64 ", received %" PRId64, call.seq_k, cache.added);
  }
  const bool is_needed = call.batch > 0;
  if (int32_t status = check_tensor("cache_lens", cache.cache_lens, is_needed, FM_I32, FM_I64)) return status;
  if (int32_t status = check_tensor("cache_starts", cache.cache_starts, false, FM_I32, FM_I64)) return status;
  if (int32_t status = check_tensor("block_table", cache.block_table, false, FM_I32, FM_I64)) return status;
  if (int32_t status = check_tensor("k_new", cache.k_new, false, call.k.dtype)) return status;
  return check_tensor("v_new", cache.v_new, false, call.k.dtype);
}

}  // namespace fm
