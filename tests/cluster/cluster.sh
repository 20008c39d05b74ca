#!/usr/bin/env bash
# A real Kubernetes on one machine, as root, without Docker or an image registry: etcd, kube-apiserver,
# kube-controller-manager, kube-scheduler and CoreDNS, and on each node containerd, kubelet, kube-proxy and kube-router,
# which enforces NetworkPolicies.
#
#   cluster.sh up [--nodes N] [--without-dns] [IMAGE.tar...]   two nodes unless N is given
#   cluster.sh down
#   cluster.sh exec COMMAND...        on node 0: its network, KUBECONFIG, kubectl and helm, names of Services resolved
#   cluster.sh load IMAGE.tar...      gives the images to every node
#   cluster.sh images                 those that node 0 has
#   cluster.sh kill-node N            as if its power failed; not for node 0, where the control plane is
#   cluster.sh start-node N
#   cluster.sh stop-apiserver | start-apiserver
#   cluster.sh memory                 bytes of memory that all its processes and pods have held at most, page cache included
#
# MOTET_CLUSTER chooses the folder of its state, one for each cluster: admin.kubeconfig, log/, nodeN/. A node has /run and
# /var of its own (nodeN/run, nodeN/var) and shares every other folder with the machine, so a hostPath volume under
# /var is one node's and outlives its restart, and a hostPath elsewhere is the machine's.
#
# A node is a set of namespaces: network, mounts, processes, host name. Node 0 is a bridge, 10.99.0.10; node N has 10.99.0.1N
# behind it. Pods are in 10.244.N.0/24, Services in 10.96.0.0/16. Nothing of this is seen outside. What starts a cluster stays
# as its supervisor, outside: when the first process of node 0 ends, for whatever reason, the kernel ends all the others and
# takes back mounts and links, and the supervisor removes cgroups and files. Was the supervisor killed, then `up` or `down` does.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "$0")/common.sh"

self=$cluster_scripts/cluster.sh
state=$(realpath -m "${MOTET_CLUSTER:-$cluster_cache/default}")
api_port=6443
server_address=10.99.0.10
# cgroup of all its processes: `system` in it for the cluster's own, `nodeN` for the pods of a node. Its name comes from the
# folder's, so what a crash has left is found again, even by who has removed the folder.
cgroup=motet-$(sha256sum <<<"$state" | cut -c1-8)
node_address() { echo "10.99.0.$((10 + $1))"; }
pod_range_of() { echo "10.244.$1.0/24"; }

fail() {
  echo "cluster: $*" >&2
  exit 1
}

