// The engine's C ABI (fusemesh.h): reads the caller's struct, checks it, computes, and turns every failure into a status.

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>

#include "attention.h"
#include "fusemesh.h"
#include "threading.h"

#ifndef FM_VERSION
#define FM_VERSION "unknown"
#endif
#ifndef FM_SOURCES
#define FM_SOURCES "unknown"
#endif

namespace {

constexpr int64_t FARTHEST = int64_t{1} << 60;  // positions beyond would overflow when they are subtracted

thread_local char last_error[512] = "";

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t
fail(fm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

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

// Copies the caller's struct into this engine's: what the caller does not know is zero, what this engine does not know
// must be.
int32_t read_call(const fm_attention* given, fm_attention& call) {
  if (!given) return fail(FM_INVALID, "call: expected a pointer to fm_attention, received NULL");
  if (given->abi_version != FM_ABI_VERSION) {
    return fail(FM_INVALID, "abi_version: this engine speaks %d, received %u; rebuild whichever is older", FM_ABI_VERSION,
                given->abi_version);
  }
  const size_t size = given->struct_size;
  if (size < sizeof(fm_attention)) {
    return fail(FM_INVALID, "struct_size: expected at least %zu bytes, the first version's, received %zu",
                sizeof(fm_attention), size);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(fm_attention); i < size; ++i) {
    if (bytes[i]) {
      return fail(FM_UNSUPPORTED, "struct_size: byte %zu sets an option that this engine, which knows %zu bytes, lacks", i,
                  sizeof(fm_attention));
    }
  }
  std::memcpy(&call, given, sizeof(fm_attention));
  return FM_OK;
}

int32_t check_tensor(const char* name, const fm_tensor& tensor, bool is_required, int32_t dtype) {
  if (!tensor.data) {
    if (is_required) return fail(FM_INVALID, "%s: expected a tensor, received NULL", name);
    return FM_OK;
  }
  if (tensor.dtype != dtype) {
    const bool is_known = tensor.dtype > FM_NONE && tensor.dtype <= FM_I64;
    return fail(is_known ? FM_UNSUPPORTED : FM_INVALID, "%s: this engine computes with dtype %s, received %s (%d)", name,
                name_of(dtype), name_of(tensor.dtype), tensor.dtype);
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
  const double rows = static_cast<double>(call.batch) * call.heads * call.seq_q;
  if (rows > FARTHEST || call.seq_k > FARTHEST || call.dim > (1 << 24) || call.dim_v > (1 << 24)) {
    return fail(FM_INVALID, "sizes: expected batch * heads * seq_q and seq_k up to 2^60, dim and dim_v up to 2^24");
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
  if (call.threads < 0) return fail(FM_INVALID, "threads: expected at least 0, received %d", call.threads);
  if (call.flags || call.reserved) {
    return fail(FM_UNSUPPORTED, "flags: this engine defines none, received %u", call.flags | call.reserved);
  }
  return FM_OK;
}

// The options of the contract that this engine does not compute.
int32_t check_supported(const fm_attention& call) {
  const char* name = call.alibi_slopes.data                                ? "alibi_slopes"
                     : call.sinks.data                                     ? "sinks"
                     : call.cu_seqlens_q.data || call.cu_seqlens_k.data    ? "cu_seqlens"
                     : call.softcap != 0                                   ? "softcap"
                     : call.dropout_p != 0                                 ? "dropout_p"
                                                                           : nullptr;
  if (name) return fail(FM_UNSUPPORTED, "%s: this engine does not compute it; leave it out or use another backend", name);
  return FM_OK;
}

int32_t check(const fm_attention& call) {
  if (int32_t status = check_sizes(call)) return status;
  if (int32_t status = check_options(call)) return status;
  if (int32_t status = check_supported(call)) return status;
  const bool has_rows = call.batch > 0 && call.heads > 0 && call.seq_q > 0;
  const bool has_keys = has_rows && call.seq_k > 0;
  if (int32_t status = check_tensor("q", call.q, has_keys && call.dim > 0, FM_F32)) return status;
  if (int32_t status = check_tensor("k", call.k, has_keys && call.dim > 0, FM_F32)) return status;
  if (int32_t status = check_tensor("v", call.v, has_keys && call.dim_v > 0, FM_F32)) return status;
  if (int32_t status = check_tensor("out", call.out, has_rows && call.dim_v > 0, FM_F32)) return status;
  if (int32_t status = check_tensor("lse", call.lse, false, FM_F32)) return status;
  if (int32_t status = check_tensor("mask", call.mask, false, FM_U8)) return status;
  return check_tensor("bias", call.bias, false, FM_F32);
}

}  // namespace

extern "C" {

FM_API int32_t fm_attention_forward(const fm_attention* given) {
  try {
    fm_attention call;
    if (int32_t status = read_call(given, call)) return status;
    if (int32_t status = check(call)) return status;
    if (call.align == FM_BOTTOM_RIGHT) call.origin_q += call.seq_k - call.seq_q;
    fm::forward_scalar(call);
    return FM_OK;
  } catch (const std::bad_alloc&) {
    return fail(FM_OUT_OF_MEMORY, "scratch memory for the threads could not be allocated");
  } catch (const std::exception& error) {
    return fail(FM_INTERNAL, "%s", error.what());
  } catch (...) {
    return fail(FM_INTERNAL, "an exception of unknown type");
  }
}

FM_API const char* fm_last_error(void) { return last_error; }

FM_API int32_t fm_abi_version(void) { return FM_ABI_VERSION; }

FM_API const char* fm_build_info(void) {
  return "version=" FM_VERSION "; sources=" FM_SOURCES "; compiler=" __VERSION__ "; isa=scalar";
}

FM_API const char* fm_thread_runtime(void) {
  thread_local std::string runtime;
  try {
    runtime = fm::thread_runtime();
    return runtime.c_str();
  } catch (...) {
    return "std::thread";
  }
}

}  // extern "C"
