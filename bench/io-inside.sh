#!/bin/sh
# Disk and network of guests on this host, which it changes: it makes a tap and starts an iperf3 server. As root.
#   io-inside.sh KERNEL RELEASE [ARGUMENTS OF blixard-bench io]
set -eu
kernel=$1 release=$2
shift 2
work=$(mktemp -d /var/tmp/bench-io-XXXXXX)
trap 'ip link del bench0 2>/dev/null || :; kill "$server" 2>/dev/null || :; rm -rf "$work"' EXIT
sh "$(dirname "$0")/io-guest.sh" "$work" "$release"
# Written once, so that no program pays for making its blocks, and all of it is in the host's page cache.
dd if=/dev/zero of="$work/disk" bs=1M count=512 2>/dev/null
ip tuntap add bench0 mode tap
ip address add 10.98.0.1/24 dev bench0
ip link set bench0 up
iperf3 -s -B 10.98.0.1 >/dev/null &
server=$!
blixard-bench --out "${OUT:-target/bench}" io --vmm "$(command -v blixard-vmm)" ${FIRECRACKER:+--peer "firecracker=$FIRECRACKER"} \
    --kernel "$kernel" --guest "$work" --disk "$work/disk" "$@"
