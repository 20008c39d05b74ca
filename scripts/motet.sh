#!/usr/bin/env bash
# What the `motet` command of package.json is: scripts/motet.ts on the Node that npm installed here, wherever it is called
# from and whatever `node` is in PATH.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")/..
exec "$root/node_modules/.bin/node" "$root/scripts/motet.ts" "$@"
