# SPDX-License-Identifier: MIT
"""Every door by its name."""

from __future__ import annotations

from fuzzing import losses, optimizing, raw_op, training

_ALL = (training.STEP, training.RUN, losses.LOSS, raw_op.OP_DOOR, optimizing.SGD)
DOORS = {door.name: door for door in _ALL}
