#!/usr/bin/env bash
# A Kubernetes without machines: etcd and kube-apiserver as plain processes on 127.0.0.1. It wants no root, takes
# seconds, and as many run side by side as one likes.
#
#   control-plane.sh run [OPTION...] FOLDER   until its standard input ends or a signal comes
#   control-plane.sh up [OPTION...] FOLDER    the same in the background, until `down`
#   control-plane.sh down FOLDER
#   control-plane.sh stop-apiserver|start-apiserver FOLDER
#
#   --controllers     with kube-controller-manager and kube-scheduler: Deployments make pods, owners' garbage is
#                     collected, namespaces go when deleted
#   --fake-nodes N    with them, and N nodes that kwok keeps Ready; pods on them become Running at once. Pod addresses
#                     are in 127.64.0.0/16, so that a test can serve at them.
#   --remove          remove FOLDER at the end
#
# FOLDER holds the state: admin.kubeconfig, log/ (log/audit.jsonl has the writes, and what ServiceAccounts read), pid/.
# `run` prints `ready FOLDER-OF-KUBECTL-AND-HELM`, then reads lines `stop PROCESS` and `start PROCESS` and answers `stopped` and `started`.
# However it ends, by `kill -9` too, its processes end with it.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "$0")/common.sh"

verb=${1:-}
shift || true
options=() with_controllers=0 num_fake_nodes=0 removes=0 state=
while (($#)); do
  case "$1" in
    --controllers) with_controllers=1 options+=("$1") ;;
    --fake-nodes) with_controllers=1 num_fake_nodes=$2 options+=("$1" "$2"); shift ;;
    --remove) removes=1 options+=("$1") ;;
    -*) echo "control-plane: unknown option $1" >&2; exit 2 ;;
    *) state=$(realpath -m "$1") ;;
  esac
  shift
done
[[ -n $state ]] || { sed -n '2,20p' "$0"; exit 2; }
modules=(kubernetes clients)
((!num_fake_nodes)) || modules+=(kwok)

run() {
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock -n 9 || { echo "control-plane: another one runs in $state" >&2; exit 1; }
  rm -rf "${state:?}"/{etcd,etcd:0,etcd-peer:0,log,pid,pki}
  trap stop_all EXIT
  trap 'exit 0' TERM INT HUP
  # The kernel ends a process when the one that started it is gone.
  launcher=(setpriv --pdeathsig KILL)

  port=$(free_port)
  start_etcd
  "$cluster_scripts/certificates.sh" "$state/pki" "https://127.0.0.1:$port" DNS:localhost,IP:127.0.0.1,IP:$service_address
  cp "$state/pki/admin.kubeconfig" "$state/admin.kubeconfig"
  start_apiserver_here
  wait_for_apiserver "$port"
  if ((with_controllers)); then
    # Nodes get no range of addresses of their own here, or kwok would take pod addresses from it.
    start_controller_manager --allocate-node-cidrs=false
    start_scheduler
  fi
  ((!num_fake_nodes)) || start_fake_nodes
  echo "ready $(program_folder clients)"

  local action name
  while read -r action name; do
    case "$action $name" in
      stop\ *) kill_process "$name"; echo "stopped $name" ;;
      'start kube-apiserver') start_apiserver_here; wait_for_apiserver "$port"; echo "started $name" ;;
      *) echo "control-plane: cannot $action $name" >&2 ;;
    esac
  done
}

# There is no node, so there is no address that the endpoints of Service `kubernetes` could have.
start_apiserver_here() { start_apiserver 127.0.0.1 127.0.0.1 "$port" --endpoint-reconciler-type=none; }

# A port below the range from which the kernel takes ports of outgoing connections, and on which nobody listens.
free_port() {
  local port
  while port=$((10000 + SRANDOM % 20000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

start_fake_nodes() {
  local i
  start kwok kwok --kubeconfig="$state/admin.kubeconfig" --config= --manage-all-nodes=true --cidr=127.64.0.1/16 \
    --node-lease-duration-seconds=40 --server-address=
  for ((i = 0; i < num_fake_nodes; i++)); do
    cat <<YAML
---
apiVersion: v1
kind: Node
metadata:
  name: fake-$i
  labels: {kubernetes.io/hostname: fake-$i, kubernetes.io/os: linux, topology.kubernetes.io/zone: zone-$((i % 3))}
status:
  allocatable: {cpu: "32", memory: 256Gi, pods: "500"}
  capacity: {cpu: "32", memory: 256Gi, pods: "500"}
YAML
  done | kubectl --kubeconfig="$state/admin.kubeconfig" create -f - >/dev/null
  wait_for 60 kwok kubectl --kubeconfig="$state/admin.kubeconfig" wait --for=condition=Ready nodes --all --timeout=1s
}

stop_all() {
  local file
  for file in "$state"/pid/*; do [[ ! -e $file ]] || kill_process "${file##*/}"; done
  rm -rf "${state:?}"/{etcd,etcd:0,etcd-peer:0}
  ((!removes)) || rm -rf "$state"
}

# send COMMAND ANSWER  to the one that runs in the background
send() {
  local from
  from=$(wc -l <"$state/run.log")
  echo "$1" >"$state/commands"
  until tail -n "+$((from + 1))" "$state/run.log" | grep -qxF "$2"; do
    flock -n "$state/lock" true && { echo "control-plane: it has ended; see $state/run.log" >&2; exit 1; }
    sleep 0.1
  done
}

case "$verb" in
  run)
    "$cluster_scripts/build.sh" "${modules[@]}"
    add_programs "${modules[@]}"
    run
    ;;
  up)
    "$cluster_scripts/build.sh" "${modules[@]}"
    mkdir -p "$state"
    flock -n "$state/lock" true || { echo "control-plane: another one runs in $state" >&2; exit 1; }
    rm -f "$state/commands"
    mkfifo "$state/commands"
    # Opened for reading and writing: it never ends, whoever comes and goes at its other end.
    setsid "$0" run "${options[@]}" "$state" <>"$state/commands" >"$state/run.log" 2>&1 &
    pid=$!
    echo "$pid" >"$state/run.pid"
    until grep -q ^ready "$state/run.log"; do
      kill -0 "$pid" 2>/dev/null || { cat "$state/run.log" >&2; exit 1; }
      sleep 0.1
    done
    echo "export KUBECONFIG=$state/admin.kubeconfig PATH=$(program_folder clients):\$PATH"
    ;;
  down)
    # The lock is held as long as it runs, so the process id is its own and not that of a later process.
    if [[ -e $state/run.pid ]] && ! flock -n "$state/lock" true; then
      kill "$(<"$state/run.pid")"
      flock -w 20 "$state/lock" true
    fi
    ;;
  stop-apiserver) send 'stop kube-apiserver' 'stopped kube-apiserver' ;;
  start-apiserver) send 'start kube-apiserver' 'started kube-apiserver' ;;
  *) sed -n '2,20p' "$0"; exit 2 ;;
esac
