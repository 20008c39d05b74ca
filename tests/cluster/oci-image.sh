#!/usr/bin/env bash
# oci-image.sh REFERENCE FOLDER OUT.tar [CONFIG]
# Packs a folder as an image of one layer that containerd imports: an OCI image layout in a tar file, made of JSON and
# tar alone. CONFIG is what stands in the image's "config", as JSON without its braces. The same folder is the same image.
set -euo pipefail
reference=$1 root=$2 out=$(realpath -m "$3") config=${4:-}
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/blobs/sha256"
case $(uname -m) in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
esac

pack() { tar --sort=name --mtime=@0 --numeric-owner --owner=0 --group=0 -C "$1" -cf "$2" "${@:3}"; }

# blob MEDIA_TYPE FILE  moves the file to its place and prints its descriptor, still open for more fields
blob() {
  local digest size
  digest=$(sha256sum "$2" | cut -d' ' -f1)
  size=$(stat -c %s "$2")
  mv "$2" "$work/blobs/sha256/$digest"
  printf '"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%s' "$1" "$digest" "$size"
}

pack "$root" "$work/layer" .
layer=$(blob layer.v1.tar "$work/layer")
diff_id=$(grep -o 'sha256:[0-9a-f]*' <<<"$layer")
printf '{"architecture":"%s","os":"linux","config":{%s},"rootfs":{"type":"layers","diff_ids":["%s"]}}' \
  "$architecture" "$config" "$diff_id" >"$work/config"
config=$(blob config.v1+json "$work/config")
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{%s},"layers":[{%s}]}' \
  "$config" "$layer" >"$work/manifest"
manifest=$(blob manifest.v1+json "$work/manifest")
printf '{"schemaVersion":2,"manifests":[{%s,"annotations":{"io.containerd.image.name":"%s"}}]}' \
  "$manifest" "$reference" >"$work/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$work/oci-layout"
pack "$work" "$work/image.tar" oci-layout index.json blobs
mv "$work/image.tar" "$out"
