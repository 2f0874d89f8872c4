// A strict reader of JSON (RFC 8259): what manifests need, and nothing that is not JSON. A key that comes twice, text
// after the end, numbers beyond 64 bits and invalid UTF-8 are refused, as the Python reader refuses them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace native {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the file: the first variant is the best

  // Throws std::runtime_error, which says at which byte.
  static Json parse(std::string_view text);

  // Each throws std::runtime_error where the value is of another type. `where` is for the message.
  const Object& object(const std::string& where) const;
  const std::string& text(const std::string& where) const;
  std::int64_t integer(const std::string& where) const;

  // The entry of an object; nullptr where there is none.
  const Json* find(std::string_view key) const;
  // The entry of an object; throws where there is none.
  const Json& at(std::string_view key, const std::string& where) const;

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }

 private:
  friend class JsonParser;
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value_ = nullptr;
};

}  // namespace native
