#!/bin/sh
# What building and testing needs from this machine beyond a Rust toolchain.
#
#   tests/prerequisites.sh build       a linker, certificates for downloads, Rust's library for static programs
#   tests/prerequisites.sh rig         the emulated host of tests/rig
#   tests/prerequisites.sh build rig   both
#
# Says nothing and exits 0 when all is there. Otherwise it installs what is missing when it is root on Debian or
# Ubuntu, or else prints the packages and the command and exits 3. Exit 2: wrong usage.
set -eu

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # users often lack the folders of system programs
missing=

# program NAME PACKAGE
program() {
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

# file PATH PACKAGE
file() {
    [ -e "$1" ] || missing="$missing $2"
}

# The library of the target that .cargo/config.toml names. rustup adds it by itself only when it may (RUSTUP_AUTO_INSTALL) and
# the toolchain is new to it.
rust_target() {
    target=x86_64-unknown-linux-musl
    [ -d "$(rustc --print target-libdir --target $target)" ] && return
    command -v rustup >/dev/null 2>&1 || {
        echo "this Rust toolchain lacks its library for $target, and there is no rustup to add it: see https://rustup.rs" >&2
        exit 3
    }
    rustup target add $target >&2
}

[ $# -gt 0 ] || { echo "usage: $0 build|rig..." >&2; exit 2; }
for tier in "$@"; do
    case $tier in
    build)
        rust_target
        program cc gcc
        # gcc alone cannot link programs of the machine itself (build scripts, procedural macros).
        [ -n "$missing" ] || [ -e "$(cc -print-file-name=crt1.o)" ] || missing="$missing libc6-dev"
        case $missing in *gcc*) missing="$missing libc6-dev" ;; esac
        file /etc/ssl/certs/ca-certificates.crt ca-certificates
        ;;
    rig)
        program qemu-system-x86_64 qemu-system-x86
        program mmdebstrap mmdebstrap
        program gpg gpg # mmdebstrap finds the key of the archive with it
        program mkfs.ext4 e2fsprogs
        program mkfs.erofs erofs-utils
        program ssh openssh-client
        file /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
        # Without root the image is built in a namespace of sub-uids.
        [ "$(id -u)" = 0 ] || program newuidmap uidmap
        ;;
    *)
        echo "$0: unknown tier '$tier'; there are: build rig" >&2
        exit 2
        ;;
    esac
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$missing" >&2
    # Old package lists are the usual reason for a failure; new ones take longer than most installations.
    # shellcheck disable=SC2086 # a list of words
    install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >&2; }
    install || { apt-get update -qq >&2 && install; }
    exit 0
fi
echo "missing packages (Debian and Ubuntu names):$missing" >&2
echo "install them with: sudo apt-get install --no-install-recommends$missing" >&2
exit 3
