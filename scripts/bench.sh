#!/usr/bin/env bash
# Prints the tables of tests/bench. Run it on a machine that does nothing else.
# MOTET_LLAMA_BENCH=/path/to/llama-bench adds llama.cpp on the same file.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
cmake -S native -B native/build -DMOTET_BENCH=ON >/dev/null
cmake --build native/build --target read_bandwidth_bench >/dev/null
node_modules/.bin/node tests/bench/gateway-overhead.ts
exec node_modules/.bin/node tests/bench/step-speed.ts "$@"
