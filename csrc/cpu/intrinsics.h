#pragma once

#ifdef __F16C__
#pragma GCC diagnostic push
// gcc 12 warns about its own header (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
