#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Copies the sources to DEST, for a build that must not disturb the one here. What was built in DEST
# stays, and so do the times of files: the next build there compiles what changed.
# Usage: scripts/copy_tree.sh DEST
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dest=${1:?usage: scripts/copy_tree.sh DEST}

mkdir -p "$dest"
# What is gone here must go there, too.
find "$dest" -mindepth 1 -maxdepth 1 ! -name build ! -name fused_step ! -name '*.egg-info' \
    -exec rm -rf {} +
rm -f "$dest"/fused_step/*.py "$dest"/fused_step/_build/*.py
tar --create --exclude=./.git --exclude=./build --exclude='./.venv*' --exclude='*.so' \
    --exclude=./fused_step/_build_info.json \
    --exclude='__pycache__' --exclude='*.egg-info' --exclude='./.*_cache' --exclude=./.hypothesis \
    --file=- . | tar --extract --directory="$dest" --file=-
