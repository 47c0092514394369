// Scores of few rows by tiles: keys stand in tiles as they lie in the cache, one row a token, and the queries in columns.
// Nothing of the cache is brought into another order for them.
#pragma once

#include "page.h"

namespace slingshot {
namespace LEVEL {

#if defined(__AMX_BF16__)

constexpr int TILE_ROWS = 16;  // queries, at most

// Whether tiles of keys end where keys end: beyond may stand what is no number.
inline bool fits_tiles(int width, int rows) { return width % 32 == 0 && rows <= TILE_ROWS; }

// Queries [16][depth words] to columns [depth][16].
inline void turn_queries(const Pair* queries, int depth, Pair* to) { transpose_words(queries, depth, depth, to, 16); }

// scores[row * ld + token] of up to four pages, each at pages[i], rows of keys `stride` numbers apart.
inline void score_pages(const bf16* const* pages, int count, size_t stride, const Pair* columns, int depth, int rows,
                        float* scores, int ld) {
    alignas(64) float made[4][16 * 16];
    memory_is_written(columns);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < depth; k += 16) {
        _tile_loadd(6, columns + static_cast<size_t>(k) * 16, 64);
        _tile_loadd(4, pages[0] + k * 2, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (count > 1) {
            _tile_loadd(5, pages[1] + k * 2, stride * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (count > 2) {
            _tile_loadd(4, pages[2] + k * 2, stride * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (count > 3) {
            _tile_loadd(5, pages[3] + k * 2, stride * 2);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, made[0], 64);
    _tile_stored(1, made[1], 64);
    _tile_stored(2, made[2], 64);
    _tile_stored(3, made[3], 64);
    memory_is_written(made);
    for (int i = 0; i < count; i++) transpose_words(made[i], 16, (rows + 3) / 4 * 4, scores + i * 16, ld);
}

#else

constexpr bool fits_tiles(int, int) { return false; }

#endif

}  // namespace LEVEL
}  // namespace slingshot
