#!/usr/bin/env bash
# Everything that `npm test` and CI run: types, lint and format, the C++ tests, the TypeScript tests, and those that need
# a Kubernetes with nodes, which takes root. All of them run even when one fails. The last line is the sum: `N passed, N failed`.
# Arguments go to vitest: `npm test -- tests/gateway` runs the tests of one folder, and a cluster only when one of them needs it.
set -uo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh --test || exit 1
export PATH=$PWD/node_modules/.bin:$PATH

reports=$(mktemp -d)
mkdir "$reports/gtest"
trap 'rm -rf "$reports"' EXIT
failed=() suites=(ctest)
report=(--reporter=default --reporter=json)
cluster=${MOTET_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/motet}/cluster/test
# vitest.config.ts takes it as the sign that the tests run in a cluster.
unset MOTET_CLUSTER

run() {
  printf '\n== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}

run 'types' tsc
run 'lint and format' biome check
# Each C++ test program also writes a report of its own, with its cases.
run 'C++ tests' env GTEST_OUTPUT="xml:$reports/gtest/" \
  ctest --test-dir native/build --no-tests=error --output-on-failure --output-junit "$reports/ctest.xml"

on_cluster() { MOTET_CLUSTER=$cluster tests/cluster/cluster.sh "$@" 8>&-; }

cluster_tests() {
  local status=0
  if ((EUID != 0)); then
    echo 'not run: a Kubernetes with nodes takes root' >&2
    return 1
  fi
  mkdir -p "$cluster"
  # Whoever holds the lock has the cluster to itself, so one that is there is left from a run that was killed.
  exec 8>"$cluster/tests-lock"
  flock 8
  trap 'on_cluster down; rm -rf "$reports"' EXIT
  on_cluster down && tests/cluster/image.sh "$reports/motet.tar" && on_cluster up "$reports/motet.tar" || return 1
  on_cluster exec vitest run "${report[@]}" --outputFile.json="$reports/cluster.json" "$@" || status=1
  echo "memory of the cluster at its peak: $(($(on_cluster memory) >> 20)) MiB"
  on_cluster down || status=1
  return $status
}

# With arguments, only the suites of which they name a test.
if (($# == 0)) || [[ -n $(vitest list --filesOnly "$@") ]]; then
  suites+=(vitest)
  run 'TypeScript tests' vitest run "${report[@]}" --outputFile.json="$reports/vitest.json" "$@"
fi
if (($# == 0)) || [[ -n $(MOTET_CLUSTER=$cluster vitest list --filesOnly "$@") ]]; then
  suites+=(cluster)
  run 'cluster tests' cluster_tests "$@"
fi
((${#suites[@]} > 1)) || { echo "no test is in: $*" >&2; failed+=('no such test'); }
echo
run 'sum' node scripts/sum-tests.ts "$reports" "${suites[@]}"

if ((${#failed[@]})); then
  printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}" | sed 's/,/, /g')" >&2
  exit 1
fi
