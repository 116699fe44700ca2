// Marks the functions that Python calls by ctypes: all else of the library is hidden.
#pragma once

#define PATCHGEN_FAST_EXPORT __attribute__((visibility("default")))
