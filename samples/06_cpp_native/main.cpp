// Runs an artifact without Python: native ARTIFACT [--variant NAME] [--batch N] [--threads N] [--bench SECONDS]
//
// Reads requests from standard input until it ends and answers each on standard output: a request is the bytes of every
// input, in the order that is printed on standard error, an answer those of every output. With --bench it runs on zeros
// instead and prints one line of JSON: milliseconds to load and for a run.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "artifact.hpp"
#include "engine.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds(Clock::duration span) { return std::chrono::duration<double, std::milli>(span).count(); }

std::string described(const native::Tensor& tensor) {
  std::string text = tensor.name + ": " + tensor.dtype + "[";
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

void serve(native::Engine& engine) {
  for (;;) {
    std::size_t got = 0, wanted = 0;
    for (const auto& input : engine.inputs()) {
      got += std::fread(input.data, 1, input.size, stdin);
      wanted += input.size;
    }
    if (got == 0) return;
    if (got < wanted) throw std::runtime_error("the last request has " + std::to_string(got) + " bytes, one takes " + std::to_string(wanted));
    engine.run();
    for (const auto& output : engine.outputs())
      if (std::fwrite(output.data, 1, output.size, stdout) != output.size) throw std::runtime_error("nobody reads the answer");
    std::fflush(stdout);
  }
}

void bench(native::Engine& engine, double seconds, double load_ms) {
  for (const auto& input : engine.inputs()) std::memset(input.data, 0, input.size);
  for (int i = 0; i < 3; ++i) engine.run();
  std::vector<double> times;
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto started = Clock::now();
    engine.run();
    times.push_back(milliseconds(Clock::now() - started));
  } while (Clock::now() < until);
  std::sort(times.begin(), times.end());
  std::printf("{\"load_ms\": %.3f, \"p50_ms\": %.4f, \"min_ms\": %.4f, \"runs\": %zu}\n", load_ms, times[times.size() / 2], times.front(), times.size());
}

}  // namespace

int main(int count, char** words) try {
  const char* usage = "usage: native ARTIFACT [--variant NAME] [--batch N] [--threads N] [--bench SECONDS]";
  std::string variant;
  long batch = 1, threads = 0;
  double seconds = 0;
  if (count < 2 || count % 2 != 0) throw std::invalid_argument(usage);
  for (int i = 2; i < count; i += 2) {
    const std::string option = words[i], value = words[i + 1];
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    const bool counts = !value.empty() && *end == '\0' && number >= 0 && number <= 1e6;
    if (option == "--variant") variant = value;
    else if (option == "--batch" && counts && number >= 1) batch = static_cast<long>(number);
    else if (option == "--threads" && counts) threads = static_cast<long>(number);
    else if (option == "--bench" && counts && number > 0) seconds = number;
    else throw std::invalid_argument(option + " " + value + "; " + usage);
  }

  const auto started = Clock::now();
  const native::Artifact artifact = native::read_artifact(words[1]);
  const native::Variant& chosen = native::choose(artifact, variant, native::kTarget);
  std::unique_ptr<native::Engine> engine;
  {
    const std::string model = native::read_checked(artifact, chosen.model_file);
    native::refuse_external_data(model);
    engine = native::load_engine(model, batch, static_cast<int>(threads));
  }
  const double load_ms = milliseconds(Clock::now() - started);

  std::cerr << artifact.name << " " << artifact.version << ", " << chosen.name << " (" << chosen.model_file << "), " << engine->runtime() << "\n";
  for (const auto& input : engine->inputs()) std::cerr << "input " << described(input) << "\n";
  if (seconds > 0) bench(*engine, seconds, load_ms);
  else serve(*engine);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 2;
}