assert_possible() {
  ((EUID == 0)) || fail 'it takes root to make namespaces and cgroups'
  # The nodes hide the machine's own /run and /var; a socket's path has at most 107 characters.
  case "$state/" in
    /run/* | /var/*) fail "its folder cannot be in /run or /var: $state" ;;
  esac
  ((${#state} <= 80)) || fail "the path of its folder is longer than 80 characters: $state"
}

# --- the supervisor, outside of the namespaces --------------------------------------------------------------------

up() {
  num_nodes=2 with_dns=1
  local images=() modules=(kubernetes clients network-policy pause) supervisor end
  while (($#)); do
    case "$1" in
      --nodes) num_nodes=$2; shift ;;
      --without-dns) with_dns=0 ;;
      -*) fail "unknown option $1" ;;
      *) images+=("$(realpath "$1")") ;;
    esac
    shift
  done
  assert_possible
  ((!with_dns)) || modules+=(coredns)
  "$cluster_scripts/build.sh" "${modules[@]}"

  mkdir -p "$state"
  exec 9>"$state/lock"
  flock -n 9 || fail "one runs in $state already"
  clean_up
  rm -rf "$state/log"
  mkdir "$state/log"
  images+=("$(program_folder pause)/pause.tar")
  {
    echo "num_nodes=$num_nodes with_dns=$with_dns"
    echo "images=(${images[*]@Q})"
    echo "modules=(${modules[*]})"
  } >"$state/settings"

  # The supervisor reads from `starter`, which only this process holds open for writing: until it is told that all is
  # well, it takes an end of this process, of whatever kind, as the end of the cluster.
  mkfifo "$state/starter"
  exec 8<>"$state/starter"
  setsid "$self" __supervise <"$state/starter" >"$state/log/cluster.log" 2>&1 8>&- &
  supervisor=$!
  end=$((SECONDS + 180))
  until [[ -e $state/ready ]]; do
    if ! kill -0 "$supervisor" 2>/dev/null; then
      cat "$state/log/cluster.log" >&2
      fail "it did not start; its logs are in $state/log"
    fi
    ((SECONDS < end)) || fail "it was not ready in time; its logs are in $state/log"
    sleep 0.1
  done
  echo ready >&8
}

supervise() {
  local pid
  exec 3<&0 </dev/null
  setpriv --pdeathsig KILL \
    unshare --net --mount --pid --uts --fork --kill-child=SIGKILL --mount-proc --propagation private \
    "$self" __first_node 3<&- 9>&- &
  pid=$!
  echo "$pid" >"$state/unshare.pid"
  (
    exec 9>&-
    read -r -u 3 _ || kill_first_process
  ) &
  exec 3<&-
  wait "$pid" || true
  clean_up
}

# The first process of node 0, as seen from outside. Fails when there is none.
first_process() {
  local pid
  flock -n "$state/lock" true 2>/dev/null && return 1
  pid=$(tr -d ' ' <"/proc/$(<"$state/unshare.pid")/task/$(<"$state/unshare.pid")/children") 2>/dev/null
  [[ -n $pid ]] && echo "$pid"
}

kill_first_process() {
  local pid
  pid=$(first_process) && kill -9 "$pid"
}

down() {
  local end=$((SECONDS + 60))
  mkdir -p "$state"
  until flock -n "$state/lock" true; do
    ((SECONDS < end)) || fail "it does not end; its supervisor holds $state/lock"
    kill_first_process 2>/dev/null || true
    flock -w 1 "$state/lock" true || true
  done
  exec 9>"$state/lock"
  flock -n 9 || fail "one has just been started in $state"
  clean_up
}

cgroup_folders() {
  local hierarchy
  for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [[ ! -e $hierarchy/$cgroup ]] || echo "$hierarchy/$cgroup"
  done
}

# What is left when all its processes have ended: cgroups and files. Logs stay until the next `up`.
clean_up() {
  local folder
  for folder in $(cgroup_folders); do remove_cgroups "$folder"; done
  rm -rf --one-file-system "${state:?}"/{etcd,etcd:0,etcd-peer:0,node[0-9]*,pid,pki}
  rm -f "$state"/{ready,objects-made,starter,settings,unshare.pid,admin.kubeconfig,resolv.conf,audit-policy.yaml,*.kubeconfig}
}

# The kernel needs a moment until the last process has left a cgroup.
remove_cgroups() {
  local end=$((SECONDS + 20))
  while find "$1" -depth -type d -exec rmdir {} + 2>/dev/null; [[ -e $1 ]]; do
    ((SECONDS < end)) || fail "the cgroup $1 cannot be removed"
    find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null | xargs --no-run-if-empty kill -9 2>/dev/null || true
    sleep 0.05
  done
}

# Makes them, and moves this process into `system`.
make_cgroups() {
  local hierarchy node file parts=(system)
  for ((node = 0; node < num_nodes; node++)); do parts+=("node$node"); done
  if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    mkdir "/sys/fs/cgroup/$cgroup"
    for node in '' "$cgroup/"; do
      sed 's/\(^\| \)/&+/g' "/sys/fs/cgroup/$node/cgroup.controllers" >"/sys/fs/cgroup/$node/cgroup.subtree_control"
    done
    for node in "${parts[@]}"; do mkdir "/sys/fs/cgroup/$cgroup/$node"; done
    echo 0 >"/sys/fs/cgroup/$cgroup/system/cgroup.procs"
    return
  fi
  for hierarchy in /sys/fs/cgroup/*/; do
    # Version 2 beside version 1 has no controllers, and nobody makes cgroups in it.
    [[ ! -e $hierarchy/cgroup.controllers ]] || continue
    for node in . "${parts[@]}"; do
      mkdir -p "$hierarchy$cgroup/$node"
      # A new cpuset is empty, and no process may enter it.
      for file in cpuset.cpus cpuset.mems; do
        [[ ! -e $hierarchy$file ]] || cat "$hierarchy$file" >"$hierarchy$cgroup/$node/$file"
      done
    done
    echo 0 >"$hierarchy$cgroup/system/cgroup.procs"
  done
}

