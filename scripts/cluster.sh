#!/usr/bin/env bash
# A Kubernetes of two nodes on this machine, with Motet from the work tree installed in it. It takes root.
#
#   npm run cluster                       brings it up; once more, installs the work tree as it is now
#   npm run cluster -- exec COMMAND...    kubectl, helm, curl or anything else on the cluster's network
#   npm run cluster -- forward [PORT]     the gateway at 127.0.0.1:PORT of this machine, 8080 when not given, until Ctrl-C
#   npm run cluster -- down               removes it, and all that was in it
#
# Other verbs are those of tests/cluster/cluster.sh. MOTET_CLUSTER=FOLDER keeps it in a folder of its own, beside others.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/cluster/common.sh
source tests/cluster/common.sh
export MOTET_CLUSTER=${MOTET_CLUSTER:-$cluster_cache/default}
cluster=tests/cluster/cluster.sh
namespace=motet
models=${cluster_cache%/cluster}/models
model=SmolLM2-135M-Instruct.Q4_1.gguf

main() {
  case "${1:-up}" in
    up) up ;;
    forward) exec node_modules/.bin/node scripts/forward.ts "${2:-8080}" "motet-gateway.$namespace.svc.cluster.local:80" ;;
    down) "$cluster" down && rm -rf "$MOTET_CLUSTER/"{motet.tar,models} ;;
    *) exec "$cluster" "$@" ;;
  esac
}

up() {
  ((EUID == 0)) || { echo 'cluster: it takes root to make namespaces and cgroups' >&2; exit 1; }
  bash scripts/setup.sh --cluster
  mkdir -p "$MOTET_CLUSTER"
  log=$MOTET_CLUSTER/install.log
  : >"$log"
  # shellcheck source=scripts/step.sh
  source scripts/step.sh

  # A tag of its own each time, so that all pods are replaced, those of the operator's making too.
  tag=$(date +%Y%m%d-%H%M%S)
  step 'image of the work tree' tests/cluster/image.sh "$MOTET_CLUSTER/motet.tar" "$tag"
  if flock -n "$MOTET_CLUSTER/lock" true; then
    step 'cluster of two nodes' "$cluster" up "$MOTET_CLUSTER/motet.tar"
  else
    step 'image to the nodes' "$cluster" load "$MOTET_CLUSTER/motet.tar"
  fi
  step 'Motet' install_motet
  step 'examples' apply_examples
  print_summary
}

install_motet() {
  "$cluster" exec kubectl apply -f - <<YAML
apiVersion: v1
kind: Namespace
metadata: {name: $namespace, labels: {pod-security.kubernetes.io/enforce: restricted}}
YAML
  "$cluster" exec helm upgrade --install motet helm/motet --namespace "$namespace" --wait --timeout 3m \
    --set "image.repository=registry.local/motet,image.tag=$tag,weightCache.hostPath=/var/lib/motet,weightCache.size=1Gi"
}

# The examples read from a claim `models`; here it is a folder of the machine, the same on both nodes.
apply_examples() {
  local examples=examples/kubernetes folder=$MOTET_CLUSTER/models
  mkdir -p "$folder"
  ln -f "$models/$model" "$folder/" 2>/dev/null || cp "$models/$model" "$folder/"
  cp -r examples/adapters "$folder/"
  rm -rf "$folder/adapters/sql-v2"
  cp -r "$folder/adapters/sql" "$folder/adapters/sql-v2"
  "$cluster" exec kubectl apply -f - <<YAML
apiVersion: v1
kind: PersistentVolume
metadata: {name: $namespace-models}
spec:
  capacity: {storage: 2Gi}
  accessModes: [ReadWriteMany]
  claimRef: {namespace: $namespace, name: models}
  hostPath: {path: "$folder", type: Directory}
YAML
  "$cluster" exec kubectl apply --namespace "$namespace" -f "$examples"
  "$cluster" exec kubectl wait --namespace "$namespace" --for=condition=Ready --timeout=5m basemodels,loraadapters --all
}

print_summary() {
  cat <<TEXT

Motet runs in namespace $namespace of a cluster of two nodes. Try:

  npm run cluster -- exec kubectl get nodes
  npm run cluster -- exec kubectl -n $namespace get motet,pods
  npm run cluster -- exec curl -s http://motet-gateway.$namespace.svc.cluster.local/v1/models \\
    -H 'authorization: Bearer $(sed -n 's/^ *key: *//p' examples/kubernetes/tenant.yaml | head -n 1)'
  npm run cluster -- forward 8080      and then, in another terminal, http://127.0.0.1:8080/v1

\`npm run cluster -- down\` removes it.
TEXT
}

main "$@"
