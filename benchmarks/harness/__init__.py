# SPDX-License-Identifier: MIT
"""The harness under every bench_*.py: cases, contestants, oracle, protocol, results, report.

Importing this package imports neither torch nor fused_step: report.py needs none of them.
"""

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
