// The pages of a model's two arenas, and moves of bytes between them. A page has the same size in both, so that what is made of
// pages (an adapter, KV blocks) moves up and down as a list of page ids. Nothing here knows what a page holds or who owns it.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace motet {

class Model;

enum class Tier { kDevice, kHost };

// Throws AdapterError, which names the list, unless the pages are distinct ids below num_pages.
void check_pages(std::span<const int32_t> pages, int64_t num_pages, const char* name);
int64_t num_pages_of(const Model& model, Tier tier);

// Page to[i] of the other tier becomes a copy of page from[i] of `source`. Checked by the caller, as are the pages below.
void copy_pages(const Model& model, Tier source, std::span<const int32_t> from, std::span<const int32_t> to);
// The pages hold zeros.
void clear_pages(const Model& model, Tier tier, std::span<const int32_t> pages);
// Pages of the host arena, one after another, to and from bytes [pages.size() · page_bytes].
void read_host_pages(const Model& model, std::span<const int32_t> pages, uint8_t* bytes);
void write_host_pages(const Model& model, std::span<const int32_t> pages, const uint8_t* bytes);

}  // namespace motet
