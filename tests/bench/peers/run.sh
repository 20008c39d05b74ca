#!/usr/bin/env bash
# Builds what the comparison measures with, then runs it: npm run bench:peers [-- options]. Peers come by setup.sh beside this.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bash scripts/setup.sh
cmake -S native -B native/build -DMOTET_BENCH=ON >/dev/null
cmake --build native/build --target read_bandwidth_bench int8_peak_bench >/dev/null
exec node_modules/.bin/node tests/bench/peers/main.ts "$@"
