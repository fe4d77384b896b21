#!/bin/sh
# All tests, tier by tier. Each tier that cannot run here is one line with its reason, never silence.
#   all.sh [unit|rig|hosts] [FILTER]
set -eu
cd "$(dirname "$0")/.."
only=${1:-all} filter=${2:-}
cargo=${CARGO:-cargo}
target=x86_64-unknown-linux-musl
bin=$PWD/target/$target/debug
skipped=""

say() { printf '\n== %s\n' "$*"; }
skip() { skipped="$skipped
skipped: $*"; }

# test_program NAME: one static file like all programs; the rig runs it as it is.
test_program() {
    cp -f "$($cargo test -p blixard-tests --test "$1" --no-run --message-format=json 2>/dev/null |
        sed -n "s/.*\"executable\":\"\([^\"]*$1[^\"]*\)\".*/\1/p" | tail -n 1)" "$programs/$1"
}

# to_hosts PROGRAM FOLDER: without what only debuggers read, which is four fifths of them: emulated disks are slow.
to_hosts() {
    strip -g -o "$2/${1##*/}" "$1"
}

programs=$PWD/target/programs
mkdir -p "$programs/next"
# Init goes into every guest's memory: the small one.
$cargo build --workspace --bins
$cargo build --release -p blixard-init
for program in blixard blixard-agent blixard-netd blixard-node blixard-vmm; do to_hosts "$bin/$program" "$programs"; done
cp -f "target/$target/release/blixard-init" "$programs/"
# A node that knows one feature level more, to upgrade to: `knows_next_level` in cluster/src/node.rs.
LC_ALL=C sed 's/blixard-node-test-feature-level+0/blixard-node-test-feature-level+1/' "$programs/blixard-node" >"$programs/next/blixard-node"
chmod 755 "$programs/next/blixard-node"
if cmp -s "$programs/blixard-node" "$programs/next/blixard-node"; then
    echo "blixard-node has no mark of its feature level" >&2
    exit 1
fi

if [ "$only" = all ] || [ "$only" = unit ]; then
    say "unit and property tests; small guests on /dev/kvm"
    $cargo test --workspace --no-fail-fast
    say "the control plane in simulation, ${SEEDS:-100} seeds"
    # Testing the workspace has built its examples.
    "$bin/examples/simulate" --seeds "0..${SEEDS:-100}"
    state=$("$bin/blixard-vmm" probe || true)
    case $state in
    "linux guests"* | "small guests"*) sh tests/syscalls.sh ;;
    *) skip "small guests: $state" ;;
    esac
fi

if [ "$only" != unit ]; then
    say "the rig"
    if reason=$(sh tests/prerequisites.sh rig 2>&1) && reason=$("$bin/blixard-rig" doctor 2>&1); then
        images=$PWD/target/guest-images
        "$bin/blixard-rig" guest-images "$images"
        if [ "$only" != hosts ]; then
            say "whole system, in the rig"
            test_program whole_system
            sh tests/in-rig.sh "$bin/blixard-rig" --timeout 1500 --share "$programs:/opt/blixard" --share "$images:/opt/images" -- \
                "BLIXARD_WHOLE_SYSTEM=1 /opt/blixard/whole_system --test-threads=1 $filter"
        fi
        if [ "$only" != hosts ] && [ -z "$filter" ]; then
            say "a stock kernel under load, in the rig"
            sh tests/kernels.sh cloud
            say "systemd units, in the rig"
            sh tests/in-rig.sh "$bin/blixard-rig" --timeout 300 --share "$programs:/opt/blixard" --share "$images:/opt/images" \
                --share "$PWD/nix/systemd:/opt/units" --share "$PWD/tests:/opt/tests" -- \
                sh /opt/tests/systemd.sh /opt/blixard /opt/images /opt/units
        fi
        if [ "$only" = hosts ] || [ -z "$filter" ]; then
            say "three hosts, in the rig"
            test_program three_hosts
            sh tests/in-rig.sh "$bin/blixard-rig" --hosts 3 --timeout 1200 --share "$programs:/opt/blixard" \
                --share "$images:/opt/images" --share "$PWD/nix/systemd:/opt/units" -- \
                "BLIXARD_THREE_HOSTS=1 /opt/blixard/three_hosts $filter"
        fi
    else
        skip "whole system, three hosts (rig): $(printf '%s' "$reason" | tr '\n' ' ')"
    fi
fi

if [ -n "$skipped" ]; then printf '%s\n' "$skipped"; fi
