// How work is spread over threads. Nothing else in the engine starts or finds one.
#pragma once

#include <cstdint>
#include <string>

namespace fm {

// Does one task. `worker` numbers the thread within this call, from 0, for the choice of scratch memory.
using Body = void (*)(const void* context, int worker, int64_t task) noexcept;

// How many workers a call with this many tasks uses: `requested`, or one for each processor if that is 0.
int worker_count(int requested, int64_t tasks) noexcept;

// Calls body for every task in [0, tasks), on at most `workers` threads (this one included), and returns when all are
// done. Tasks are handed out in order to whoever is free, so results must not depend on who does one.
void parallel_for(int workers, int64_t tasks, Body body, const void* context) noexcept;

// "std::thread", also in a forked child that has lost its parent's threads, or the path of the OpenMP library whose
// threads are borrowed.
std::string thread_runtime();

}  // namespace fm
