#!/bin/sh
# All benchmarks: on this machine when its /dev/kvm runs Linux and it has cgroup v2, else in the rig (and it says so).
# With FIRECRACKER=PATH (a static program) the VMM is measured beside it.
#   all.sh FOLDER-OF-PROGRAMS
set -eu
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
images=$PWD/target/guest-images
sh tests/prerequisites.sh rig
"$bin/blixard-rig" guest-images "$images"
state=$("$bin/blixard-vmm" probe || true)
case $state in
"linux guests"* | "small guests"*)
    "$bin/blixard-bench" vmm --vmm "$bin/blixard-vmm" ${FIRECRACKER:+--peer "firecracker=$FIRECRACKER"}
    ;;
*) echo "skipped: the VMM with small guests: $state" ;;
esac
inside='/opt/blixard/blixard dev --no-kernel --state /var/tmp/bench/state --run /var/tmp/bench/run -- sh /opt/bench/inside.sh'
case $state in
"linux guests"*)
    echo "benchmarks run on this machine"
    PATH=$bin:$PATH IMAGES=$images STATE=$PWD/target/bench-state "$bin/blixard" dev --no-kernel --state "$PWD/target/bench-state" --run "$PWD/target/bench-run" -- sh bench/inside.sh
    ;;
*)
    echo "benchmarks run in the rig (emulated processor: compare ratios, not times), because: $state"
    mkdir -p target/bench target/bench/peer
    [ -z "${FIRECRACKER:-}" ] || cp -f "$FIRECRACKER" target/bench/peer/firecracker
    "$bin/blixard-rig" run --timeout 3600 --share "$bin:/opt/blixard" --share "$images:/opt/images" \
        --share "$PWD/bench:/opt/bench" --share "$PWD/target/bench:/opt/out" -- \
        "export PATH=/opt/blixard:\$PATH IMAGES=/opt/images OUT=/opt/out STATE=/var/tmp/bench/state \
            ${FIRECRACKER:+FIRECRACKER=/opt/out/peer/firecracker}; $inside"
    ;;
esac
