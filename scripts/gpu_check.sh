#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Everything that needs a GPU, in under 9 minutes: build, tests, compute-sanitizer, benchmark. Needs
# python3 with torch, nvcc, ninja and pytest; no network. A stage that fails does not stop the later
# ones. Without a GPU it says so, builds, and runs a part of the tests on the CPU.
#
# Usage: scripts/gpu_check.sh OUTDIR [all|check|bench|plans]       (PYTHON=... names another python3)
#   all     the default: everything, benchmarks and the common tests shortened
#   check   build, tests and compute-sanitizer, in 7 minutes
#   bench   build and the benchmarks in full, in 7 minutes
#   plans   build and the time of each plan around the borders between them, in 5 minutes
# Of the common tests, which are thousands, it runs every 8th, or every 24th for all.
# Writes OUTDIR/gpu_check.log, summary.json, and gpu.json and gpu_optim.json with their tables from the
# benchmarks.
# Exit status: 0 all stages passed on a GPU; 1 a stage failed; 2 there is no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage='usage: scripts/gpu_check.sh OUTDIR [all|check|bench|plans]'
out=${1:?$usage}
part=${2:-all}
[[ $part =~ ^(all|check|bench|plans)$ ]] || {
    echo "$usage" >&2
    exit 64
}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
tree=build/gpu-check
log=$out/gpu_check.log
results=$out/stages.tsv
: > "$log"
: > "$results"

# Seconds for all of it and for the build, and what is left. Without a GPU nobody lends one by the
# minute, and the machine may be a small one.
total=530
[[ $part == all ]] || total=420
build_limit=200
left() { echo $((total - SECONDS)); }

say() { printf '%s\n' "$*" | tee -a "$log"; }

record() { # NAME STATUS SECONDS RC REASON
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >> "$results"
    say "--- $1: $2 (${3} s) $5"
}

not_run() { record "$1" "not run" 0 "" "$2"; }

# stage NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than are left.
stage() {
    local name=$1 limit=$2 begin=$SECONDS rc
    shift 2
    ((limit > $(left))) && limit=$(left)
    if ((limit < 5)); then
        not_run "$name" "no time was left"
        return 1
    fi
    say "=== $name (at most $limit s): $*"
    # Interrupted rather than terminated: pytest then still says which tests had failed.
    timeout --signal=INT --kill-after=15 "$limit" "$@" >> "$log" 2>&1 < /dev/null
    rc=$?
    if ((rc == 0)); then
        record "$name" passed $((SECONDS - begin)) 0 ""
    elif ((rc == 124 || rc == 137)); then
        record "$name" "timed out" $((SECONDS - begin)) "$rc" "after $limit s"
    else
        record "$name" failed $((SECONDS - begin)) "$rc" "see gpu_check.log"
    fi
    ((rc == 0)) || tail -n 25 "$log"
    return "$rc"
}

has() { "$python" -c "import $1" 2> /dev/null; }

# --- what is here ---------------------------------------------------------------------------------
"$python" - > "$out/device.json" 2>> "$log" << 'END'
import json
import platform

import torch

found = {"python": platform.python_version(), "torch": torch.__version__, "gpu": None}
if torch.version.cuda and torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found["gpu"] = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "count": torch.cuda.device_count(),
    }
print(json.dumps(found, indent=1))
END
cat "$out/device.json" | tee -a "$log"
gpu=$("$python" -c 'import json, sys; print((json.load(open(sys.argv[1]))["gpu"] or {}).get("name", ""))' \
    "$out/device.json" 2>> "$log")
if [[ -n $gpu ]]; then
    export TORCH_CUDA_ARCH_LIST=native
    say "GPU: $gpu"
else
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0+PTX}
    total=3600
    build_limit=1800
    say "NO GPU: torch finds none here. Nothing below says anything about a GPU: this builds for"
    say "$TORCH_CUDA_ARCH_LIST, and tests the CPU engine of that build."
fi
export FUSED_STEP_CUDA=1 PYTHONUNBUFFERED=1
# The tools of an environment that is named and not activated: without ninja a build takes far longer.
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
export PATH
say "setuptools $("$python" -c 'import setuptools; print(setuptools.__version__)'), $(command -v ninja || echo no ninja)"
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS
for package in hypothesis xdist rich jsonschema matplotlib tqdm sklearn jax; do
    has "$package" || say "$package is not installed: what needs it is left out, and says so"
done

# --- the stages -----------------------------------------------------------------------------------
scripts/copy_tree.sh "$tree"
cd "$tree" || exit 1
# Everywhere below: this tree's package, and nobody else's.
PYTHONPATH=$PWD
export PYTHONPATH
# Other plugins than ours warn, and a warning is an error.
pytest=("$python" -m pytest -q -o minversion=1 -p no:cacheprovider -p no:benchmark --tb=short
    --maxfail=300)
alone=("${pytest[@]}")
has xdist && pytest+=(-n "$((MAX_JOBS < 8 ? MAX_JOBS : 8))" --dist worksteal)

stage build "$build_limit" env FUSED_STEP_BUILD=require "$python" setup.py build_ext --inplace &&
    stage import 60 "$python" -m fused_step info
