// Typed tests for the element types that this instruction set multiplies.
#pragma once

#include <gtest/gtest.h>

#include "parts.h"

namespace rnnfast::RNNFAST_ISA {

#if defined(RNNFAST_BF16_ONLY)
using Elements = ::testing::Types<BFloat16>;
#else
using Elements = ::testing::Types<float, double>;
#endif

}  // namespace rnnfast::RNNFAST_ISA
