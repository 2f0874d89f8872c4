#include <map>
#include <openvino/openvino.hpp>
#include <stdexcept>

#include "engine.hpp"

namespace native {
namespace {

std::string numpy_name(const ov::element::Type& type) {
  static const std::map<std::string, std::string> names = {
      {"f16", "float16"}, {"f32", "float32"}, {"f64", "float64"}, {"boolean", "bool"}, {"i8", "int8"},
      {"i16", "int16"},   {"i32", "int32"},   {"i64", "int64"},   {"u8", "uint8"},     {"u16", "uint16"},
      {"u32", "uint32"},  {"u64", "uint64"}};
  const auto found = names.find(type.get_type_name());
  if (found == names.end()) throw std::runtime_error("a tensor of " + type.get_type_name() + " cannot go in or out");
  return found->second;
}

std::string name_of(const ov::Output<const ov::Node>& port) { return port.get_names().empty() ? "" : port.get_any_name(); }

class OpenVino : public Engine {
 public:
  OpenVino(const std::string& content, std::int64_t batch, int threads) {
    std::shared_ptr<ov::Model> model = core_.read_model(content, ov::Tensor());
    if (model->is_dynamic()) {
      std::map<ov::Output<ov::Node>, ov::PartialShape> shapes;
      for (const auto& input : model->inputs()) {
        ov::PartialShape shape = input.get_partial_shape();
        if (shape.rank().is_dynamic()) throw std::runtime_error(input.get_any_name() + ": its rank is unknown");
        for (auto& dim : shape)
          if (dim.is_dynamic()) dim = batch;
        shapes[input] = shape;
      }
      model->reshape(shapes);
    }
    // By itself it would compute in bfloat16 where the processor can.
    ov::AnyMap properties{ov::hint::inference_precision(ov::element::f32),
                          ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
    if (threads > 0) properties.insert(ov::inference_num_threads(threads));
    compiled_ = core_.compile_model(model, "CPU", properties);
    request_ = compiled_.create_infer_request();
    for (std::size_t i = 0; i < compiled_.inputs().size(); ++i)
      inputs_.push_back(view(compiled_.input(i), request_.get_input_tensor(i)));
    outputs_.resize(compiled_.outputs().size());
  }

  const std::vector<Tensor>& inputs() const override { return inputs_; }
  const std::vector<Tensor>& outputs() const override { return outputs_; }

  void run() override {
    request_.infer();
    for (std::size_t i = 0; i < outputs_.size(); ++i)  // a shape that depends on data is only known now
      outputs_[i] = view(compiled_.output(i), request_.get_output_tensor(i));
  }

  std::string runtime() const override { return std::string("OpenVINO ") + ov::get_openvino_version().buildNumber; }

 private:
  static Tensor view(const ov::Output<const ov::Node>& port, const ov::Tensor& tensor) {
    const ov::Shape& shape = tensor.get_shape();
    return {name_of(port), numpy_name(tensor.get_element_type()), {shape.begin(), shape.end()},
            const_cast<std::byte*>(static_cast<const std::byte*>(tensor.data())), tensor.get_byte_size()};
  }

  ov::Core core_;
  ov::CompiledModel compiled_;
  ov::InferRequest request_;
  std::vector<Tensor> inputs_, outputs_;
};

}  // namespace

const char* const kTarget = "openvino-cpu";

std::unique_ptr<Engine> load_engine(const std::string& model, std::int64_t batch, int threads) {
  return std::make_unique<OpenVino>(model, batch, threads);
}

}  // namespace native
