// Runs numbered pieces of work on several threads.
#pragma once

#include <stdint.h>

#include <functional>

namespace afd {

// Calls piece(0) .. piece(count - 1), each once, on at most `threads` threads, and waits. Which
// thread runs which piece is left open: results may not depend on it.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& piece);

}  // namespace afd
