// For builds of llama.cpp by GCC 12, whose _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes (GCC bug
// 114098): the stores to the others are dropped, and the first product of tiles is an illegal instruction.
#pragma once
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(config)))
#endif
