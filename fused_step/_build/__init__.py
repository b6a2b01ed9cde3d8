# SPDX-License-Identifier: MIT
"""How the compiled module is made, recognised and kept.

setup.py and the first import both build by what is here. Nothing here imports the rest of
``fused_step``: setup.py runs before there is a compiled module, and perhaps without torch.
"""
