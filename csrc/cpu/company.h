// Whether other threads help. Without torch.
#pragma once

#include <algorithm>
#include <chrono>

namespace dal {

// When to do without the other threads. On a machine whose cores are all busy, as with workers that load data, a thread
// gets one only after others have had their turns: the call waits for it some hundred times as long as the work takes.
class Company {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Span = std::chrono::steady_clock::duration;

  bool is_shunned(Time now) const { return now < shunned_until_; }
  // The caller has done its share in `own` of a span that ended now. If it has waited since, it goes on alone for twice as
  // long; each wait after the next doubles that, until all that is waited is a small part of the time, and each call
  // without one halves it, because where one thread lost its core for once two are still faster. A second is the most,
  // because a process that was stopped has not waited for a core. Threads that slept may take this long to wake: that is
  // no reason.
  void waited(Span own, Span whole, Time now) {
    constexpr std::chrono::microseconds waking(200);
    constexpr Span longest = std::chrono::seconds(1);
    const Span wait = whole - own;
    if (wait > 2 * own + waking) {
      waits_ = std::min(2 * waits_, 32);
      shunned_until_ = now + std::min(longest, waits_ * wait);
    } else {
      waits_ = std::max(waits_ / 2, 1);
    }
  }

 private:
  Time shunned_until_{};
  int waits_ = 1;  // for so many times the wait it went on alone
};

}  // namespace dal
