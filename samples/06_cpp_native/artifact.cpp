#include "artifact.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string_view>

#include "json.hpp"

namespace fs = std::filesystem;

namespace native {
namespace {

constexpr std::uint64_t kMaxManifest = 16u << 20;

[[noreturn]] void refuse(const fs::path& where, const std::string& what) {
  throw std::runtime_error(where.string() + ": " + what);
}

// A path in its one form: relative, with '/', without '.', '..', backslash, colon and control characters.
const std::string& plain(const std::string& path, const std::string& where) {
  bool good = !path.empty() && path.size() <= 1024;
  for (const unsigned char c : path) good = good && c >= 0x20 && c != 0x7F && c != '\\' && c != ':';
  for (std::size_t begin = 0; good && begin <= path.size();) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    good = !part.empty() && part != "." && part != "..";
    begin = end + 1;
  }
  if (!good) throw std::runtime_error(where + ": \"" + path.substr(0, 200) + "\" is no plain relative path");
  return path;
}

// Refuses keys that this program does not know: one of them could change what the others mean.
const Json& only(const Json& body, std::initializer_list<std::string_view> known, const std::string& where) {
  for (const auto& [key, value] : body.object(where))
    if (std::find(known.begin(), known.end(), key) == known.end()) throw std::runtime_error(where + " has the unknown key \"" + key + "\"");
  return body;
}

// Reads a plain file of at most `most` bytes, without following a link at its end.
std::string read_file(const fs::path& path, std::uint64_t most) {
  const int file = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (file < 0) refuse(path, std::strerror(errno));
  struct Closer {
    int file;
    ~Closer() { ::close(file); }
  } closer{file};
  struct stat status {};
  if (::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) refuse(path, "no plain file");
  if (static_cast<std::uint64_t>(status.st_size) > most) refuse(path, "larger than " + std::to_string(most) + " bytes");
  std::string content(static_cast<std::size_t>(status.st_size), '\0');
  for (std::size_t done = 0; done < content.size();) {
    const ssize_t got = ::read(file, content.data() + done, content.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) refuse(path, "it became shorter while it was read");
    done += static_cast<std::size_t>(got);
  }
  return content;
}

std::string sha256(const std::string& content) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  if (EVP_Digest(content.data(), content.size(), digest, &length, EVP_sha256(), nullptr) != 1)
    throw std::runtime_error("libcrypto has no SHA-256");
  std::string hex;
  for (unsigned i = 0; i < length; ++i) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

Variant read_variant(const std::string& name, const Json& body, const Artifact& artifact) {
  const std::string where = "variant " + name;
  only(body, {"variant_directory", "ep", "device", "compatibility_string", "executor_info", "additional_metadata"}, where);
  const Json& ours = body.at("executor_info", where).at("toolchain", where + ", executor_info");
  only(ours, {"target", "precision", "model_file", "prepared_file", "fingerprint", "session_options", "remarks"}, where);
  Variant made{name, ours.at("target", where).text(where + ".target"),
               ours.at("precision", where).text(where + ".precision"), ""};
  const Json* directory = body.find("variant_directory");
  const std::string folder = plain(directory ? directory->text(where + ".variant_directory") : name, where);
  if (const Json* model = ours.find("model_file"); model && !model->is_null()) {
    const std::string file = folder + "/" + plain(model->text(where + ".model_file"), where);
    if (!artifact.files.count(file)) throw std::runtime_error(where + ": " + file + " is not in the list of files");
    if (file.size() > 5 && file.compare(file.size() - 5, 5, ".onnx") == 0) made.model_file = file;
  }
  return made;
}

void check_folder(const Artifact& artifact) {
  std::size_t found = 0;
  for (const auto& entry : fs::recursive_directory_iterator(artifact.root)) {  // does not follow links
    const std::string name = entry.path().lexically_relative(artifact.root).generic_string();
    const fs::file_status status = entry.symlink_status();
    if (fs::is_directory(status)) continue;
    if (!fs::is_regular_file(status)) refuse(entry.path(), "a link or a device has no place in an artifact");
    if (name == "manifest.json") continue;
    if (!artifact.files.count(name)) refuse(entry.path(), "not in the manifest");
    ++found;
  }
  if (found == artifact.files.size()) return;
  for (const auto& [name, entry] : artifact.files)
    if (!fs::exists(artifact.root / name)) refuse(artifact.root / name, "in the manifest, but not there");
}

}  // namespace

