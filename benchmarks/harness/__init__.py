# SPDX-License-Identifier: MIT
"""The harness under every bench_*.py: cases, contestants, oracle, protocol, results, report.

Importing this package imports neither torch nor fused_step, so that a contestant in a process of
its own loads only what it needs.
"""
