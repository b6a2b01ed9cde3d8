#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Makes the sdist and both kinds of wheel, checks them, and installs each wheel in a fresh environment
# in another folder, where README.md's snippets must run: the wheel with the compiled module, built as
# pip builds, in isolation, and the one with the sources, which compiles at the first import.
#
# Usage: scripts/check_package.sh PYTHON     a python with requirements/package.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath --no-symlinks "${1:?usage: scripts/check_package.sh PYTHON}")
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=(-m pip --disable-pip-version-check --quiet)

say() { printf -- '--- %s (%d s)\n' "$*" "$SECONDS"; }

say "sdist"
"$python" -m build --sdist --outdir "$work" . > "$work/sdist.log" || { cat "$work/sdist.log"; exit 1; }
say "wheel with the compiled module, from the sdist, in pip's isolated build"
FUSED_STEP_BUILD=require "$python" "${pip[@]}" wheel --no-deps -w "$work/compiled" "$work"/*.tar.gz
say "wheel with the sources"
FUSED_STEP_BUILD=never "$python" "${pip[@]}" wheel --no-deps -w "$work/sources" "$work"/*.tar.gz
compiled=$(echo "$work"/compiled/fused_step-*-cp3*-linux_*.whl)
sources=$(echo "$work"/sources/fused_step-*-py3-none-any.whl)
"$python" -m twine check --strict "$work"/*.tar.gz "$compiled" "$sources"
"$python" -m check_wheel_contents "$compiled" "$sources"

say "fresh environment"
"$python" -m venv "$work/env"
fresh=$work/env/bin/python
"$fresh" "${pip[@]}" install --constraint requirements/build.txt torch numpy
cd "$work" # where no fused_step/ is beside the process
export FUSED_STEP_CACHE=$work/cache

say "the compiled module, as installed"
"$fresh" "${pip[@]}" install "$compiled"
"$fresh" -W error -m fused_step info | tee info.txt
grep -q "file .*$work/env/.*/fused_step/_C\." info.txt
"$fresh" -W error "$root/tests/test_readme.py"

say "the sources, compiled at the first import"
"$fresh" "${pip[@]}" install --force-reinstall --no-deps "$sources"
"$fresh" -W error "$root/tests/test_readme.py" 2>&1 | tee first.txt
grep -q "compiled, in $work/cache/" first.txt
say "the second import"
"$fresh" -W error "$root/tests/test_readme.py" 2>&1 | tee second.txt
if grep -q "fused_step: " second.txt; then exit 1; fi
"$fresh" -m fused_step info | grep "file .*$work/cache/"
"$fresh" -m fused_step cache --clear
say "done"