# --- inside: node 0 with the control plane, and the other nodes ----------------------------------------------------

first_node() {
  local node names=DNS:kubernetes
  make_cgroups
  prepare_node 0
  ip link add node type bridge
  ip address add "$server_address/24" dev node
  ip link set node up
  # A packet to a Service needs a route before its address is rewritten.
  ip route add "$service_range" dev node
  add_routes 0
  for name in kubernetes.default{,.svc,.svc.cluster.local}; do names+=,DNS:$name; done
  "$cluster_scripts/certificates.sh" "$state/pki" "https://$server_address:$api_port" \
    "$names,IP:127.0.0.1,IP:$server_address,IP:$service_address" \
    $(for ((node = 0; node < num_nodes; node++)); do echo "node$node=$(node_address "$node")"; done)
  cp "$state/pki/admin.kubeconfig" "$state/admin.kubeconfig"

  start_etcd
  start_the_apiserver
  for ((node = 1; node < num_nodes; node++)); do spawn_node "$node"; done
  start_containerd 0
  wait_for_apiserver "$api_port"
  make_objects
  start_controller_manager
  start_scheduler
  touch "$state/objects-made"
  start_node_agents 0
  if ((with_dns)); then start_dns; fi
  for ((node = 0; node < num_nodes; node++)); do
    wait_for 90 kube-apiserver kubectl wait --for=condition=Ready "node/node$node" --timeout=5s
  done
  wait_for 30 kube-controller-manager kubectl get serviceaccount default
  touch "$state/ready"
  idle
}

other_node() {
  prepare_node "$1"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip address add "$(node_address "$1")/24" dev eth0
  ip link set eth0 up
  ip route add default via "$server_address"
  add_routes "$1"
  start_containerd "$1"
  until [[ -e $state/objects-made ]]; do sleep 0.05; done
  start_node_agents "$1"
  idle
}

# spawn_node N  from node 0: the other node's namespaces, and a cable from it to the bridge.
spawn_node() {
  local pid child=
  start "node$1" unshare --net --mount --pid --uts --fork --kill-child=SIGKILL --mount-proc --propagation private \
    "$self" __other_node "$1"
  pid=$(<"$state/pid/node$1")
  until child=$(tr -d ' ' <"/proc/$pid/task/$pid/children") && [[ -n $child ]]; do sleep 0.02; done
  ip link delete "node$1" 2>/dev/null || true
  ip link add "node$1" type veth peer name eth0 netns "$child"
  ip link set "node$1" master node up
}

# prepare_node N  in namespaces just made
prepare_node() {
  local home=$state/node$1 folder name
  # Mounts that the kubelet makes have to reach the containers.
  mount --make-rshared /
  # As after a boot: nothing in /run, the addresses that pods had are free again, and so are their cgroups, for each of which
  # the kubelet would wait some seconds.
  rm -rf "$home/run" "$home/var/lib/cni"
  for folder in $(cgroup_folders); do
    find "$folder/node$1" -mindepth 1 -depth -type d -exec rmdir {} +
  done
  mkdir -p "$home"/run "$home"/var/{lib,log,tmp} "$home/sysctl"
  ln -sfn /run "$home/var/run"
  # For the chart's weightCache.hostPath.
  install -d -o 65532 -g 65532 -m 750 "$home/var/lib/motet"
  chmod 1777 "$home/var/tmp"
  for folder in run var; do
    mount --bind "$home/$folder" "/$folder"
    # In a group of its own, or each mount in it would appear a second time under $state.
    mount --make-private "/$folder"
    mount --make-shared "/$folder"
  done
  # Settings of the whole machine that a kubelet changes: it changes a copy.
  for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    cat "/proc/sys/$name" >"$home/sysctl/${name//\//.}"
    mount --bind "$home/sysctl/${name//\//.}" "/proc/sys/$name"
  done
  hostname "node$1"
  ip link set lo up
  sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1
}

