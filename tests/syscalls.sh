#!/bin/sh
# Compares the VMM's tables of system calls (vmm/src/sandbox/filters.rs) with what the suite of small guests does: each call is
# traced, a row that is never used or a call without a row is an error. Needs strace and a usable /dev/kvm.
set -eu
cd "$(dirname "$0")/.."
command -v strace >/dev/null 2>&1 || { echo "skipped: tables of system calls: strace is not installed"; exit 0; }
[ -w /dev/kvm ] || { echo "skipped: tables of system calls: no usable /dev/kvm"; exit 0; }
BLIXARD_STRACE=$(mktemp -d)
export BLIXARD_STRACE
trap 'rm -rf "$BLIXARD_STRACE" "$BLIXARD_STRACE.lock"' EXIT
# Tracers outlive what they trace and write until then: they inherit the lock.
flock "$BLIXARD_STRACE.lock" cargo test --quiet -p blixard-vmm --test guests
flock "$BLIXARD_STRACE.lock" true
cargo test --quiet -p blixard-vmm --test syscalls -- --ignored
