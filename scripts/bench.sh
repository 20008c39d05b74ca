#!/usr/bin/env bash
# Loads a server and reports: `npm run bench -- [option ...]`; `-- --help` lists the options.
# `npm run bench -- tables` prints the tables of tests/bench instead. Run it on a machine that does nothing else.
# `npm run bench:peers` puts peers beside us: llama.cpp, vLLM, PEFT.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1-} == tables ]]; then
  bash scripts/setup.sh
  cmake -S native -B native/build -DMOTET_BENCH=ON >/dev/null
  cmake --build native/build --target read_bandwidth_bench int8_peak_bench >/dev/null
  node_modules/.bin/node tests/bench/gateway-overhead.ts
  exec node_modules/.bin/node tests/bench/peers/main.ts --peers motet --only decode,prefill,tax --shapes smollm2 "${@:2}"
fi

# Without a URL it starts an engine, which has to be there.
[[ " $*" == *" --url"* || " $*" == *" --help"* ]] || bash scripts/setup.sh >&2
exec node_modules/.bin/node scripts/motet.ts bench "$@"
