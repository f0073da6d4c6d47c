// Work items spread over threads.

#pragma once

#include <cstdint>
#include <functional>

namespace fastcompat {

// Calls task(item, thread) once for each item in [0, n_items) on at most `threads` threads, in no particular order;
// returns when all are done. Runs on the OpenMP pool that torch has loaded into the process where there is one, so that
// no second pool of spinning threads fights with it, else on threads of its own. The task must not throw.
void parallel_for(int64_t n_items, int threads, const std::function<void(int64_t, int)>& task);

}  // namespace fastcompat
