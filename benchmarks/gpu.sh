#!/usr/bin/env bash
# Everything about one CUDA device in at most 8 minutes, from the source tree: nothing is installed, nothing fetched.
#
#   benchmarks/gpu.sh                              the tests marked cuda, training steps, decoding, memory
#   SECTIONS="tests step_S" benchmarks/gpu.sh      only these (tests, step_S, step_M, step_nano, decode)
#   DEVICE=cpu benchmarks/gpu.sh                   a rehearsal on tiny sizes
#
# PYTHON names the interpreter (3.11 or newer, with torch 2.11 or newer); OUT the JSON file, written after each section.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON= names one")'
export PYTHONPATH="$PWD:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
# No section may ask a network for a model, a file or a version.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" benchmarks/gpu.py --device "${DEVICE:-cuda}" --sections "${SECTIONS:-}" \
    --json "${OUT:-benchmarks/results/gpu_${DEVICE:-cuda}.json}" "$@"
