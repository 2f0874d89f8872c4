// One model on one runtime. engine_openvino.cpp and engine_ort.cpp each implement this; one of them is compiled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace native {

struct Tensor {
  std::string name;
  std::string dtype;  // numpy's name
  std::vector<std::int64_t> shape;
  std::byte* data = nullptr;
  std::size_t size = 0;  // bytes
};

class Engine {
 public:
  virtual ~Engine() = default;
  // Memory that the runtime reads. It stays where it is.
  virtual const std::vector<Tensor>& inputs() const = 0;
  // Memory that the runtime wrote; valid from one run() to the next.
  virtual const std::vector<Tensor>& outputs() const = 0;
  virtual void run() = 0;
  // Such as "OpenVINO 2026.4".
  virtual std::string runtime() const = 0;
};

// The target whose variants this runtime wants, such as openvino-cpu.
extern const char* const kTarget;

// Makes an engine of the bytes of an ONNX file, with `batch` in place of every size that it leaves open.
// threads: inside one run; 0 lets the runtime choose. Throws std::exception.
std::unique_ptr<Engine> load_engine(const std::string& model, std::int64_t batch, int threads);

}  // namespace native
