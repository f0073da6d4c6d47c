#include "threads.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fastcompat {
namespace {

// GCC's OpenMP entry point, which LLVM's and Intel's runtimes offer too. torch loads its OpenMP library globally.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel loaded_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

struct Job {
  const std::function<void(int64_t, int)>& task;
  int64_t n_items;
  int max_threads;
  std::atomic<int64_t> next_item{0};
  std::atomic<int> next_thread{0};

  void work() {
    const int thread = next_thread.fetch_add(1);
    // A runtime may start more threads than it was asked for; those find nothing to write into.
    if (thread >= max_threads) return;
    for (int64_t item = next_item.fetch_add(1); item < n_items; item = next_item.fetch_add(1)) task(item, thread);
  }
};

}  // namespace

void parallel_for(int64_t n_items, int threads, const std::function<void(int64_t, int)>& task) {
  Job job{task, n_items, threads};
  if (threads <= 1 || n_items <= 1) {
    job.work();
  } else if (const OpenMpParallel parallel = loaded_openmp()) {
    parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back([&job] { job.work(); });
    } catch (const std::system_error&) {
      // The system gives no more threads; those that there are do the work.
    }
    job.work();
    for (std::thread& other : others) other.join();
  }
}

}  // namespace fastcompat
