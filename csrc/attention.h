// Between the ABI (api.cpp), which has checked a call, and the code that computes it.
#pragma once

#include "fusemesh.h"

namespace fm {

// Scalar forward, fp32. `call` is valid and within what the engine supports. Throws std::bad_alloc before it writes.
void forward_scalar(const fm_attention& call);

}  // namespace fm
