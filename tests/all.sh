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

$cargo build --workspace --bins

if [ "$only" != rig ]; then
    say "unit and property tests; small guests on /dev/kvm"
    $cargo test --workspace
    state=$("$bin/blixard-vmm" probe || true)
    case $state in
    "linux guests"* | "small guests"*) ;;
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
        "$bin/blixard-rig" run --timeout 1500 --share "$bin:/opt/blixard" --share "$images:/opt/images" \
            --share "$(dirname "$program"):/opt/tests" -- \
            "BLIXARD_WHOLE_SYSTEM=1 /opt/tests/$(basename "$program") --test-threads=1 $filter"
    else
        skip "whole system (rig): $(printf '%s' "$reason" | tr '\n' ' ')"
    fi
fi

if [ -n "$skipped" ]; then printf '%s\n' "$skipped"; fi
