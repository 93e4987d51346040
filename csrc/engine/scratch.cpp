// Scratch memory. A fresh mapping costs a page fault for each 4 KiB, as much as a small call's whole computation; so each
// thread keeps the last one that is not too large, as torch's own allocators keep theirs.

#include <cstdlib>
#include <new>

#include "engine/attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fm {
namespace {

constexpr int64_t LARGE_PAGE = int64_t{1} << 21;
constexpr int64_t MOST_KEPT = int64_t{64} << 20;

struct Kept {
  char* data = nullptr;
  int64_t bytes = 0;
  bool is_over = false;  // the thread ends: nothing is kept any more
  ~Kept() {
    std::free(data);
    data = nullptr;
    bytes = 0;
    is_over = true;
  }
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_(bytes) {
  if (bytes == 0) return;
  if (kept.data && bytes <= kept.bytes) {
    // Taken, so that a call within a call could not have it, too.
    data_ = kept.data;
    bytes_ = kept.bytes;
    kept.data = nullptr;
    kept.bytes = 0;
    return;
  }
  if (bytes >= LARGE_PAGE) bytes_ = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  void* found = nullptr;
  if (posix_memalign(&found, bytes >= LARGE_PAGE ? LARGE_PAGE : 128, static_cast<size_t>(bytes_))) throw std::bad_alloc();
  data_ = static_cast<char*>(found);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= LARGE_PAGE) madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
#endif
}

Scratch::~Scratch() {
  if (!kept.is_over && bytes_ > kept.bytes && bytes_ <= MOST_KEPT) {
    std::free(kept.data);
    kept.data = data_;
    kept.bytes = bytes_;
  } else {
    std::free(data_);
  }
}

}  // namespace fm
