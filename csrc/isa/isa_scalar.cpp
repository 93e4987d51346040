// The engine for every processor, the measure of the others.

#include "engine/attention.h"
#include "engine/threading.h"

namespace fm {
namespace {
namespace scalar {

#include "isa/vec_array.h"
#include "engine/kernels.h"

}  // namespace scalar
}  // namespace

const Engine* engine_scalar() {
  static const Engine found{"scalar", scalar::run_forward, scalar::run_backward, scalar::run_decode};
  return &found;
}

}  // namespace fm
