/* The C ABI of FuseMesh's CPU engine.
 *
 * One struct, fm_attention, describes an attention call: sizes, tensors (pointer, strides, dtype) and options. Every
 * operation is a function that takes it and returns an fm_status; none throws, none keeps a pointer after it returns,
 * and all may be called from several threads at once. The header needs neither Python nor PyTorch and is valid C.
 *
 * How it grows, so that a caller and an engine of different ages understand each other or refuse:
 *   - Fields are only ever appended, and a new field means "absent" when it is zero. struct_size says how much the
 *     caller knows; the engine reads what is missing as zero, and refuses a longer struct whose surplus is not zero.
 *   - An operation that needs more than this struct takes a second one after it (backward its gradients, decode its
 *     cache), which begins with struct_size and grows by the same rule.
 *   - FM_ABI_VERSION changes only when something that exists changes its meaning.
 *   - What an engine does not compute it refuses with FM_UNSUPPORTED; it never ignores an option.
 *
 * The computation, in this order: s = scale * q k^T; softcap; ALiBi; + bias; mask and window; softmax, whose
 * denominator the sink joins; dropout on the probabilities; times v.
 */
#ifndef FUSEMESH_H
#define FUSEMESH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FM_ABI_VERSION 1

#if defined(_WIN32)
#define FM_API __declspec(dllexport)
#else
#define FM_API __attribute__((visibility("default")))
#endif

typedef enum fm_status {
  FM_OK = 0,
  FM_INVALID = 1,       /* the call contradicts itself or the contract: the caller's mistake */
  FM_UNSUPPORTED = 2,   /* a legal call that this engine does not compute */
  FM_OUT_OF_MEMORY = 3, /* scratch memory could not be had; nothing was written */
  FM_INTERNAL = 4       /* the engine's mistake */
} fm_status;

typedef enum fm_dtype {
  FM_NONE = 0, /* only with data == NULL */
  FM_F32 = 1,
  FM_BF16 = 2,
  FM_F16 = 3,
  FM_U8 = 4, /* booleans: 0 or not 0 */
  FM_I32 = 5,
  FM_I64 = 6
} fm_dtype;

/* A strided view. Strides count elements, may be zero (broadcast) or negative, and are always given for the four
 * dimensions named at the field; one that a tensor lacks has stride 0. Offsets are computed in 64 bits. */
typedef struct fm_tensor {
  void* data; /* NULL: absent */
  int64_t stride[4];
  int32_t dtype; /* fm_dtype */
  int32_t reserved;
} fm_tensor;

typedef enum fm_align {
  FM_ORIGIN = 0,      /* positions start at origin_q and origin_k */
  FM_BOTTOM_RIGHT = 1 /* each sequence's last query stands at its last key: origin_q grows by its own Sk - Sq */
} fm_align;

typedef struct fm_attention {
  uint32_t struct_size; /* sizeof(fm_attention) as the caller was compiled with it */
  uint32_t abi_version; /* FM_ABI_VERSION likewise */

  /* Sizes. Any may be zero. With cu_seqlens, batch counts sequences and seq_q, seq_k are the longest lengths. */
  int64_t batch;
  int64_t heads;    /* a multiple of kv_heads: query head h reads kv head h / (heads / kv_heads) */
  int64_t kv_heads;
  int64_t seq_q;
  int64_t seq_k;
  int64_t dim;   /* of q and k */
  int64_t dim_v; /* of v and out */

  fm_tensor q;   /* [batch, heads, seq_q, dim] */
  fm_tensor k;   /* [batch, kv_heads, seq_k, dim], dtype of q */
  fm_tensor v;   /* [batch, kv_heads, seq_k, dim_v], dtype of q */
  fm_tensor out; /* [batch, heads, seq_q, dim_v], dtype of q or f32; rows without a key are set to 0 */
  fm_tensor lse; /* [batch, heads, seq_q, -] f32, optional: natural log of the sum of exp(s), sink excluded; -inf for
                  * rows without a key */

  fm_tensor mask;         /* [batch, heads, seq_q, seq_k] u8, optional: not 0 where a query may attend to a key */
  fm_tensor bias;         /* [batch, heads, seq_q, seq_k] f32 or dtype of q, optional: added to s */
  fm_tensor alibi_slopes; /* [batch, heads, -, -] f32, optional: adds -slope * |position_q - position_k| to s */
  fm_tensor sinks;        /* [-, heads, -, -] f32, optional: one more logit in each row's denominator */
  fm_tensor cu_seqlens_q; /* [batch + 1, -, -, -] i32 or i64, optional: packed sequences. Sequence b of q, out and lse
                           * is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] along seq_q; stride[0] of those is 0 */
  fm_tensor cu_seqlens_k; /* the same for k and v; given if and only if cu_seqlens_q is */

  /* Positions: query i of a sequence stands at origin_q + i, key j at origin_k + j, head h at origin_head + h, batch b
   * at origin_batch + b. They see each other iff -window_left <= position_k - position_q <= window_right; -1 leaves a
   * side open, causal is window_right = 0. Origins lie within +-2^60. */
  int64_t window_left;
  int64_t window_right;
  int64_t origin_q;
  int64_t origin_k;
  int64_t origin_head;
  int64_t origin_batch;

  double scale;
  double softcap;   /* c > 0: s becomes c * tanh(s / c); 0: off */
  double dropout_p; /* in [0, 1); keep iff word >= floor(p * 2^32), kept probabilities are divided by 1 - p. The word is
                     * Philox 4x32-10 of counter (position_k >> 2, position_q, head, batch), key seed, at index
                     * position_k & 3 */
  uint64_t seed;

  int32_t align;    /* fm_align */
  int32_t threads;  /* at most so many threads compute; 0: one for each processor */
  uint32_t flags;   /* none is defined: 0 */
  uint32_t reserved;
} fm_attention;

