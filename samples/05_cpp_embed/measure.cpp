// Shows what service.cpp relies on, as one line of JSON: measure ARTIFACT [SECONDS]
//
//   same_memory   the model answers to what C++ writes into its own buffer after the first run: nothing was copied
//   grown_bytes   by how much the process grew while run() read a caller's input of input_bytes. Were it copied, by as
//                 much; so this takes a model with a large input
//   gil_taken     how often a second thread got the GIL while one single run was under way. Python is told never to
//                 take it away from a thread by itself, so each of those is the runtime's own release
//   runs_per_s_1, runs_per_s_2  binding.run() on one thread, and on two that share the session
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include <Python.h>

#include "model.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration span) { return std::chrono::duration<double>(span).count(); }

// The largest size that the process ever had, in bytes.
long peak() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6) * 1024;
  return 0;
}

void fill(const embed::Buffer& buffer, int with) { std::memset(buffer.data, with, buffer.size); }

std::vector<std::byte> contents(const std::vector<embed::Buffer>& buffers) {
  std::vector<std::byte> all;
  for (const auto& buffer : buffers) all.insert(all.end(), buffer.data, buffer.data + buffer.size);
  return all;
}

bool same_memory(const embed::Model& model) {
  embed::Binding binding = model.bind();
  std::vector<const std::byte*> before;
  for (const auto& input : binding.inputs()) fill(input, 0), before.push_back(input.data);
  binding.run();
  const auto first = contents(binding.outputs());
  for (const auto& input : binding.inputs()) fill(input, 0x3d);
  binding.run();
  for (std::size_t i = 0; i < before.size(); ++i)
    if (binding.inputs()[i].data != before[i]) return false;
  return contents(binding.outputs()) != first;
}

long grown(const embed::Model& model, std::size_t& size) {
  embed::Binding shapes = model.bind();
  std::vector<std::vector<std::byte>> memory;
  std::vector<embed::View> views;
  size = 0;
  for (std::size_t i = 0; i < shapes.inputs().size(); ++i) {
    const embed::Buffer& wanted = shapes.inputs()[i];
    memory.emplace_back(wanted.size, std::byte{0x3d});
    views.push_back({wanted.name, model.inputs()[i].dtype, wanted.shape, memory.back().data()});
    size += wanted.size;
  }
  shapes.run();  // what the runtime allocates for a run is there from here on
  const long before = peak();
  model.run(views);
  return peak() - before;
}

int gil_taken(const embed::Model& model) {
  {
    PyGILState_STATE gil = PyGILState_Ensure();
    PyRun_SimpleString("import sys; sys.setswitchinterval(1000)");
    PyGILState_Release(gil);
  }
  std::atomic<bool> inside{false}, done{false};
  std::atomic<int> taken{0};
  embed::Binding binding = model.bind();
  std::thread other([&] {
    embed::PythonThread known;
    while (!done) {
      PyGILState_STATE gil = PyGILState_Ensure();
      if (inside) ++taken;
      PyGILState_Release(gil);
      std::this_thread::yield();
    }
  });
  embed::PythonThread known;
  int most = 0;
  for (int i = 0; i < 20; ++i) {
    taken = 0;
    // Held before the run: while `inside`, the other thread gets it only where the run lets it go.
    PyGILState_STATE gil = PyGILState_Ensure();
    inside = true;
    binding.run();
    inside = false;
    PyGILState_Release(gil);
    most = std::max(most, taken.load());
  }
  done = true;
  other.join();
  return most;
}

double rate(const embed::Model& model, int threads, double span) {
  std::atomic<bool> go{false};
  std::atomic<int> ready{0};
  std::atomic<long> runs{0};
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i)
    workers.emplace_back([&] {
      embed::PythonThread known;
      embed::Binding binding = model.bind();
      for (const auto& input : binding.inputs()) fill(input, 0x3d);
      binding.run();
      ++ready;
      while (!go) std::this_thread::yield();
      const auto until = Clock::now() + std::chrono::duration<double>(span);
      long mine = 0;
      for (; Clock::now() < until; ++mine) binding.run();
      runs += mine;
    });
  while (ready < threads) std::this_thread::yield();
  const auto started = Clock::now();
  go = true;
  for (auto& worker : workers) worker.join();
  return static_cast<double>(runs) / seconds(Clock::now() - started);
}

}  // namespace

int main(int count, char** words) try {
  if (count < 2 || count > 3) throw std::invalid_argument("usage: measure ARTIFACT [SECONDS]");
  const double span = count > 2 ? std::atof(words[2]) : 2.0;
  embed::Python python;
  embed::Model model(words[1], 1);
  embed::PythonThread known;
  std::size_t size = 0;
  const long growth = grown(model, size);
  const bool same = same_memory(model);
  // In turns, so that a machine that speeds up or slows down does it to both.
  double one = 0, two = 0;
  const int rounds = std::max(1, static_cast<int>(span / 0.4));
  for (int round = 0; round < rounds; ++round) {
    one += rate(model, 1, span / rounds) / rounds;
    two += rate(model, 2, span / rounds) / rounds;
  }
  const int taken = gil_taken(model);
  std::printf("{\"same_memory\": %s, \"grown_bytes\": %ld, \"input_bytes\": %zu, \"gil_taken\": %d, "
              "\"runs_per_s_1\": %.1f, \"runs_per_s_2\": %.1f}\n",
              same ? "true" : "false", growth, size, taken, one, two);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 2;
}
