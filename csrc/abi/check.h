// What a caller may ask for: every call is checked before anything is computed.
#pragma once

#include "abi/fusemesh.h"

namespace fm {

// Keeps the message for fm_last_error, and returns the status.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t fail(fm_status status, const char* format, ...);
const char* last_error();

// Copy the caller's struct into this engine's: what the caller does not know is zero, what this engine does not know must
// be.
int32_t read_call(const fm_attention* given, fm_attention& call);
int32_t read_gradients(const fm_gradients* given, fm_gradients& gradients);
int32_t read_cache(const fm_cache* given, fm_cache& cache);

// The dtype that q, k and v share: of whichever has elements.
int32_t dtype_of(const fm_attention& call);

// FM_OK, or a status whose message names the field, what was expected and what was received.
int32_t check(const fm_attention& call);
int32_t check(const fm_attention& call, const fm_gradients& gradients);
int32_t check(const fm_attention& call, const fm_cache& cache);

}  // namespace fm
