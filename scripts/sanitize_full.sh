#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds the extension with AddressSanitizer and UBSan in a copy of the sources, and runs the Python
# suite in it. The first finding ends the process.
# Usage: PYTHON=.venv/bin/python scripts/sanitize_full.sh TREE [pytest's arguments]
#
# What is not looked at, and why:
#   leaks      Python frees little at its end, and torch nothing: thousands of reports, none of ours
#   vptr       the types of torch's libraries are hidden, and each cast to one would be reported
#   torch      is not instrumented: of what its own kernels do, only the calls of libc are seen
#   the heap's end of a tensor is seen (torch allocates by posix_memalign); from one row to the next
#              it is not, but the tests put NaN there
#   memory     AddressSanitizer keeps what is freed: one test of resident bytes is left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tree=${1:?usage: scripts/sanitize_full.sh TREE [pytest arguments]}
shift
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer"

scripts/copy_tree.sh "$tree"
cd "$tree"
# -O1 compiles in a third of the time; with what makes fused multiply-adds, as -O3 does, or the bits
# were others than torch's.
sed -i 's/"-O3"/"-O1", "-fexpensive-optimizations"/' fused_step/_build/recipe.py
FUSED_STEP_BUILD=require FUSED_STEP_CUDA=0 CFLAGS=$flags LDFLAGS=$flags MAX_JOBS=${MAX_JOBS:-2} \
    "$python" setup.py --quiet build_ext --inplace

# The C++ library must be there before the sanitizer asks it for its exceptions.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
export LD_PRELOAD
# Objects of Python are allocated one by one, so that those freed too early are seen.
export PYTHONMALLOC=malloc PYTHONPATH=$PWD
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1

"$python" - <<'END'
import fused_step
library = fused_step._extension._C.__file__
assert b"__asan_report_load" in open(library, "rb").read(), f"{library} is not instrumented"
print(f"sanitize-full: {library}")
END
"$python" -m pytest \
    --deselect tests/test_benchmarks_isolated.py::test_memory_is_what_a_step_takes "$@"
