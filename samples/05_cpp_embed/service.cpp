// Serves one artifact over TCP: service ARTIFACT [--port 8080] [--threads N]
//
// A connection carries requests one after the other. A request is the bytes of one sample of every input, in the order
// that is printed at the start; the answer is the bytes of every output. Both have a fixed size, so there is no framing.
// Each connection has a thread and a binding of its own: the socket reads into the model's input and writes out of its
// output, and no byte is copied in between.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>

#include "model.hpp"

namespace {

// Reads or writes a whole buffer; false where the other side has gone.
template <typename F>
bool whole(F transfer, int socket, const embed::Buffer& buffer) {
  for (std::size_t done = 0; done < buffer.size;) {
    const ssize_t moved = transfer(socket, buffer.data + done, buffer.size - done, MSG_NOSIGNAL);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return false;
    done += static_cast<std::size_t>(moved);
  }
  return true;
}

void answer(const embed::Model& model, int socket) try {
  embed::PythonThread thread;
  embed::Binding binding = model.bind();
  for (;;) {
    for (const embed::Buffer& input : binding.inputs())
      if (!whole(::recv, socket, input)) return;
    binding.run();
    for (const embed::Buffer& output : binding.outputs())
      if (!whole(::send, socket, output)) return;
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;  // this connection ends, the service goes on
}

int listen_on(std::uint16_t port) {
  const int server = ::socket(AF_INET, SOCK_STREAM, 0);
  const int yes = 1;
  ::setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (::bind(server, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(server, 64) != 0)
    throw std::runtime_error("cannot listen on port " + std::to_string(port) + ": " + std::strerror(errno));
  ::getsockname(server, reinterpret_cast<sockaddr*>(&address), &size);
  std::cout << "listening on 127.0.0.1:" << ntohs(address.sin_port) << std::endl;
  return server;
}

std::string described(const embed::TensorSpec& spec) {
  std::string text = spec.name + ": " + spec.dtype + "[";
  for (std::size_t i = 0; i < spec.shape.size(); ++i)
    text += (i ? ", " : "") + std::to_string(spec.shape[i] < 0 ? 1 : spec.shape[i]);
  return text + "]";
}

int number(const char* text, int most) {
  std::size_t used = 0;
  int value = -1;
  try {
    value = std::stoi(text, &used);
  } catch (const std::logic_error&) {
    used = 0;
  }
  if (used == 0 || text[used] != '\0' || value < 0 || value > most)
    throw std::invalid_argument("not a number from 0 to " + std::to_string(most) + ": " + text);
  return value;
}

}  // namespace

int main(int count, char** words) try {
  int port = 8080, threads = 0;
  for (int i = 2; i < count; i += 2) {
    const std::string option = words[i];
    if (i + 1 == count || (option != "--port" && option != "--threads"))
      throw std::invalid_argument("usage: service ARTIFACT [--port 8080] [--threads N]");
    (option == "--port" ? port : threads) = number(words[i + 1], option == "--port" ? 65535 : 4096);
  }
  if (count < 2) throw std::invalid_argument("usage: service ARTIFACT [--port 8080] [--threads N]");

  embed::Python python;
  embed::Model model(words[1], threads);
  model.bind();  // a model that cannot be bound is told here, not on the first connection
  std::cout << model.info();
  for (const auto& spec : model.inputs()) std::cout << "input " << described(spec) << "\n";
  for (const auto& spec : model.outputs()) std::cout << "output " << described(spec) << "\n";
  const int server = listen_on(static_cast<std::uint16_t>(port));
  for (;;) {
    const int client = ::accept(server, nullptr, nullptr);
    if (client < 0) continue;
    const int yes = 1;
    ::setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    std::thread([&model, client] {
      answer(model, client);
      ::close(client);
    }).detach();
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 2;
}
