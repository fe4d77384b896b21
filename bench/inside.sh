#!/bin/sh
# Runs beside a node that is ready (BLIXARD_HOST is set): imports what is needed and measures. STATE is the node's folder of state,
# FIRECRACKER a program to compare with, if any.
set -eu
release=$(ls /lib/modules | grep cloud | head -n 1 || true)
if [ -n "$release" ]; then
    blixard kernel import --name default --kernel "/boot/vmlinuz-$release" --modules "/lib/modules/$release" >/dev/null
fi
blixard image import "$IMAGES/busybox.tar" --name busybox >/dev/null
blixard-bench --out "${OUT:-target/bench}" boot --runs "${RUNS:-10}"
# The kernel as VMs of this node get it: unpacked.
kernel=$(find "$STATE" -type f -size +16M -exec sh -c 'head -c 4 "$1" | grep -q ELF' _ {} \; -print | head -n 1)
[ -n "$kernel" ] || exit 0
blixard-bench --out "${OUT:-target/bench}" kernel --vmm "$(command -v blixard-vmm)" \
    ${FIRECRACKER:+--peer "firecracker=$FIRECRACKER"} --kernel "$kernel" --runs "${RUNS:-10}"

missing=
for program in fio iperf3 busybox mkfs.erofs; do command -v $program >/dev/null || missing="$missing $program"; done
if [ -z "$release" ] || [ -n "$missing" ]; then
    echo "skipped: disk and network: this host lacks ${missing:-Debian's cloud kernel}"
    exit 0
fi
sh "$(dirname "$0")/io-inside.sh" "$kernel" "$release"