/* What backward needs besides the call, whose out and lse are then inputs: those that forward filled. */
typedef struct fm_gradients {
  uint32_t struct_size; /* sizeof(fm_gradients) */
  uint32_t reserved;

  fm_tensor dout; /* [batch, heads, seq_q, dim_v], dtype of q: gradient of out */
  fm_tensor dlse; /* [batch, heads, seq_q, -] f32, optional: gradient of lse */

  fm_tensor dq; /* as q, k and v, dtype of q: filled */
  fm_tensor dk;
  fm_tensor dv;
  fm_tensor dbias;      /* [batch, heads, seq_q, seq_k] f32, optional: added to; stride 0 where the bias is broadcast */
  fm_tensor dsink_rows; /* [batch, heads, seq_q, -] f32, optional: each row's share of the gradient of its head's sink */
} fm_gradients;

/* What decode needs besides the call. The call's k and v are the cache, its seq_k how many keys a sequence's part of it
 * can hold; query i stands at the sequence's length - seq_q + i, key j at j, both less cache_starts. No cu_seqlens,
 * dropout, align or origins. */
typedef struct fm_cache {
  uint32_t struct_size; /* sizeof(fm_cache) */
  uint32_t reserved;

  int64_t page;  /* keys in a page; with block_table, where k and v are [pages, kv_heads, page, dim] */
  int64_t pages; /* how many there are: no other is touched, whatever the table says */
  int64_t added; /* keys of k_new and v_new */

  fm_tensor cache_lens;   /* [batch, -, -, -] i32 or i64: keys of each sequence before those added */
  fm_tensor cache_starts; /* [batch, -, -, -] i32 or i64, optional: keys before it are unseen */
  fm_tensor block_table;  /* [batch, pages of a sequence, -, -] i32 or i64, optional */
  fm_tensor k_new;        /* [batch, kv_heads, added, dim], dtype of q, optional: written behind the last key first */
  fm_tensor v_new;        /* [batch, kv_heads, added, dim_v], likewise; absent where v is a part of k */
} fm_cache;

/* Fills out, and lse if given. Extra memory: O(dim + dim_v) for each thread, and copies of k and v in the layout that the
 * processor wants. The same call gives the same bits whatever the number of threads; this holds for all three. */
FM_API int32_t fm_attention_forward(const fm_attention* call);

/* Fills dq, dk and dv, adds to dbias, fills dsink_rows. Extra memory: O(size of q, k and v). */
FM_API int32_t fm_attention_backward(const fm_attention* call, const fm_gradients* gradients);

/* Writes k_new and v_new to the cache, then fills out, and lse if given. */
FM_API int32_t fm_attention_decode(const fm_attention* call, const fm_cache* cache);

/* The instruction sets that were built and that this processor runs, best first, separated by ", ": avx512-bf16, avx512,
 * avx2, neon, scalar. Calls use the first, or the one that was set. */
FM_API const char* fm_isas(void);

/* Makes calls of all threads use one of fm_isas(); "" chooses the first again. */
FM_API int32_t fm_set_isa(const char* name);

/* What was wrong in this thread's last call that did not return FM_OK: what was expected, what was received. Valid until
 * this thread's next call. */
FM_API const char* fm_last_error(void);

/* FM_ABI_VERSION of the engine. */
FM_API int32_t fm_abi_version(void);

/* "key=value" pairs, separated by "; ": version, sources (a digest of the sources it was built from), compiler, isa
 * (the one in use). */
FM_API const char* fm_build_info(void);

/* Which threads the next call will use: "std::thread", or the path of the OpenMP library that this process already
 * maps and that the engine therefore shares. Valid until this thread's next call. */
FM_API const char* fm_thread_runtime(void);

#ifdef __cplusplus
}
#endif

#endif
