// What a library says about itself.
#include "common.h"

// Changes whenever a function's arguments change: a library built from other sources is refused.
EXPORT int32_t hanmo_abi() { return 2; }
