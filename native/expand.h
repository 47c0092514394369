// MLA's expanded form for prompts: keys and values of every head are made from the sequence's latents, and its new tokens
// attend as with grouped queries. Of two widths that a score and a value then have, nope + rope and value, both are far
// below the latent's; making them pays from a number of new tokens on that follows from the widths. The other sequences
// of the step stay absorbed.
#pragma once

#include "expand_plan.h"
#include "packed.h"
#include "pool.h"

namespace slingshot {
namespace LEVEL {

// keys [rows, heads, nope + rope] and values [rows, heads, value] of all pieces from entries [pages, PAGE];
// to_keys and to_values are each head's part of kv_b_proj, [nope, latent] and [value, latent].
template <class T>
void expand_entries(const LatentPlanner& plan, const LatentShape& shape, const Stack& to_keys, const Stack& to_values,
                    const void* entries, T* keys, T* values, const Team& team);

// q [tokens, heads, nope + rope] of the expanded sequences, from what write_latent made.
template <class T>
void expand_queries(const LatentPlanner& plan, const LatentShape& shape, const T* q_nope, int nope_stride,
                    const T* q_absorbed, T* q, const Team& team);

}  // namespace LEVEL
}  // namespace slingshot
