// rvlm._host: host-side helpers that are not tensor ops. No torch headers. Python twins: rvlm/profiling.py and
// rvlm/attacks/work.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

// Wall-clock seconds and calls per named phase. Phases nest; a phase's time includes what runs inside it.
class PhaseTimer {
 public:
  void start(const std::string& name) { open_.emplace_back(name, Clock::now()); }

  void stop() {
    if (open_.empty()) throw std::runtime_error("PhaseTimer.stop() without a matching start()");
    auto& [name, began] = open_.back();
    auto& [seconds, calls] = totals_[name];
    seconds += std::chrono::duration<double>(Clock::now() - began).count();
    ++calls;
    open_.pop_back();
  }

  const std::map<std::string, std::pair<double, long>>& totals() const { return totals_; }

 private:
  using Clock = std::chrono::steady_clock;
  std::vector<std::pair<std::string, Clock::time_point>> open_;
  std::map<std::string, std::pair<double, long>> totals_;
};

// Runs of an attack, (sample, run), that wait for a slot in the batch, in the order in which they were pushed.
class WorkQueue {
 public:
  using Item = std::pair<long, long>;

  void push(long sample, long run) { waiting_.emplace_back(sample, run); }

  // Up to n items: first of samples that have nothing running, then, while fewer than `full` run in all, of any.
  std::vector<Item> take(long n, long full) {
    std::vector<Item> taken;
    for (bool beside : {false, true}) {
      std::vector<Item> left;
      for (const Item& item : waiting_) {
        const bool fits = beside ? running_ < full : running_of_[item.first] == 0;
        if (static_cast<long>(taken.size()) >= n || !fits) {
          left.push_back(item);
          continue;
        }
        ++running_of_[item.first];
        ++running_;
        taken.push_back(item);
      }
      waiting_.swap(left);
    }
    return taken;
  }

  void end(long sample) {
    if (running_of_[sample] == 0) throw std::runtime_error("WorkQueue.end() of a sample that has nothing running");
    --running_of_[sample];
    --running_;
  }

  void drop(long sample) {
    const auto mine = [sample](const Item& item) { return item.first == sample; };
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), mine), waiting_.end());
  }

 private:
  std::vector<Item> waiting_;
  std::unordered_map<long, long> running_of_;
  long running_ = 0;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of rvlm: build information, a phase timer, a queue of an attack's runs.";
  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"compiler", __VERSION__}, {"built", __DATE__ " " __TIME__}};
  });
  pybind11::class_<PhaseTimer>(m, "PhaseTimer")
      .def(pybind11::init<>())
      .def("start", &PhaseTimer::start, pybind11::arg("name"))
      .def("stop", &PhaseTimer::stop)
      .def("totals", &PhaseTimer::totals, "name -> (seconds, calls)");
  pybind11::class_<WorkQueue>(m, "WorkQueue")
      .def(pybind11::init<>())
      .def("push", &WorkQueue::push, pybind11::arg("sample"), pybind11::arg("run"))
      .def("take", &WorkQueue::take, pybind11::arg("n"), pybind11::arg("full"))
      .def("end", &WorkQueue::end, pybind11::arg("sample"))
      .def("drop", &WorkQueue::drop, pybind11::arg("sample"));
}
