// A C++ face of runtimes.load(): no Python type is in it, so only model.cpp is compiled against pybind11.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace embed {

// What runtimes raised, with its place and its next step. `invalid_input` is the caller's mistake.
struct Error : std::runtime_error {
  Error(const std::string& what, bool invalid) : std::runtime_error(what), invalid_input(invalid) {}
  bool invalid_input;
};

// The interpreter. Make one, first thing in main(), and keep it until every other object here is gone.
class Python {
 public:
  Python();
  ~Python();
  Python(const Python&) = delete;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Makes this thread known to Python for as long as it lives. Without one, each call makes and forgets a thread state.
class PythonThread {
 public:
  PythonThread();
  ~PythonThread();
  PythonThread(const PythonThread&) = delete;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// An input or output: its name, numpy's name of its dtype, and a shape in which a symbolic size is -1.
struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
};

// Memory that the model reads from or writes to.
struct Buffer {
  std::string name;
  std::byte* data = nullptr;
  std::size_t size = 0;  // bytes
  std::vector<std::int64_t> shape;
};

// Memory of the caller's that a model is to read: it has to stay where it is until run() returns.
struct View {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  const void* data;
};

class Model;

// Buffers for one set of shapes, allocated once: write into inputs, run(), read outputs. Nothing is copied: these are
// the very bytes that the runtime reads and writes. For one thread.
class Binding {
 public:
  ~Binding();
  Binding(Binding&&) noexcept;
  void run();
  const std::vector<Buffer>& inputs() const;
  const std::vector<Buffer>& outputs() const;

 private:
  friend class Model;
  struct State;
  explicit Binding(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// The results of one run. Owns their memory: that of the arrays which Session.run() gave.
class Outputs {
 public:
  ~Outputs();
  Outputs(Outputs&&) noexcept;
  const std::vector<Buffer>& buffers() const;

 private:
  friend class Model;
  struct State;
  explicit Outputs(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// A session. May be used from many threads.
class Model {
 public:
  // threads: inside one run; 0 lets the runtime choose. With one, runs of several threads do not share cores.
  explicit Model(const std::string& artifact, int threads = 0);
  ~Model();
  Model(const Model&) = delete;

  const std::vector<TensorSpec>& inputs() const;
  const std::vector<TensorSpec>& outputs() const;
  // What was loaded and why, one "key: value" a line.
  std::string info() const;

  // Buffers with `batch` in place of every symbolic size.
  Binding bind(std::int64_t batch = 1) const;
  // Runs once on the caller's own memory, for shapes that change from call to call.
  Outputs run(const std::vector<View>& inputs) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace embed
