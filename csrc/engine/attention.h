// Between the ABI (api.cpp), which has checked a call, and the code that computes it, compiled once for each instruction
// set. What stands here is compiled for every processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi/fusemesh.h"

// What the instruction sets' files share is inlined in each, so that no copy of one's is linked to another.
#if defined(__GNUC__)
#define FM_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define FM_ALWAYS_INLINE inline
#endif

namespace fm {

constexpr int64_t BLOCK_M = 64;  // query rows that are computed together
constexpr int64_t TILE_N = 96;   // keys that they meet at once; even, for pairs of bf16

// Element (i0, i1) of a tensor of whole numbers, i32 or i64.
FM_ALWAYS_INLINE int64_t number(const fm_tensor& t, int64_t i0, int64_t i1 = 0) {
  const int64_t at = i0 * t.stride[0] + i1 * t.stride[1];
  return t.dtype == FM_I32 ? static_cast<const int32_t*>(t.data)[at] : static_cast<const int64_t*>(t.data)[at];
}

// Where a sequence lies in the tensors, and what came before it.
struct Sequence {
  int64_t first_q, first_k;  // its rows
  int64_t queries, keys;
  int64_t hidden;      // keys at its beginning that nobody sees
  int64_t ahead;       // query i stands where key i + ahead does
  int64_t key_rows;    // keys of the sequences before it, each count rounded up to an even one
  int64_t blocks;      // blocks of query rows before it, for each kv head
};

struct Problem {
  const fm_attention* call;
  const Sequence* sequences;
  int64_t key_rows;  // of all sequences
  int64_t blocks;    // of all sequences, for each kv head
  int64_t group;     // query heads on one kv head
  int32_t dtype;     // that of q, k and v
};

// Blocks that the rows of all query heads on one kv head make. Short sequences share blocks between heads.
FM_ALWAYS_INLINE int64_t blocks_of(int64_t queries, int64_t group) {
  if (queries >= BLOCK_M) return group * ((queries + BLOCK_M - 1) / BLOCK_M);
  return (group * queries + BLOCK_M - 1) / BLOCK_M;
}

// Memory for the time of a call, aligned to two cache lines; its contents are anything. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  int64_t bytes_;
};

// Hands out parts of a Scratch, or counts what they would need while data is null.
struct Parts {
  char* data = nullptr;
  int64_t used = 0;
  template <typename T>
  FM_ALWAYS_INLINE T* take(int64_t count) {
    const int64_t at = used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return data ? reinterpret_cast<T*>(data + at) : nullptr;
  }
};

// One instruction set's code. All take valid problems, and throw std::bad_alloc before they write.
struct Engine {
  const char* name;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&, const fm_gradients&);
  void (*decode)(const Problem&, const fm_cache&);
};

// Null where the compiler could not build it.
const Engine* engine_scalar();
const Engine* engine_avx2();
const Engine* engine_neon();
const Engine* engine_avx512();
const Engine* engine_avx512_bf16();

constexpr int ENGINES = 5;

// The engines, best first; null where this processor does not run it. The last one runs everywhere.
const Engine* available(int index);

// The engine that calls use: the one that was chosen, else the best.
const Engine& engine();

// Makes calls use the engine of this name, or with "" the best again. False: there is none.
bool choose(const char* name);

}  // namespace fm
