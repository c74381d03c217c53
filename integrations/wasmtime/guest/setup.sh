#!/usr/bin/env bash
# Fetches SQLite, compiled to WebAssembly, from npm into target/, if it is not there already.
set -euo pipefail

package=@sqlite.org/sqlite-wasm
version=3.53.4-build2
sha256=2ee8f3dab694532afc8840e07703127287662d08b74e6ff50491ce63f00d5752

cd "$(dirname "$0")/../../.."
guests=${CARGO_TARGET_DIR:-target}/guests
wasm=$guests/sqlite3-$version.wasm

if [ ! -e "$wasm" ]; then
    echo "fetching $package $version from npm" >&2
    mkdir -p "$guests"
    scratch=$(mktemp -d "$guests/sqlite.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    (cd "$scratch" && npm pack --silent "$package@$version" >archive && tar xzf "$(cat archive)")
    found=$(sha256sum "$scratch/package/dist/sqlite3.wasm" | cut -d ' ' -f 1)
    if [ "$found" != "$sha256" ]; then
        echo "expected sqlite3.wasm with the SHA-256 $sha256, found $found" >&2
        exit 1
    fi
    mv "$scratch/package/dist/sqlite3.wasm" "$wasm"
fi
realpath "$wasm"
