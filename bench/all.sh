#!/bin/sh
# All benchmarks: on this machine when its /dev/kvm runs Linux and it has cgroup v2, else in the rig (and it says so).
#   all.sh FOLDER-OF-PROGRAMS
set -eu
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
images=$PWD/target/guest-images
sh tests/prerequisites.sh rig
"$bin/blixard-rig" guest-images "$images"
state=$("$bin/blixard-vmm" probe || true)
inside='/opt/blixard/blixard dev --no-kernel --state /var/tmp/bench/state --run /var/tmp/bench/run -- sh /opt/bench/inside.sh'
case $state in
"linux guests"*)
    echo "benchmarks run on this machine"
    PATH=$bin:$PATH IMAGES=$images "$bin/blixard" dev --no-kernel --state "$PWD/target/bench-state" --run "$PWD/target/bench-run" -- sh bench/inside.sh
    ;;
*)
    echo "benchmarks run in the rig (emulated processor: compare ratios, not times), because: $state"
    mkdir -p target/bench
    "$bin/blixard-rig" run --timeout 1800 --share "$bin:/opt/blixard" --share "$images:/opt/images" \
        --share "$PWD/bench:/opt/bench" --share "$PWD/target/bench:/opt/out" -- \
        "export PATH=/opt/blixard:\$PATH IMAGES=/opt/images OUT=/opt/out; $inside"
    ;;
esac
