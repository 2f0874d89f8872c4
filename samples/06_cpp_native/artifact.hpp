// Reads an artifact: its manifest, which variant to take, and the file of that variant, compared with its SHA-256.
// docs/artifacts.md describes the layout.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace native {

struct Variant {
  std::string name;
  std::string target;      // what it was made for, such as ort-cpu
  std::string precision;
  std::string model_file;  // ONNX, relative to the artifact; empty where the variant has no portable form
};

struct Artifact {
  std::filesystem::path root;
  std::string name, version;
  std::vector<Variant> variants;  // best first

  struct Entry {
    std::string sha256;
    std::uint64_t size;
  };
  std::map<std::string, Entry> files;  // every file but the manifest, by path relative to the artifact
};

// Reads and checks the manifest, and that the folder holds what it lists, nothing else, and no link.
// Throws std::runtime_error, which says what is wrong and where.
Artifact read_artifact(const std::filesystem::path& root);

// The variant of this name; where it is empty, the first for `target`, else the first with an ONNX file for a CPU.
const Variant& choose(const Artifact& artifact, const std::string& name, const std::string& target);

// The bytes of a listed file, once they are what the manifest says. They, and not the file, are what is parsed then, so
// nobody can change it in between.
std::string read_checked(const Artifact& artifact, const std::string& file);

// Refuses an ONNX model that names files of weights beside it: those would be opened unchecked.
void refuse_external_data(const std::string& model);

}  // namespace native
