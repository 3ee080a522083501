// Between launch.cpp and the machine that runs the blocks.
#pragma once

#include <stdexcept>

#include "machine.h"

namespace cuda_on_cpu {

// Threads of a block run from the last to the first.
extern bool reversed;

// Every block of the grid; returns what went wrong, empty where nothing did.
std::string run_blocks(const std::function<void()>& body);

// A sentence with the kernel and the thread.
std::string where(const std::string& sentence, const Thread* thread);

// Makes shared memory undefined; what was written beyond a variable's end, or null.
void start_block();
const char* end_block();

inline Thread thread_of(unsigned index, uint3 block_index) {
  return {
      {index % block.x, index / block.x % block.y, index / block.x / block.y}, block_index, index};
}

inline unsigned threads_of_block() { return block.x * block.y * block.z; }

// Calls f(x, y, z) for the blocks of the grid.
template <class F>
void for_each_block(F f) {
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (!f(uint3{x, y, z})) {
          return;
        }
      }
    }
  }
}

inline std::string text(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

// The lanes of a warp that wait in a collective.
struct Warp {
  Collective* waiting[kWarp] = {};

  // Notes a lane's request; true once it is fulfilled, for all lanes of its mask. Where lanes
  // cannot agree, `wrong` says why.
  bool arrive(unsigned lane, unsigned lanes, Collective& c, std::string& wrong) {
    const uint64_t existing = lanes == kWarp ? kFullMask : (1u << lanes) - 1;
    if ((c.mask & ~existing) != 0) {
      wrong = std::string(c.name) + " at " + text(c.site) + ": its mask " + hexadecimal(c.mask) +
              " names lanes of a partial warp that do not exist";
      return false;
    }
    if (!(c.mask >> lane & 1)) {
      wrong = std::string(c.name) + " at " + text(c.site) + ": its mask " + hexadecimal(c.mask) +
              " does not name the lane itself";
      return false;
    }
    waiting[lane] = &c;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (c.mask >> i & 1 && waiting[i] == nullptr) {
        return false;
      }
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(c.mask >> i & 1)) {
        continue;
      }
      const Collective& other = *waiting[i];
      if (other.mask != c.mask || !(other.site == c.site)) {
        wrong = std::string(c.name) + " at " + text(c.site) + " with mask " + hexadecimal(c.mask) +
                ", while lane " + std::to_string(i) + " is in " + other.name + " at " +
                text(other.site) + " with mask " + hexadecimal(other.mask);
        return false;
      }
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      for (unsigned j = 0; c.mask >> i & 1 && j < kWarp; ++j) {
        waiting[i]->values[j] = c.mask >> j & 1 ? waiting[j]->given : 0;
      }
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (c.mask >> i & 1) {
        waiting[i]->done = true;
        waiting[i] = nullptr;
      }
    }
    return true;
  }
};

}  // namespace cuda_on_cpu
