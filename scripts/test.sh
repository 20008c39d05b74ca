#!/usr/bin/env bash
# Everything that `npm test` and CI run: types, lint and format, the C++ tests, the TypeScript tests.
# All of them run even when one fails. The last line is the sum: `N passed, N failed`.
# Arguments go to vitest: `npm test -- tests/gateway` runs the tests of one folder.
set -uo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh --test || exit 1
export PATH=$PWD/node_modules/.bin:$PATH

reports=$(mktemp -d)
mkdir "$reports/gtest"
trap 'rm -rf "$reports"' EXIT
failed=()

run() {
  printf '\n== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}

run 'types' tsc
run 'lint and format' biome check
# Each C++ test program also writes a report of its own, with its cases.
run 'C++ tests' env GTEST_OUTPUT="xml:$reports/gtest/" \
  ctest --test-dir native/build --no-tests=error --output-on-failure --output-junit "$reports/ctest.xml"
run 'TypeScript tests' vitest run --reporter=default --reporter=json --outputFile.json="$reports/vitest.json" "$@"
echo
run 'sum' node scripts/sum-tests.ts "$reports"

if ((${#failed[@]})); then
  printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}" | sed 's/,/, /g')" >&2
  exit 1
fi
