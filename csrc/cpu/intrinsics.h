#pragma once

// MSVC's /arch:AVX2 has F16C too, and defines no macro for it.
#if defined(_MSC_VER) && defined(__AVX2__)
#define __F16C__ 1
#endif

#ifdef __F16C__
#pragma GCC diagnostic push
// gcc 12 warns about its own header (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
