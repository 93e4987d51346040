// Threads: those of the OpenMP runtime that this process already maps (PyTorch brings one), else short-lived std::thread.
//
// The engine links no OpenMP library. A second runtime beside PyTorch's would keep a second set of threads spinning on
// the same processors; so the one that is there is looked up at run time, through GOMP_parallel, the entry that both
// libgomp and LLVM's libomp export. Without one (numpy alone) threads are started for the call and end with it: such
// callers have no parallel region around them to share, and nothing is left behind for fork() to break.
//
// A forked child has the thread that forked, alone, and libgomp waits for its others for ever. So a child of a process
// that had several threads starts its own for each call.

#include "engine/threading.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dirent.h>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif

namespace fm {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  std::string path;
};

#if defined(__linux__)

std::atomic<bool> forks_with_threads{false};  // set in the parent, read in the child
std::atomic<bool> has_lost_threads{false};

// Whether this process has threads besides the one that asks, as far as the system tells.
bool has_threads() {
  DIR* folder = opendir("/proc/self/task");
  if (!folder) return true;
  int entries = 0;
  while (readdir(folder)) ++entries;
  closedir(folder);
  return entries != 3;  // ".", ".." and this one
}

void before_fork() { forks_with_threads = has_threads(); }

void in_child() {
  if (forks_with_threads) has_lost_threads = true;
}

[[maybe_unused]] const int watches_forks = pthread_atfork(before_fork, nullptr, in_child);

// dl_iterate_phdr callback: keeps the OpenMP library to borrow. PyTorch's own goes before another package's copy.
int find_openmp(dl_phdr_info* info, size_t, void* result) {
  const char* path = info->dlpi_name ? info->dlpi_name : "";
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  const bool is_openmp = !std::strncmp(name, "libgomp", 7) || !std::strncmp(name, "libomp", 6) ||
                         !std::strncmp(name, "libiomp5", 8);
  auto& found = *static_cast<std::string*>(result);
  if (is_openmp && (found.empty() || std::strstr(path, "/torch"))) found = path;
  return 0;
}

template <typename Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// The runtime to borrow, or null. Once found it is kept; until then each call looks again, because PyTorch may be
// imported after the engine.
const OpenMP* openmp() {
  if (has_lost_threads) return nullptr;
  static std::atomic<const OpenMP*> kept{nullptr};
  if (const OpenMP* runtime = kept.load(std::memory_order_acquire)) return runtime;
  auto candidate = OpenMP{};
  dl_iterate_phdr(find_openmp, &candidate.path);
  if (candidate.path.empty()) return nullptr;
  void* library = dlopen(candidate.path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!library || !look_up(library, "GOMP_parallel", candidate.parallel) ||
      !look_up(library, "omp_get_thread_num", candidate.thread_num)) {
    return nullptr;
  }
  // Never freed: a concurrent caller may hold it. Two threads racing here leak one small record at most.
  const OpenMP* runtime = new OpenMP(std::move(candidate));
  const OpenMP* expected = nullptr;
  return kept.compare_exchange_strong(expected, runtime) ? runtime : expected;
}

#else

const OpenMP* openmp() { return nullptr; }

#endif

struct Region {
  Body body;
  const void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  const OpenMP* runtime = nullptr;

  void work(int worker) noexcept {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(context, worker, task);
  }
};

void work_in_openmp(void* region) {
  auto& r = *static_cast<Region*>(region);
  r.work(r.runtime->thread_num());
}

}  // namespace

int worker_count(int requested, int64_t tasks) noexcept {
  const int64_t available = requested > 0 ? requested : std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(std::max<int64_t>(1, std::min(available, tasks)));
}

void parallel_for(int workers, int64_t tasks, Body body, const void* context) noexcept {
  Region region{body, context, tasks};
  if (workers <= 1) {
    region.work(0);
    return;
  }
  std::vector<std::thread> threads;
  try {
    region.runtime = openmp();
    if (region.runtime) {
      region.runtime->parallel(work_in_openmp, &region, static_cast<unsigned>(workers), 0);
      return;
    }
    threads.reserve(static_cast<size_t>(workers - 1));
    for (int worker = 1; worker < workers; ++worker) threads.emplace_back(&Region::work, &region, worker);
  } catch (...) {
    // The system gives no more threads or memory: those that were started, and this one, do all the tasks.
  }
  region.work(0);
  for (auto& thread : threads) thread.join();
}

std::string thread_runtime() {
  const OpenMP* runtime = openmp();
  return runtime ? runtime->path : "std::thread";
}

}  // namespace fm
