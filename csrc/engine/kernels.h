// The whole engine, once for each instruction set: a source file opens a namespace in which its vectors stand, and
// includes this. Nothing here, nor in what it includes, is a template or an inline function of the standard library: the
// linker keeps one copy of those for the whole library, and it might be one that not every processor runs.

#include "engine/product.h"
#include "engine/operands.h"
#ifdef FM_DOT_BF16
#include "isa/dot_bf16.h"
#endif
#include "engine/scores.h"
#include "engine/softmax.h"
#include "engine/keys.h"
#include "engine/few_rows.h"
#include "engine/forward.h"
#include "engine/backward.h"
#include "engine/decode.h"

#ifdef FM_DOT_BF16
#define FM_RUN(Kind, ...)                    \
  if (problem.dtype == FM_BF16) {            \
    Kind<DotBf16>(__VA_ARGS__).run();        \
  } else {                                   \
    Kind<DotF32>(__VA_ARGS__).run();         \
  }
#else
#define FM_RUN(Kind, ...) Kind<DotF32>(__VA_ARGS__).run();
#endif

inline void run_forward(const Problem& problem) { FM_RUN(Forward, problem) }
inline void run_backward(const Problem& problem, const fm_gradients& gradients) { FM_RUN(Backward, problem, gradients) }
inline void run_decode(const Problem& problem, const fm_cache& cache) { FM_RUN(Decode, problem, cache) }

#undef FM_RUN
