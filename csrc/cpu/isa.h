// Which compiled copy of the loops runs here.
#pragma once

#include "kernels.h"

namespace afd {

// The widest instruction set of this CPU, or the one forced by use_isa.
const CpuKernels& cpu_kernels();

// The instruction sets this CPU can run, narrowest first; the count is returned, at most 3.
int supported_isas(const char* names[3]);

// Forces an instruction set ("" = the widest); false when this CPU or build does not have it.
bool use_isa(const char* name);

}  // namespace afd
