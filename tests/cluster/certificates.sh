#!/usr/bin/env bash
# certificates.sh FOLDER SERVER_URL NAME_OR_ADDRESS,... [NODE=ADDRESS...]
# Makes what the parts of a cluster know each other by: two certificate authorities, a certificate for each part, a
# kubeconfig for each client, and the key that signs service account tokens. The server answers to the names given.
set -euo pipefail
folder=$1 url=$2 server_names=$3
shift 3
mkdir -p "$folder"
cd "$folder"
umask 077

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }

# authority NAME SUBJECT
authority() {
  key "$1"
  openssl req -x509 -new -key "$1.key" -subj "/CN=$2" -days 3650 -out "$1.crt" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
}

# certificate NAME AUTHORITY SUBJECT USAGE [NAMES]
certificate() {
  key "$1"
  {
    echo 'basicConstraints=CA:FALSE'
    echo 'keyUsage=critical,digitalSignature,keyEncipherment'
    echo "extendedKeyUsage=$4"
    [[ -z ${5:-} ]] || echo "subjectAltName=$5"
  } >"$1.extensions"
  openssl req -new -key "$1.key" -subj "$3" -out "$1.request"
  openssl x509 -req -in "$1.request" -CA "$2.crt" -CAkey "$2.key" -CAcreateserial -days 3650 \
    -extfile "$1.extensions" -out "$1.crt" 2>/dev/null
  rm "$1.request" "$1.extensions"
}

# client NAME SUBJECT  a certificate and the kubeconfig that holds it
client() {
  certificate "$1" ca "$2" clientAuth
  cat >"$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: motet, cluster: {server: "$url", certificate-authority-data: "$(base64 -w0 ca.crt)"}}]
users: [{name: $1, user: {client-certificate-data: "$(base64 -w0 "$1.crt")", client-key-data: "$(base64 -w0 "$1.key")"}}]
contexts: [{name: motet, context: {cluster: motet, user: $1}}]
current-context: motet
YAML
}

authority ca motet-test
authority front-proxy-ca front-proxy
openssl genrsa -out service-account.key 2048 2>/dev/null
openssl rsa -in service-account.key -pubout -out service-account.pub 2>/dev/null
certificate apiserver ca /CN=kube-apiserver serverAuth "$server_names"
certificate apiserver-kubelet ca /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
certificate front-proxy front-proxy-ca /CN=front-proxy-client clientAuth
client admin /O=system:masters/CN=admin
client controller-manager /CN=system:kube-controller-manager
client scheduler /CN=system:kube-scheduler
client proxy /CN=system:kube-proxy
client coredns /CN=system:coredns
client network-policy /CN=system:network-policy
for node in "$@"; do
  name=${node%%=*}
  client "kubelet-$name" "/O=system:nodes/CN=system:node:$name"
  certificate "kubelet-serving-$name" ca "/O=system:nodes/CN=system:node:$name" serverAuth \
    "DNS:$name,IP:127.0.0.1,IP:${node#*=}"
done
