#include <onnxruntime_cxx_api.h>

#include <map>
#include <stdexcept>

#include "engine.hpp"

namespace native {
namespace {

struct Element {
  const char* name;
  std::size_t size;
};

Element element(ONNXTensorElementDataType type) {
  static const std::map<ONNXTensorElementDataType, Element> known = {
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, {"float16", 2}}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {"float32", 4}},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, {"float64", 8}},  {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, {"bool", 1}},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, {"int8", 1}},       {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, {"int16", 2}},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, {"int32", 4}},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {"int64", 8}},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {"uint8", 1}},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, {"uint16", 2}},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, {"uint32", 4}},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, {"uint64", 8}}};
  const auto found = known.find(type);
  if (found == known.end()) throw std::runtime_error("a tensor of ONNX type " + std::to_string(type) + " cannot go in or out");
  return found->second;
}

std::size_t bytes(const std::vector<std::int64_t>& shape, std::size_t element_size) {
  std::size_t total = element_size;
  for (const std::int64_t dim : shape) total *= static_cast<std::size_t>(dim);
  return total;
}

class OnnxRuntime : public Engine {
 public:
  OnnxRuntime(const std::string& content, std::int64_t batch, int threads)
      : environment_(ORT_LOGGING_LEVEL_ERROR, "native"), memory_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU)) {
    Ort::SessionOptions options;
    if (threads > 0) options.SetIntraOpNumThreads(threads);
    session_ = Ort::Session(environment_, content.data(), content.size(), options);
    binding_ = Ort::IoBinding(session_);
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      const Ort::TypeInfo type = session_.GetInputTypeInfo(i);
      const auto info = type.GetTensorTypeAndShapeInfo();
      const Element kind = element(info.GetElementType());
      std::vector<std::int64_t> shape = info.GetShape();
      for (std::int64_t& dim : shape)
        if (dim < 0) dim = batch;
      memory_of_inputs_.emplace_back(bytes(shape, kind.size));
      auto& held = memory_of_inputs_.back();
      const std::string name = session_.GetInputNameAllocated(i, allocator).get();
      inputs_.push_back({name, kind.name, shape, held.data(), held.size()});
      binding_.BindInput(name.c_str(), Ort::Value::CreateTensor(memory_, held.data(), held.size(), shape.data(), shape.size(), info.GetElementType()));
    }
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.push_back({session_.GetOutputNameAllocated(i, allocator).get(), "", {}, nullptr, 0});
      binding_.BindOutput(outputs_.back().name.c_str(), memory_);
    }
  }

  const std::vector<Tensor>& inputs() const override { return inputs_; }
  const std::vector<Tensor>& outputs() const override { return outputs_; }

  void run() override {
    session_.Run(Ort::RunOptions(), binding_);
    values_ = binding_.GetOutputValues();
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      const auto info = values_[i].GetTensorTypeAndShapeInfo();
      const Element kind = element(info.GetElementType());
      outputs_[i].dtype = kind.name;
      outputs_[i].shape = info.GetShape();
      outputs_[i].data = static_cast<std::byte*>(values_[i].GetTensorMutableRawData());
      outputs_[i].size = bytes(outputs_[i].shape, kind.size);
    }
  }

  std::string runtime() const override { return "ONNX Runtime " + Ort::GetVersionString(); }

 private:
  Ort::Env environment_;
  Ort::MemoryInfo memory_;
  Ort::Session session_{nullptr};
  Ort::IoBinding binding_{nullptr};
  std::vector<std::vector<std::byte>> memory_of_inputs_;
  std::vector<Ort::Value> values_;
  std::vector<Tensor> inputs_, outputs_;
};

}  // namespace

const char* const kTarget = "ort-cpu";

std::unique_ptr<Engine> load_engine(const std::string& model, std::int64_t batch, int threads) {
  return std::make_unique<OnnxRuntime>(model, batch, threads);
}

}  // namespace native