# To the pods of the other nodes.
add_routes() {
  local node
  for ((node = 0; node < num_nodes; node++)); do
    [[ $node == "$1" ]] || ip route add "$(pod_range_of "$node")" via "$(node_address "$node")"
  done
}

start_containerd() {
  local home=$state/node$1 image is_new=1
  # A node that comes back has its images.
  [[ ! -e $home/containerd ]] || is_new=0
  mkdir -p "$home/cni"
  cat >"$home/cni/10-bridge.conflist" <<JSON
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge", "bridge": "pods", "isGateway": true, "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [[{ "subnet": "$(pod_range_of "$1")" }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
      }
    },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
JSON
  # restrict_oom_score_adj: root in a virtual machine may lack CAP_SYS_RESOURCE, and then a container whose score is to
  # be lowered fails with "can't get final child's PID".
  cat >"$home/containerd.toml" <<TOML
version = 2
root = "$home/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.local/pause:test"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$home/cni"
TOML
  start "containerd-$1" containerd --config "$home/containerd.toml"
  wait_for 20 "containerd-$1" ctr version
  ((!is_new)) || for image in "${images[@]}"; do import "$image" >>"$state/log/images-$1.log"; done
}

import() { ctr -n k8s.io images import "$1"; }

start_node_agents() {
  local home=$state/node$1 pki=$state/pki
  echo "nameserver $server_address" >"$home/resolv.conf"
  # failCgroupV1: the kubelet runs on either version. Disk bounds are low: the disk is the whole machine's.
  cat >"$home/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup/node$1
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $pki/kubelet-serving-node$1.crt
tlsPrivateKeyFile: $pki/kubelet-serving-node$1.key
clusterDNS: [$server_address]
clusterDomain: cluster.local
resolvConf: $home/resolv.conf
volumePluginDir: /var/lib/kubelet/volumeplugins
failSwapOn: false
nodeStatusUpdateFrequency: 4s
syncFrequency: 10s
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
serializeImagePulls: false
YAML
  cat >"$home/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $pki/proxy.kubeconfig}
mode: iptables
clusterCIDR: $pod_range
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
  start "kubelet-$1" kubelet --config="$home/kubelet.yaml" --kubeconfig="$pki/kubelet-node$1.kubeconfig" \
    --hostname-override="node$1" --node-ip="$(node_address "$1")"
  start "kube-proxy-$1" kube-proxy --config="$home/kube-proxy.yaml" --hostname-override="node$1"
  start "kube-router-$1" kube-router --kubeconfig="$pki/network-policy.kubeconfig" --hostname-override="node$1" \
    --run-firewall=true --run-router=false --run-service-proxy=false --enable-cni=false \
    --service-cluster-ip-range="$service_range"
  wait_for 30 "kube-router-$1" curl -fsS --noproxy '*' http://127.0.0.1:20244/healthz
}

start_the_apiserver() { start_apiserver 0.0.0.0 "$server_address" "$api_port"; }

# The Node objects come before the kubelets, each with the range that its CNI takes addresses from, and with the address
# without which kube-router does not start.
make_objects() {
  local node
  {
    cat "$cluster_scripts/objects.yaml"
    for ((node = 0; node < num_nodes; node++)); do
      cat <<YAML
---
apiVersion: v1
kind: Node
metadata:
  name: node$node
  labels:
    kubernetes.io/hostname: node$node
    topology.kubernetes.io/region: here
    topology.kubernetes.io/zone: zone-$node
spec: {podCIDR: $(pod_range_of "$node"), podCIDRs: [$(pod_range_of "$node")]}
status: {addresses: [{type: InternalIP, address: $(node_address "$node")}]}
YAML
    done
  } | kubectl create -f - >/dev/null
}

