// The engine's C ABI (fusemesh.h): reads the caller's structs, has them checked, lays out the sequences, and turns every
// failure into a status.

#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "engine/attention.h"
#include "abi/check.h"
#include "abi/fusemesh.h"
#include "engine/threading.h"

#ifndef FM_VERSION
#define FM_VERSION "unknown"
#endif
#ifndef FM_SOURCES
#define FM_SOURCES "unknown"
#endif

namespace fm {
namespace {

template <typename Compute>
int32_t guarded(Compute compute) {
  try {
    return compute();
  } catch (const std::bad_alloc&) {
    return fail(FM_OUT_OF_MEMORY, "scratch memory could not be allocated");
  } catch (const std::exception& error) {
    return fail(FM_INTERNAL, "%s", error.what());
  } catch (...) {
    return fail(FM_INTERNAL, "an exception of unknown type");
  }
}

// A problem and the memory of its sequences.
struct Layout {
  fm_attention call;
  std::vector<Sequence> sequences;
  Problem problem;

  // Sequences one after the other, each with as many blocks and keys as it needs.
  void add(Sequence s) {
    s.key_rows = problem.key_rows;
    s.blocks = problem.blocks;
    problem.key_rows += s.keys + s.keys % 2;
    problem.blocks += blocks_of(s.queries, problem.group);
    sequences.push_back(s);
  }

  void start() {
    problem = Problem{&call, nullptr, 0, 0, call.kv_heads > 0 ? call.heads / call.kv_heads : 1, dtype_of(call)};
    sequences.reserve(static_cast<size_t>(call.batch));
    // No distance is larger; sums with it stay within 64 bits.
    constexpr int64_t FAR = int64_t{1} << 61;
    if (call.window_left > FAR) call.window_left = FAR;
    if (call.window_right > FAR) call.window_right = FAR;
  }

  // Whole sequences, packed or not.
  void lay_out() {
    start();
    for (int64_t b = 0; b < call.batch; ++b) {
      Sequence s{};
      s.queries = call.seq_q;
      s.keys = call.seq_k;
      if (call.cu_seqlens_q.data) {
        s.first_q = number(call.cu_seqlens_q, b);
        s.first_k = number(call.cu_seqlens_k, b);
        s.queries = number(call.cu_seqlens_q, b + 1) - s.first_q;
        s.keys = number(call.cu_seqlens_k, b + 1) - s.first_k;
      }
      s.ahead = call.origin_q - call.origin_k + (call.align == FM_BOTTOM_RIGHT ? s.keys - s.queries : 0);
      add(s);
    }
    problem.sequences = sequences.data();
  }

  // Sequences of a cache, whose lengths count what is appended.
  static int64_t within(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

  void lay_out(const fm_cache& cache) {
    start();
    for (int64_t b = 0; b < call.batch; ++b) {
      Sequence s{};
      s.queries = call.seq_q;
      // Each is brought near the cache before sums are made of it: what a tensor holds may be anything.
      const int64_t added = cache.k_new.data ? cache.added : 0;
      s.keys = within(number(cache.cache_lens, b), -added, call.seq_k) + added;
      if (s.keys > call.seq_k) s.keys = call.seq_k;
      s.hidden = cache.cache_starts.data ? within(number(cache.cache_starts, b), 0, s.keys) : 0;
      s.ahead = s.keys - s.queries;
      add(s);
    }
    problem.sequences = sequences.data();
  }
};

}  // namespace
}  // namespace fm

extern "C" {

FM_API int32_t fm_attention_forward(const fm_attention* given) {
  return fm::guarded([&] {
    fm::Layout layout;
    if (int32_t status = fm::read_call(given, layout.call)) return status;
    if (int32_t status = fm::check(layout.call)) return status;
    layout.lay_out();
    fm::engine().forward(layout.problem);
    return int32_t{FM_OK};
  });
}

FM_API int32_t fm_attention_backward(const fm_attention* given, const fm_gradients* given_gradients) {
  return fm::guarded([&] {
    fm::Layout layout;
    fm_gradients gradients;
    if (int32_t status = fm::read_call(given, layout.call)) return status;
    if (int32_t status = fm::read_gradients(given_gradients, gradients)) return status;
    if (int32_t status = fm::check(layout.call, gradients)) return status;
    layout.lay_out();
    fm::engine().backward(layout.problem, gradients);
    return int32_t{FM_OK};
  });
}

FM_API int32_t fm_attention_decode(const fm_attention* given, const fm_cache* given_cache) {
  return fm::guarded([&] {
    fm::Layout layout;
    fm_cache cache;
    if (int32_t status = fm::read_call(given, layout.call)) return status;
    if (int32_t status = fm::read_cache(given_cache, cache)) return status;
    if (int32_t status = fm::check(layout.call, cache)) return status;
    layout.lay_out(cache);
    fm::engine().decode(layout.problem, cache);
    return int32_t{FM_OK};
  });
}

FM_API const char* fm_last_error(void) { return fm::last_error(); }

FM_API int32_t fm_abi_version(void) { return FM_ABI_VERSION; }

FM_API const char* fm_isas(void) {
  thread_local char names[128];
  names[0] = 0;
  for (int index = 0; index < fm::ENGINES; ++index) {
    if (const fm::Engine* found = fm::available(index)) {
      if (names[0]) std::strcat(names, ", ");
      std::strcat(names, found->name);
    }
  }
  return names;
}

FM_API int32_t fm_set_isa(const char* name) {
  if (name && fm::choose(name)) return FM_OK;
  return fm::fail(FM_INVALID, "isa: expected one of %s, received %s", fm_isas(), name ? name : "NULL");
}

FM_API const char* fm_build_info(void) {
  thread_local std::string info;
  try {
    info = std::string("version=" FM_VERSION "; sources=" FM_SOURCES "; compiler=" __VERSION__ "; isa=") + fm::engine().name;
    return info.c_str();
  } catch (...) {
    return "version=" FM_VERSION;
  }
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