Artifact read_artifact(const fs::path& given) {
  Artifact made;
  std::error_code error;
  made.root = fs::canonical(given, error);
  if (error) refuse(given, "there is no artifact: " + error.message());
  const fs::path path = made.root / "manifest.json";
  const std::string content = read_file(path, kMaxManifest);
  try {
    const Json top = Json::parse(content);
    only(top, {"schema_version", "package_name", "package_version", "description", "layout", "components", "shared_assets",
               "additional_metadata"}, "the manifest");
    const std::string version = top.at("schema_version", "the manifest").text("schema_version");
    const bool digits = version.size() > 2 && version.find_first_not_of("0123456789", 2) == version.npos;
    if (version.rfind("1.", 0) != 0 || !digits) throw std::runtime_error("package schema " + version + ", this program reads 1.x");
    if (top.at("layout", "the manifest").text("layout") != "portable") throw std::runtime_error("its layout is not portable");
    made.name = top.at("package_name", "the manifest").text("package_name");
    made.version = top.at("package_version", "the manifest").text("package_version");
    const Json& ours = top.at("additional_metadata", "the manifest").at("toolchain", "additional_metadata");
    if (ours.at("schema", "toolchain").integer("schema") != 1) throw std::runtime_error("of another schema than 1");
    for (const auto& [name, entry] : ours.at("files", "toolchain").object("files")) {
      const std::int64_t size = entry.at("size", name).integer(name + ", size");
      if (size < 0) throw std::runtime_error(name + ": its size is negative");
      made.files[plain(name, "files")] = {entry.at("sha256", name).text(name + ", sha256"), static_cast<std::uint64_t>(size)};
    }
    const Json& component = top.at("components", "the manifest").at("model", "components");
    for (const auto& [name, body] : component.at("variants", "component model").object("variants"))
      made.variants.push_back(read_variant(name, body, made));
  } catch (const std::runtime_error& wrong) {
    refuse(path, wrong.what());
  }
  check_folder(made);
  return made;
}

const Variant& choose(const Artifact& artifact, const std::string& name, const std::string& target) {
  const Variant* fallback = nullptr;
  for (const Variant& variant : artifact.variants) {
    if (!name.empty() && variant.name != name) continue;
    if (variant.model_file.empty()) {
      if (!name.empty()) refuse(artifact.root, "variant " + name + " has no ONNX file");
      continue;
    }
    if (!name.empty() || variant.target == target) return variant;
    const bool cpu = variant.target == "ort-cpu" || variant.target == "openvino-cpu" || variant.target == "reference";
    if (cpu && !fallback) fallback = &variant;
  }
  if (fallback) return *fallback;
  std::string has;
  for (const Variant& variant : artifact.variants) has += (has.empty() ? "" : ", ") + variant.name + " (" + variant.target + ")";
  refuse(artifact.root, (name.empty() ? "no ONNX file for a CPU" : "no variant " + name) + "; it has: " + has);
}

std::string read_checked(const Artifact& artifact, const std::string& file) {
  const Artifact::Entry& entry = artifact.files.at(file);
  const fs::path path = artifact.root / file;
  std::string content = read_file(path, entry.size);
  if (content.size() != entry.size) refuse(path, "not as large as the manifest says: the artifact is damaged");
  if (sha256(content) != entry.sha256) refuse(path, "its SHA-256 is not the manifest's: the artifact is damaged or was changed");
  return content;
}

void refuse_external_data(const std::string& model) {
  // A tensor names its file in a StringStringEntryProto with the key "location": in protobuf's wire format its length,
  // 8, and the word. A length may also be written longer than need be, and then ends in a zero byte.
  const std::string_view all = model;
  for (std::size_t at = all.find("location"); at != all.npos; at = all.find("location", at + 1))
    if (at > 0 && (all[at - 1] == '\x08' || all[at - 1] == '\0'))
      throw std::runtime_error("the model keeps weights in other files, or calls something \"location\"; this sample loads models of one file");
}

}  // namespace native
