#pragma once

#ifdef __F16C__
#pragma GCC diagnostic push
// What gcc 12 says about its own header, its bug 105593.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
