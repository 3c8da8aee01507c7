// rvlm._host: host-side helpers that are not tensor ops. No torch headers. Python twin: rvlm/profiling.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <stdexcept>
#include <string>
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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of rvlm: build information and a phase timer.";
  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"compiler", __VERSION__}, {"built", __DATE__ " " __TIME__}};
  });
  pybind11::class_<PhaseTimer>(m, "PhaseTimer")
      .def(pybind11::init<>())
      .def("start", &PhaseTimer::start, pybind11::arg("name"))
      .def("stop", &PhaseTimer::stop)
      .def("totals", &PhaseTimer::totals, "name -> (seconds, calls)");
}
