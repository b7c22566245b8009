#!/bin/sh
# Stage benchmarks on a CUDA machine: the model at batches of 1 to 256 beside the matrix product of the same runtime,
# device and precision, and the copies of its pixels. It needs the two programs (built with --release anywhere and
# copied), ONNX Runtime's GPU library and CUDA's libraries; no Python, no network.
#
#   ORT_DYLIB_PATH=…/libonnxruntime.so LD_LIBRARY_PATH=…cuda… gpu/run.sh PROGRAMS OUTPUT BUNDLE...
#
# PROGRAMS is the folder of clip-model and copy-ceiling, OUTPUT gets the figures as JSON, each BUNDLE is a model bundle
# (fp32, fp16). With `goldens` in PROGRAMS too (the test program that `cargo test --no-run -p clip-model --test goldens`
# names) and GOLDENS naming a copy of lib/model, the vectors in fp16 are compared with PyTorch's first.
# It has not been run on a GPU yet: no GPU figure exists.
set -eu
if [ $# -lt 3 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
programs=$1
output=$2
shift 2
: "${ORT_DYLIB_PATH:?must name the libonnxruntime.so of onnxruntime-gpu}"
mkdir -p "$output"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max \
    --format=csv > "$output/device.csv"
if [ -x "$programs/goldens" ]; then
    # Not through a pipe, which would hide a failure.
    EXECUTION_PROVIDER=cuda "$programs/goldens" in_16_bits --nocapture --test-threads 1 > "$output/goldens.txt" 2>&1 \
        || { cat "$output/goldens.txt" >&2; exit 1; }
    cat "$output/goldens.txt"
fi
"$programs/copy-ceiling" | tee "$output/copies.jsonl"
for bundle in "$@"; do
    name=$(basename "$bundle")
    # The memory and utilisation of the device while the model runs.
    nvidia-smi --query-gpu=utilization.gpu,memory.used,clocks.sm,power.draw --format=csv,noheader -lms 200 \
        > "$output/$name.device.csv" &
    watcher=$!
    trap 'kill "$watcher" 2> /dev/null || true' EXIT
    "$programs/clip-model" bench --provider cuda --threads 1 --batches 1,8,16,32,64,128,256 --json "$bundle" \
        | tee "$output/$name.json"
    kill "$watcher" 2> /dev/null || true
done
echo "figures in $output"
