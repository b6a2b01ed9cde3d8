// SPDX-License-Identifier: MIT
#include "bindings/sgd_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/policy.h"

namespace fused_step {

namespace {

// The first item that ends behind element `at` of all.
auto item_at(const std::vector<SgdItem>& items, int64_t at) {
  return std::upper_bound(items.begin(), items.end(), at,
                          [](int64_t at, const SgdItem& i) { return at < i.end; });
}

// Calls body(item, first, n) for the parts of items that make up elements [begin, end) of all.
template <typename Body>
void for_each_part(const std::vector<SgdItem>& items, int64_t begin, int64_t end,
                   const Body& body) {
  auto item = item_at(items, begin);
  for (int64_t at = begin; at < end; ++item) {
    const int64_t n = std::min(item->end, end) - at;
    if (n == 0) continue;
    body(*item, at - (item->end - item->slice.n), n);
    at += n;
  }
}

void* advance(void* pointer, int64_t bytes) {
  return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + bytes;
}

}  // namespace

void sgd_cpu(const std::vector<SgdItem>& items, const std::vector<cpu::SgdRule>& rules,
             ItemsUpdated updated) {
  const cpu::SgdKernels& kernels = cpu::sgd_kernels();
  const auto update = [&](const SgdItem& item, const cpu::SgdSlice& slice) {
    kernels.update[static_cast<int>(item.storage)](slice, rules[static_cast<size_t>(item.group)]);
  };
  const int64_t total = elements(items);
  const int64_t cost = total + cpu::kItemCost * static_cast<int64_t>(items.size());
  // Waking a thread for less than two grains costs what it saves.
  if (cost <= 2 * cpu::kElementwiseGrain || at::get_num_threads() == 1) {
    for (const SgdItem& item : items) update(item, item.slice);
    return updated(0, items.size());
  }
  const int64_t grain = std::max<int64_t>(1, cpu::kElementwiseGrain * total / cost);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for_each_part(items, begin, end, [&](const SgdItem& item, int64_t first, int64_t n) {
      if (n == item.slice.n) return update(item, item.slice);
      cpu::SgdSlice slice = item.slice;
      slice.param = advance(slice.param, first * param_bytes(item.storage));
      slice.grad = advance(slice.grad, first * param_bytes(item.storage));
      slice.buf = advance(slice.buf, first * buf_bytes(item.storage));
      slice.n = n;
      update(item, slice);
    });
    // Those without elements end where the one before them does.
    const auto first = begin == 0 ? items.begin() : item_at(items, begin);
    updated(static_cast<size_t>(first - items.begin()),
            static_cast<size_t>(item_at(items, end) - items.begin()));
  });
}

double sgd_grad_norm_cpu(const std::vector<SgdItem>& items) {
  const cpu::SgdKernels& kernels = cpu::sgd_kernels();
  const int64_t total = elements(items);
  const int64_t chunks = cpu::ceil_div(total, cpu::kElementwiseGrain);
  std::vector<double> sums(static_cast<size_t>(chunks));
  at::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    for (int64_t c = first_chunk; c < last_chunk; ++c) {
      const int64_t begin = c * cpu::kElementwiseGrain;
      const int64_t end = std::min(begin + cpu::kElementwiseGrain, total);
      double sum = 0.0;
      for_each_part(items, begin, end, [&](const SgdItem& item, int64_t first, int64_t n) {
        const void* const grad = advance(item.slice.grad, first * param_bytes(item.storage));
        sum += kernels.sum_squares[static_cast<int>(item.storage)](grad, n);
      });
      sums[static_cast<size_t>(c)] = sum;
    }
  });
  double sum = 0.0;
  for (const double s : sums) sum += s;
  return std::sqrt(sum);
}

}  // namespace fused_step
