#!/usr/bin/env bash
# image.sh OUT.tar [TAG]   The image of Motet from the work tree as it is, without a daemon and in seconds:
# registry.local/motet:TAG, `test` when not given, with the files of scripts/image-files.sh and the settings of the Dockerfile's last stage.
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/image-files.sh "$work"

setting() { sed -n "s/^$1 //p" Dockerfile | tail -n 1; }
environment=$(setting ENV | sed 's/[^ ]*/"&"/g; s/ /,/g')
tests/cluster/oci-image.sh "registry.local/motet:${2:-test}" "$work" "$out" \
  "\"User\":\"$(setting USER)\",\"WorkingDir\":\"$(setting WORKDIR)\",\"Env\":[$environment],\"Cmd\":$(setting CMD)"