built=$?

if ((built != 0)); then
    for name in "suite of CUDA" suite memcheck racecheck benchmark "benchmark of the optimizer"; do
        not_run "$name" "the build failed"
    done
elif [[ -z $gpu ]]; then
    stage "suite, a part of it, on the CPU" 900 "${pytest[@]}" --junitxml=suite.xml \
        tests/test_info.py tests/test_op_linear_mse_sgd.py tests/test_train_step_resume.py \
        tests/test_cuda.py tests/test_sgd_cuda.py
    for name in "suite of CUDA" suite memcheck racecheck; do not_run "$name" "there is no GPU"; done
    stage "sanitizer's set, on the CPU, without a sanitizer" 300 \
        "$python" scripts/sanitizer_set.py --device cpu
    stage "benchmark, rehearsed on the CPU" 600 "$python" benchmarks/bench_gpu.py --rehearse
    stage "benchmark of the optimizer, rehearsed on the CPU" 300 \
        "$python" benchmarks/bench_gpu_optim.py --rehearse
    for name in benchmark "benchmark of the optimizer"; do not_run "$name" "there is no GPU"; done
fi
if ((built == 0)) && [[ -n $gpu && $part =~ ^(all|check)$ ]]; then
    # Alone on the GPU: they look at its memory and its time.
    stage "suite of CUDA" 120 "${alone[@]}" --junitxml=cuda.xml --device=cuda \
        tests/test_cuda.py tests/test_sgd_cuda.py
    if command -v compute-sanitizer > /dev/null; then
        # Without torch's cache of memory, so that what lies beyond a tensor is nobody's; our kernels
        # alone, since torch's are many and slow to check.
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 80 compute-sanitizer --tool "$tool" \
                --kernel-name kns=fused_step --report-api-errors no --error-exitcode 9 \
                --print-limit 20 \
                "$python" scripts/sanitizer_set.py
        done
    else
        for tool in memcheck racecheck; do not_run "$tool" "compute-sanitizer is not installed"; done
    fi
    every=8
    [[ $part == all ]] && every=24
    mapfile -t files < tests/gpu_suite.txt
    stage suite 150 "${pytest[@]}" --every="$every" --junitxml=suite.xml --device=cuda "${files[@]}"
fi
if ((built == 0)) && [[ -n $gpu && $part =~ ^(all|bench)$ ]]; then
    if [[ $part == all ]]; then
        limits=(45 150) optim=(--quick) steps=(--quick)
    else
        limits=(90 300) optim=(--seconds 65) steps=(--seconds 250)
    fi
    stage "benchmark of the optimizer" "${limits[0]}" \
        "$python" benchmarks/bench_gpu_optim.py "${optim[@]}" --out results
    stage benchmark "${limits[1]}" "$python" benchmarks/bench_gpu.py "${steps[@]}" --out results
fi
if ((built == 0)) && [[ -n $gpu && $part == plans ]]; then
    stage "benchmark of the plans" 260 "$python" benchmarks/bench_gpu_plans.py --out results
fi
# What the pictures show is in there.
[[ ! -d results ]] || cp results/*.json results/*.md "$out"

# --- what came of it ------------------------------------------------------------------------------
"$python" - "$out" << 'END' | tee -a "$log"
import json
import pathlib
import sys
import xml.etree.ElementTree as ET

out = pathlib.Path(sys.argv[1])
stages = []
for line in (out / "stages.tsv").read_text().splitlines():
    name, status, seconds, rc, reason = line.split("\t")
    stages.append(
        {
            "stage": name,
            "status": status,
            "seconds": int(seconds),
            "exit": int(rc) if rc else None,
            "reason": reason,
        }
    )
suite = None
reports = [pathlib.Path(name) for name in ("cuda.xml", "suite.xml")]
cases = [c for xml in reports if xml.is_file() for c in ET.parse(xml).getroot().iter("testcase")]
if cases:
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skips = [c.find("skipped") for c in cases if c.find("skipped") is not None]
    suite = {
        "tests": len(cases),
        "failed": [f"{c.get('classname')}.{c.get('name')}" for c in failed],
        "skipped": len(skips),
        "reasons_for_skips": sorted({s.get("message", "") for s in skips}),
    }
device = json.loads((out / "device.json").read_text() or "{}")
summary = {**device, "stages": stages, "suite": suite}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(f"\n{'stage':<52}{'status':<12}{'s':>5}")
for s in stages:
    print(f"{s['stage']:<52}{s['status']:<12}{s['seconds']:>5}  {s['reason']}")
if suite:
    print(f"tests: {suite['tests']}, failed: {len(suite['failed'])}, skipped: {suite['skipped']}")
    for name in suite["failed"][:20]:
        print("  failed:", name)
END
rm -f "$results" "$out/device.json"
say "written: $out ($SECONDS s)"
if [[ -z $gpu ]]; then
    say "NO GPU: nothing was checked on one"
    exit 2
fi
"$python" -c 'import json, sys
sys.exit(any(s["status"] != "passed" for s in json.load(open(sys.argv[1]))["stages"]))' \
    "$out/summary.json"
