// SPDX-License-Identifier: MIT
// Many steps in one call, each a single chunk: in registers where one output has at most two
// vectors of inputs, otherwise in memory. Included once per instruction set (simd.h).

namespace FUSED_STEP_ISA {

template <typename T>
FUSED_STEP_INLINE void memory_steps(const SerialSteps<T>& a) {
  OnePassUpdate<T> update{a.partial.dweight, 1, 0, a.params};
  LinearParams<T>& p = update.params;
  BatchCursor<T> at(a);
  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t rows = at.rows();
    one_pass_chunk<T>({{at.x(), at.target(), a.data.x_stride, a.data.target_stride, rows},
                       p.weight,
                       p.bias,
                       p.I,
                       p.O,
                       at.dy_scale(rows),
                       a.partial});
    one_pass_update<T>(update, 0, p.O, 0, p.I);
    update_bias<T>(a.partial.dbias, 1, p.O, p);
    p.weight_options.first_step = p.bias_options.first_step = false;
    a.losses[step] = static_cast<T>(*a.partial.loss * mse_loss_scale(a.reduction, rows, p.O));
    at.advance(rows);
  }
}

template <typename T>
void serial_steps(const SerialSteps<T>& a) {
  if (a.params.O == 1 && a.params.I > 0 && a.params.I <= kLanes<T>) {
    register_steps<T, 1>(a);
  } else if (a.params.O == 1 && a.params.I > kLanes<T> && a.params.I <= 2 * kLanes<T>) {
    register_steps<T, 2>(a);
  } else {
    memory_steps(a);
  }
}

}  // namespace FUSED_STEP_ISA
