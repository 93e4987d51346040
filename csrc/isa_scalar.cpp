// The engine for every processor, the measure of the others.

#include "attention.h"
#include "threading.h"

namespace fm {
namespace {
namespace scalar {

#include "vec_array.h"
#include "kernels.h"

}  // namespace scalar
}  // namespace

const Engine* engine_scalar() {
  static const Engine found{"scalar", scalar::run_forward, scalar::run_backward, scalar::run_decode};
  return &found;
}

}  // namespace fm
