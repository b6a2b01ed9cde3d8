// SPDX-License-Identifier: MIT
// Ranges of memory: whether those that are written are apart from each other and from what is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings/memory.h"

namespace fused_step {

inline Extent range_of(const void* data, int64_t bytes) {
  if (bytes == 0) return {0, 0};
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>(bytes)};
}

// Whether `extent` touches none of `sorted`, which are disjoint and sorted. The search begins at
// `place`, which it sets, then at `near`: gradients lie where they lay at the last step, or beside
// each other, and then it is two comparisons.
inline bool is_clear_of(const std::vector<Extent>& sorted, const Extent& extent, size_t& place,
                        size_t near = 0) {
  if (extent.begin == extent.end) return true;
  const auto fits = [&](size_t at) {
    return at <= sorted.size() && (at == 0 || sorted[at - 1].end <= extent.begin) &&
           (at == sorted.size() || extent.end <= sorted[at].begin);
  };
  if (fits(place)) return true;
  place = near;
  if (fits(place)) return true;
  const auto after =
      std::upper_bound(sorted.begin(), sorted.end(), extent,
                       [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  place = static_cast<size_t>(after - sorted.begin());
  return fits(place);
}

// Sorts; false if two overlap.
inline bool sort_disjoint(std::vector<Extent>& extents) {
  std::erase_if(extents, [](const Extent& e) { return e.begin == e.end; });
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t k = 1; k < extents.size(); ++k) {
    if (extents[k].overlaps(extents[k - 1])) return false;
  }
  return true;
}

inline bool same_extents(const std::vector<Extent>& a, const std::vector<Extent>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Extent& x, const Extent& y) {
    return x.begin == y.begin && x.end == y.end;
  });
}

}  // namespace fused_step
