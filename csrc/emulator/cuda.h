// What a .cu file finds here instead of NVIDIA's headers when g++ compiles it: included by cuda/launch.h alone.
#pragma once

#include "keywords.h"

#include "types.h"

#include "half.h"

#include "atomics.h"
#include "device_math.h"
#include "runtime.h"
#include "start.h"
#include "warp.h"
