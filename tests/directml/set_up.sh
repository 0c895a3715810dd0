#!/bin/sh
# set_up.sh [DIRECTORY] [SUITE]: makes what the tests marked `directml` run on: a Debian system with Wine, a Vulkan driver that computes on the
# CPU, and the unmodified DLLs of onnxruntime-directml. For root on Debian; 3 GB and about ten minutes. What is finished is not done again.
#
# DIRECTORY: build/directml of this repository by default; the tests look there, or in $DIRECTML_ROOT. SUITE: another release of Debian.
# Packages come from where apt and pip of this machine get theirs.
set -e
here=$(cd "$(dirname "$0")" && pwd)
root=${1:-${DIRECTML_ROOT:-$here/../../build/directml}}
suite=${2:-trixie}
version=1.24.4  # of onnxruntime-directml, the last one

say() { echo "set_up: $*"; }
fail() { say "$*" >&2; exit 1; }
inside() { "$here/enter.sh" "$root" "$@"; }
# step NAME: false if it is done. finish NAME: it is.
step() { [ ! -e "$root/.done-$1" ] && say "$1"; }
finish() { touch "$root/.done-$1"; }

[ "$(id -u)" = 0 ] || fail "only root can make and enter a Debian system"
mkdir -p "$root"
root=$(cd "$root" && pwd)
rm -f "$root/.ready"

if step debian; then
    command -v debootstrap > /dev/null || apt-get install -y -q debootstrap > /dev/null
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | sort -u | head -n 1)
    [ -n "$mirror" ] || fail "apt of this machine has no mirror of Debian: run apt-get update"
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror" > "$root.log" 2>&1 || fail "debootstrap failed: $root.log"
    echo 'APT::Install-Recommends "false"; Acquire::Check-Valid-Until "false";' > "$root/etc/apt/apt.conf.d/90directml"
    sed 's/^deb /deb-src /' "$root/etc/apt/sources.list" > "$root/etc/apt/sources.list.d/sources-too.list"
    finish debian
fi

if step packages; then
    inside apt-get update > "$root.log"
    # DXGI finds no adapter without a display.
    inside apt-get install -y wine wine64 libwine-dev mesa-vulkan-drivers xvfb xauth \
        g++-mingw-w64-x86-64-posix mingw-w64-x86-64-dev bison flex libvulkan-dev dpkg-dev xz-utils > "$root.log" 2>&1 || fail "see $root.log"
    finish packages
fi

if step sources; then
    mkdir -p "$root/build/sources"
    inside sh -c 'cd /build/sources && apt-get source -qq --download-only --only-source wine && tar xf wine_*.orig.tar.* --strip-components=1 &&
        apt-get download -qq libonnxruntime-dev && dpkg -x libonnxruntime-dev_*.deb /build/onnxruntime'
    finish sources
fi

if step libraries; then
    mkdir -p "$root/directml" "$root/build/wheel"
    pip download -q --no-deps --only-binary=:all: --platform win_amd64 --python-version 3.12 --implementation cp -d "$root/build/wheel" \
        "onnxruntime-directml==$version"
    python3 -c 'import sys, zipfile
for name in (file := zipfile.ZipFile(sys.argv[1])).namelist():
    if name.endswith(".dll"): open(sys.argv[2] + "/" + name.split("/")[-1], "wb").write(file.read(name))' \
        "$root"/build/wheel/onnxruntime_directml-"$version"-*.whl "$root/directml"
    finish libraries
fi

# The parts of our own, made again when their text changes.
mkdir -p "$root/build/windows"
for source in "$here"/windows/*; do
    cmp -s "$source" "$root/build/windows/${source##*/}" && continue
    cp "$source" "$root/build/windows/"
    case $source in *server.cpp) rm -f "$root/.done-server" ;; *) rm -f "$root/.done-direct3d" ;; esac
done

if step direct3d; then
    rm -rf "$root/build/direct3d" && mkdir "$root/build/direct3d"
    inside sh -c 'cd /build/direct3d && sh /build/windows/build_d3d12.sh /build/sources /directml/d3d12.dll' > "$root.log" 2>&1 || fail "see $root.log"
    finish direct3d
fi

if step server; then
    inside x86_64-w64-mingw32-g++ -O1 -w -static -I/build/onnxruntime/usr/include/onnxruntime \
        -o /directml/onnxruntime_server.exe /build/windows/onnxruntime_server.cpp -lpsapi
    finish server
fi

if step wine; then
    inside env WINEPREFIX=/wine WINEDEBUG=-all WINEDLLOVERRIDES='mscoree,mshtml=' timeout 300 wineboot -i > "$root.log" 2>&1 || fail "see $root.log"
    finish wine
fi

touch "$root/.ready"
rm -f "$root.log"
say "ready: $root"
