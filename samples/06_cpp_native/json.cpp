#include "json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

namespace native {
namespace {

constexpr int kMaxDepth = 64;

// The length of the UTF-8 sequence at the start of `text`, 0 where it is none (RFC 3629: shortest form, no surrogates).
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto tail = [&](std::size_t i) { return (byte(i) & 0xC0u) == 0x80u; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return tail(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const unsigned low = first == 0xE0 ? 0xA0 : 0x80, high = first == 0xED ? 0x9F : 0xBF;
    return byte(1) >= low && byte(1) <= high && tail(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const unsigned low = first == 0xF0 ? 0x90 : 0x80, high = first == 0xF4 ? 0x8F : 0xBF;
    return byte(1) >= low && byte(1) <= high && tail(2) && tail(3) ? 4 : 0;
  }
  return 0;
}

void append_utf8(std::string& to, unsigned code) {
  if (code < 0x80) {
    to += static_cast<char>(code);
    return;
  }
  const int tails = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const unsigned marks[] = {0, 0xC0, 0xE0, 0xF0};
  to += static_cast<char>(marks[tails] | (code >> (6 * tails)));
  for (int i = tails - 1; i >= 0; --i) to += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json made = value(0);
    space();
    if (at_ != text_.size()) fail("there is something after the end");
    return made;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("not JSON: " + what + ", at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r')) ++at_;
  }

  void expect(char wanted) {
    space();
    if (at_ >= text_.size() || text_[at_] != wanted) fail(std::string("wanted '") + wanted + "'");
    ++at_;
  }

  bool took(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    space();
    Json made;
    switch (peek()) {
      case '{': made.value_ = object(depth); break;
      case '[': made.value_ = array(depth); break;
      case '"': made.value_ = string(); break;
      case 't': if (!took("true")) fail("wanted a value"); made.value_ = true; break;
      case 'f': if (!took("false")) fail("wanted a value"); made.value_ = false; break;
      case 'n': if (!took("null")) fail("wanted a value"); break;
      default: number(made);
    }
    return made;
  }

  Json::Object object(int depth) {
    Json::Object made;
    std::vector<std::string> keys;
    expect('{');
    space();
    if (peek() == '}') return ++at_, made;
    for (;;) {
      space();
      std::string key = string();
      expect(':');
      keys.push_back(key);
      made.emplace_back(std::move(key), value(depth + 1));
      space();
      if (peek() == '}') break;
      expect(',');
    }
    ++at_;
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) fail("the key \"" + *twice + "\" comes twice in one object");
    return made;
  }

  Json::Array array(int depth) {
    Json::Array made;
    expect('[');
    space();
    if (peek() == ']') return ++at_, made;
    for (;;) {
      made.push_back(value(depth + 1));
      space();
      if (peek() == ']') return ++at_, made;
      expect(',');
    }
  }

  unsigned hex4() {
    unsigned code = 0;
    const char* begin = text_.data() + at_;
    if (text_.size() - at_ < 4) fail("a broken \\u");
    const auto [end, error] = std::from_chars(begin, begin + 4, code, 16);
    if (error != std::errc() || end != begin + 4) fail("a broken \\u");
    at_ += 4;
    return code;
  }

  std::string string() {
    if (peek() != '"') fail("wanted a text");
    ++at_;
    std::string made;
    for (;;) {
      if (at_ >= text_.size()) fail("a text without an end");
      const char c = text_[at_];
      if (c == '"') return ++at_, made;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a text");
      if (c != '\\') {
        const std::size_t length = utf8_length(text_.substr(at_));
        if (length == 0) fail("invalid UTF-8");
        made.append(text_.substr(at_, length));
        at_ += length;
        continue;
      }
      ++at_;
      const char escaped = peek();
      ++at_;
      const std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      if (const auto which = names.find(escaped); escaped != '\0' && which != names.npos) {
        made += meant[which];
      } else if (escaped == 'u') {
        unsigned code = hex4();
        if (code >= 0xDC00 && code <= 0xDFFF) fail("half of a surrogate pair");
        if (code >= 0xD800 && code <= 0xDBFF) {
          if (!took("\\u")) fail("half of a surrogate pair");
          const unsigned low = hex4();
          if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        append_utf8(made, code);
      } else {
        fail("an unknown escape");
      }
    }
  }

  void digits() {
    if (peek() < '0' || peek() > '9') fail("wanted a value");
    while (peek() >= '0' && peek() <= '9') ++at_;
  }

  void number(Json& made) {
    const std::size_t begin = at_;
    bool whole = true;
    if (peek() == '-') ++at_;
    if (peek() == '0') ++at_;
    else digits();
    if (peek() == '.') whole = false, ++at_, digits();
    if (peek() == 'e' || peek() == 'E') {
      whole = false, ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    const std::string word(text_.substr(begin, at_ - begin));
    if (whole) {
      std::int64_t read = 0;
      if (std::from_chars(word.data(), word.data() + word.size(), read).ec != std::errc()) fail("a number beyond 64 bits");
      made.value_ = read;
    } else {
      const double read = std::strtod(word.c_str(), nullptr);
      if (!std::isfinite(read)) fail("a number beyond a double");
      made.value_ = read;
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

const Json::Object& Json::object(const std::string& where) const {
  if (const auto* held = std::get_if<Object>(&value_)) return *held;
  throw std::runtime_error(where + " is no object");
}

const std::string& Json::text(const std::string& where) const {
  if (const auto* held = std::get_if<std::string>(&value_)) return *held;
  throw std::runtime_error(where + " is no text");
}

std::int64_t Json::integer(const std::string& where) const {
  if (const auto* held = std::get_if<std::int64_t>(&value_)) return *held;
  throw std::runtime_error(where + " is no whole number");
}

const Json* Json::find(std::string_view key) const {
  if (const auto* held = std::get_if<Object>(&value_))
    for (const auto& [name, value] : *held)
      if (name == key) return &value;
  return nullptr;
}

const Json& Json::at(std::string_view key, const std::string& where) const {
  object(where);
  if (const Json* found = find(key)) return *found;
  throw std::runtime_error(where + " has no \"" + std::string(key) + "\"");
}

}  // namespace native
