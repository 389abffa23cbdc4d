// The threads that rows are shared among: torch's, while the machine has cores for them.
#pragma once

#include <thread>

#include <torch/csrc/stable/ops.h>

#include "company.h"

namespace dal {

// Of each thread that calls, because each has threads of its own to share with.
inline Company& company_of_caller() {
  thread_local Company company;
  return company;
}

struct TorchThreads {
  std::int64_t count() const { return torch::stable::get_num_threads(); }
  template <class F>
  void run(std::int64_t size, std::int64_t grain, const F& f) const {
    if (size <= grain) return f(0, size);
    const auto clock = std::chrono::steady_clock::now;
    Company& company = company_of_caller();
    const Company::Time start = clock();
    if (company.is_shunned(start)) return f(0, size);
    const std::thread::id caller = std::this_thread::get_id();
    Company::Span own{};
    torch::stable::parallel_for(0, size, grain, [&](std::int64_t begin, std::int64_t end) {
      const Company::Time begun = clock();
      f(begin, end);
      if (std::this_thread::get_id() == caller) own += clock() - begun;
    });
    const Company::Time end = clock();
    company.waited(own, end - start, end);
  }
};

}  // namespace dal
