# SPDX-License-Identifier: MIT
"""Random calls of every door, held to the plain loop; tests/fuzz.py runs them."""
