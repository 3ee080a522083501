// A fresh result of tens of megabytes costs a page fault per 4 KiB, at batch 8 of nft_loss as much
// time as the whole loss.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace afd::cpu {

// Asks for huge pages for a large result: a hint, where it is refused nothing changes.
inline void hint_huge_pages(void* result, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = int64_t{8} << 20;
  if (result != nullptr && bytes >= kWorthwhile) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(result);
    const uintptr_t begin = (at + kPage - 1) / kPage * kPage;
    const uintptr_t end = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)result, (void)bytes;
#endif
}

}  // namespace afd::cpu
