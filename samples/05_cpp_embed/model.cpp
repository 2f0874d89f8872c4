#include "model.hpp"

#include <pybind11/embed.h>
#include <pybind11/numpy.h>

#include <cstdlib>

namespace py = pybind11;

namespace embed {
namespace {

// Objects of Python may only be touched, and also dropped, by a thread that holds the GIL.
template <typename T>
void drop(std::unique_ptr<T>& state) {
  if (!state) return;
  py::gil_scoped_acquire gil;
  state.reset();
}

// Calls something under the GIL and turns what Python raises into Error. The runtime itself lets the GIL go while the
// model runs, so other threads come in here meanwhile.
template <typename F>
auto under_gil(F&& call) {
  py::gil_scoped_acquire gil;
  try {
    return call();
  } catch (py::error_already_set& raised) {
    const bool invalid = raised.matches(py::module_::import("runtimes").attr("InvalidInput"));
    throw Error(py::str(raised.value()).cast<std::string>(), invalid);
  }
}

Buffer buffer_of(const std::string& name, const py::array& array) {
  if (!(array.flags() & py::array::c_style)) throw Error(name + ": an array that is not contiguous", false);
  // The pointer is what numpy itself uses; an array that may not be written is only ever read here.
  return {name, static_cast<std::byte*>(const_cast<void*>(array.data())), static_cast<std::size_t>(array.nbytes()),
          {array.shape(), array.shape() + array.ndim()}};
}

std::vector<Buffer> buffers_of(const py::handle& mapping) {
  std::vector<Buffer> found;
  for (const auto& item : py::cast<py::dict>(mapping))
    found.push_back(buffer_of(item.first.cast<std::string>(), py::cast<py::array>(item.second)));
  return found;
}

std::vector<TensorSpec> specs_of(const py::handle& tuple) {
  std::vector<TensorSpec> found;
  for (const auto& spec : tuple) {
    TensorSpec made{spec.attr("name").cast<std::string>(), spec.attr("dtype").cast<std::string>(), {}};
    if (spec.attr("shape").is_none()) throw Error(made.name + ": its rank is unknown, which this sample has no use for", false);
    for (const auto& dim : spec.attr("shape"))
      made.shape.push_back(py::isinstance<py::int_>(dim) ? dim.cast<std::int64_t>() : -1);
    found.push_back(std::move(made));
  }
  return found;
}

}  // namespace

struct Python::State {
  py::scoped_interpreter interpreter;
  // Holding the GIL for good would lock out every other thread.
  std::unique_ptr<py::gil_scoped_release> released;

  explicit State(PyConfig* config) : interpreter(config), released(std::make_unique<py::gil_scoped_release>()) {}
  ~State() { released.reset(); }
};

Python::Python() {
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  config.install_signal_handlers = 0;  // signals are the service's
  // From its path Python finds the virtual environment, and so the packages. $PYTHON_EXECUTABLE names another.
  const char* given = std::getenv("PYTHON_EXECUTABLE");
  PyConfig_SetBytesString(&config, &config.program_name, given ? given : PYTHON_EXECUTABLE);
  state_ = std::make_unique<State>(&config);  // clears the configuration
}

Python::~Python() = default;

struct PythonThread::State {
  py::gil_scoped_acquire gil;
  py::gil_scoped_release released;
};

PythonThread::PythonThread() : state_(std::make_unique<State>()) {}
PythonThread::~PythonThread() = default;

struct Binding::State {
  py::object binding;
  py::object run;
  std::vector<Buffer> inputs, outputs;
};

Binding::Binding(std::unique_ptr<State> state) : state_(std::move(state)) {}
Binding::Binding(Binding&&) noexcept = default;
Binding::~Binding() { drop(state_); }
void Binding::run() {
  under_gil([&] { state_->run(); });
}
const std::vector<Buffer>& Binding::inputs() const { return state_->inputs; }
const std::vector<Buffer>& Binding::outputs() const { return state_->outputs; }

struct Outputs::State {
  py::object arrays;
  std::vector<Buffer> buffers;
};

Outputs::Outputs(std::unique_ptr<State> state) : state_(std::move(state)) {}
Outputs::Outputs(Outputs&&) noexcept = default;
Outputs::~Outputs() { drop(state_); }
const std::vector<Buffer>& Outputs::buffers() const { return state_->buffers; }

struct Model::State {
  py::object session;
  py::object run;
  std::vector<TensorSpec> inputs, outputs;
};

Model::Model(const std::string& artifact, int threads) {
  under_gil([&] {
    py::module_ runtimes = py::module_::import("runtimes");
    py::dict options;
    if (threads > 0) options["options"] = py::dict(py::arg("intra_op_threads") = threads);
    auto made = std::make_unique<State>();
    made->session = runtimes.attr("load")(artifact, **options);
    made->run = made->session.attr("run");
    made->inputs = specs_of(made->session.attr("inputs"));
    made->outputs = specs_of(made->session.attr("outputs"));
    state_ = std::move(made);
  });
}

Model::~Model() { drop(state_); }
const std::vector<TensorSpec>& Model::inputs() const { return state_->inputs; }
const std::vector<TensorSpec>& Model::outputs() const { return state_->outputs; }

std::string Model::info() const {
  return under_gil([&] {
    std::string text;
    for (const auto& item : py::cast<py::dict>(state_->session.attr("info")))
      text += item.first.cast<std::string>() + ": " + item.second.cast<std::string>() + "\n";
    return text;
  });
}

Binding Model::bind(std::int64_t batch) const {
  return under_gil([&] {
    py::dict shapes;
    for (const TensorSpec& spec : state_->inputs) {
      py::tuple shape(spec.shape.size());
      for (std::size_t i = 0; i < spec.shape.size(); ++i) shape[i] = spec.shape[i] < 0 ? batch : spec.shape[i];
      shapes[py::str(spec.name)] = shape;
    }
    auto made = std::make_unique<Binding::State>();
    made->binding = state_->session.attr("bind")(shapes);
    made->run = made->binding.attr("run");
    made->inputs = buffers_of(made->binding.attr("inputs"));
    made->outputs = buffers_of(made->binding.attr("outputs"));
    return Binding(std::move(made));
  });
}

Outputs Model::run(const std::vector<View>& inputs) const {
  return under_gil([&] {
    py::dict feeds;
    for (const View& view : inputs) {
      // A base object, here None, tells numpy that the memory is somebody else's: without one it would copy it.
      feeds[py::str(view.name)] = py::array(py::dtype(view.dtype), view.shape, view.data, py::none());
    }
    auto made = std::make_unique<Outputs::State>();
    made->arrays = state_->run(feeds);
    made->buffers = buffers_of(made->arrays);
    return Outputs(std::move(made));
  });
}

}  // namespace embed
