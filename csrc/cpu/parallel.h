// Runs numbered pieces of work on several threads.
#pragma once

#include <stdint.h>

namespace afd {

using Piece = void (*)(const void* body, int64_t i, int worker);
void run_pieces(int64_t count, int threads, const void* body, Piece piece);

// Calls body(i, worker) for i in [0, count), each once, on at most `threads` threads, and waits.
// Which thread runs which piece is left open: results may not depend on it. `worker`, below
// `threads`, is a number of the thread's own during the call, for scratch that the caller
// allocates. The first exception of a body ends the call once every thread has left it; pieces that
// have not begun are then dropped. Nothing is allocated here, and where a thread cannot be started
// the others do its share.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  run_pieces(count, threads, &body, [](const void* erased, int64_t i, int worker) {
    (*static_cast<const Body*>(erased))(i, worker);
  });
}

}  // namespace afd
