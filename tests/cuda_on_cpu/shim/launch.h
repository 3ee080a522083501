// kernel<<<grid, block, bytes, stream>>>(arguments), as tests/cuda_on_cpu/rewrite.py spells it.
#pragma once

#include <tuple>
#include <utility>

#include "machine.h"

namespace cuda_on_cpu {

// As on a device every thread has its own copies of the arguments.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Config& config, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  const std::tuple<Parameters...> given(std::forward<Arguments>(arguments)...);
  run(name, config, [&] { std::apply(kernel, given); });
}

}  // namespace cuda_on_cpu