start_dns() {
  cat >"$state/node0/Corefile" <<COREFILE
.:53 {
  bind $server_address
  errors
  ready 127.0.0.1:8181
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $state/pki/coredns.kubeconfig motet
    ttl 1
  }
}
COREFILE
  printf 'nameserver %s\nsearch svc.cluster.local cluster.local\noptions ndots:5\n' "$server_address" >"$state/resolv.conf"
  start coredns coredns -conf "$state/node0/Corefile"
  wait_for 30 coredns curl -fsS --noproxy '*' http://127.0.0.1:8181/ready
}

# The first process of a node also buries the orphans in it.
idle() {
  trap 'exit 0' TERM
  while :; do
    sleep 3600 &
    wait $! || true
  done
}

# --- verbs on a running cluster -------------------------------------------------------------------------------------

# inside N VERB...  this script, in the namespaces of a node, at its container runtime or its processes
inside() {
  local pid node=$1
  shift
  pid=$(first_process) || fail "none runs in $state"
  if ((node > 0)); then
    nsenter -t "$pid" --net --mount --pid --uts -- "$self" __inside_other "$node" "$@"
  else
    nsenter -t "$pid" --net --mount --pid --uts -- "$self" "$@"
  fi
}

load_settings() {
  [[ -e $state/settings ]] || fail "none runs in $state"
  # shellcheck source=/dev/null
  source "$state/settings"
  # shellcheck disable=SC2154
  add_programs "${modules[@]}"
}

# exec COMMAND...  in a mount namespace of its own, in which names are asked of the cluster's DNS
run_in_cluster() {
  local pid
  pid=$(first_process) || fail "none runs in $state"
  export KUBECONFIG=$state/admin.kubeconfig MOTET_CLUSTER=$state
  exec nsenter -t "$pid" --net -- unshare --mount --propagation slave bash -c \
    '[[ ! -e $0 ]] || mount --bind "$0" /etc/resolv.conf; exec "$@"' "$state/resolv.conf" "$@"
}

verb=${1:-}
shift || true
case "$verb" in
  up) up "$@" ;;
  down) down ;;
  exec) load_settings; run_in_cluster "$@" ;;
  load)
    load_settings
    for ((node = 0; node < num_nodes; node++)); do
      for image in "$@"; do inside "$node" __import "$(realpath "$image")"; done
    done
    ;;
  images) inside 0 __images ;;
  kill-node) inside 0 __kill_node "$1" ;;
  start-node) inside 0 __start_node "$1" ;;
  stop-apiserver) inside 0 __stop_apiserver ;;
  start-apiserver) inside 0 __start_apiserver ;;
  memory) cat /sys/fs/cgroup/{memory/"$cgroup"/memory.max_usage_in_bytes,"$cgroup"/memory.peak} 2>/dev/null || true ;;

  __supervise) load_settings; supervise ;;
  __first_node) load_settings; export KUBECONFIG=$state/admin.kubeconfig; first_node ;;
  __other_node) load_settings; other_node "$1" ;;
  __inside_other)
    pid=$(<"$state/pid/node$1")
    pid=$(tr -d ' ' <"/proc/$pid/task/$pid/children")
    exec nsenter -t "$pid" --net --mount --pid --uts -- "$self" "${@:2}"
    ;;
  __import) import "$1" ;;
  __images) ctr -n k8s.io images list -q ;;
  __kill_node)
    is_running "node$1" || fail "node $1 does not run"
    kill_process "node$1"
    ;;
  __start_node)
    load_settings
    (($1 > 0 && $1 < num_nodes)) || fail "there is no node $1 to start"
    ! is_running "node$1" || fail "node $1 runs"
    spawn_node "$1"
    ;;
  __stop_apiserver) kill_process kube-apiserver ;;
  __start_apiserver)
    load_settings
    start_the_apiserver
    wait_for_apiserver "$api_port"
    ;;
  *) sed -n '2,15p' "$0"; exit 2 ;;
esac
