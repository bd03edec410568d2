// Gloo's TCP pair around a connection that was made elsewhere. Gloo trusts the first bytes of whoever connects to one
// of its listening sockets: 48 wrong ones end the process, or are written wherever they ask for. So Gloo gets to see
// connections between ranks only, and nobody can make one to it. Everything here throws as Gloo does.
#pragma once

#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/device.h>

#include <chrono>
#include <memory>

namespace nibble {

// Gloo cannot be kept from listening while its objects are made. It does so at a random address of 127.0.0.0/8 and a
// port the kernel chooses: out of reach from elsewhere, and from here nobody can guess it before it is closed.
std::shared_ptr<::gloo::transport::tcp::Device> MakeUnreachableDevice();

// Makes a new pair of that device talk over `connection` (which stays the caller's; the pair has a duplicate). From now
// on its reads and writes block in the calling thread, for at most `timeout`: one wake-up per message instead of two
// (Gloo's event thread, then the caller).
void Adopt(int connection, std::chrono::milliseconds timeout, ::gloo::transport::Pair* pair);

}  // namespace nibble
