#!/bin/sh
# All tests, tier by tier. Each tier that cannot run here is one line with its reason, never silence.
#   all.sh [unit|rig] [FILTER]
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

# Init goes into every guest's memory: the small one.
$cargo build --workspace --bins
$cargo build --release -p blixard-init
programs=$PWD/target/programs
mkdir -p "$programs"
for program in blixard blixard-agent blixard-netd blixard-node blixard-vmm; do cp -f "$bin/$program" "$programs/"; done
cp -f "target/$target/release/blixard-init" "$programs/"

if [ "$only" != rig ]; then
    say "unit and property tests; small guests on /dev/kvm"
    $cargo test --workspace --no-fail-fast
    state=$("$bin/blixard-vmm" probe || true)
    case $state in
    "linux guests"* | "small guests"*) sh tests/syscalls.sh ;;
    *) skip "small guests: $state" ;;
    esac
fi

if [ "$only" != unit ]; then
    say "whole system, in the rig"
    if reason=$(sh tests/prerequisites.sh rig 2>&1) && reason=$("$bin/blixard-rig" doctor 2>&1); then
        images=$PWD/target/guest-images
        "$bin/blixard-rig" guest-images "$images"
        # The test program is one static file like all others: the rig runs it as it is.
        program=$($cargo test -p blixard-tests --test whole_system --no-run --message-format=json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*whole_system[^"]*\)".*/\1/p' | tail -n 1)
        cp -f "$program" "$programs/whole_system"
        "$bin/blixard-rig" run --timeout 1500 --share "$programs:/opt/blixard" --share "$images:/opt/images" -- \
            "BLIXARD_WHOLE_SYSTEM=1 /opt/blixard/whole_system --test-threads=1 $filter"
        if [ -z "$filter" ]; then
            say "a stock kernel under load, in the rig"
            sh tests/kernels.sh cloud
            say "systemd units, in the rig"
            "$bin/blixard-rig" run --timeout 300 --share "$programs:/opt/blixard" --share "$images:/opt/images" \
                --share "$PWD/nix/systemd:/opt/units" --share "$PWD/tests:/opt/tests" -- \
                sh /opt/tests/systemd.sh /opt/blixard /opt/images /opt/units
        fi
    else
        skip "whole system (rig): $(printf '%s' "$reason" | tr '\n' ' ')"
    fi
fi

if [ -n "$skipped" ]; then printf '%s\n' "$skipped"; fi
