#!/usr/bin/env bash
# Sets the machine up if need be, then starts one engine and the gateway. Arguments go to scripts/start.ts.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec node_modules/.bin/node scripts/start.ts "$@"
