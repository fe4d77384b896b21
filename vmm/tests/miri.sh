#!/bin/sh
# Runs those unit tests of the VMM under Miri that need nothing it does not have: no KVM, io_uring, sockets, timers, or files mapped
# into memory. That leaves pages and marks of memory, codecs and sections of snapshots, queues, limits, CPUID, PCI registers,
# configurations.   miri.sh [FILTER]...
set -eu
cd "$(dirname "$0")/../.."
cargo +nightly miri --version >/dev/null 2>&1 || {
    echo "skipped: Miri is not installed: rustup component add miri rust-src --toolchain nightly"
    exit 0
}
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
# Miri is some thousand times slower than a processor: few cases of each property. The kernel's structures with an array at their
# end, as the bindings have them, are not sound by the stricter of the two models of borrowing; nothing of ours needs the laxer one.
export PROPTEST_CASES="${PROPTEST_CASES:-2}"
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows ${MIRIFLAGS:-}"
miri() { cargo +nightly miri test --quiet --target "$host" --target-dir target/miri "$@"; }
# Timers; two threads for seconds; 4 GiB of memory; tens of thousands of extents.
skip="--skip timer --skip restored_as_spent --skip two_threads --skip 4_gib --skip too_many_extents --skip no_chain_is_lost"
miri -p blixard-vmm --lib -- $skip ${*:-memory::pages memory::dirty snapshot::codec snapshot::plain snapshot::sections snapshot::file \
    arch::x86_64::cpuid arch::x86_64::vcpu_state arch::x86_64::capabilities arch::x86_64::registers arch::x86_64::aml \
    virtio::queue_test virtio::rate pci:: mailbox layout devices::ioapic devices::power elf::}
miri -p blixard-vmm-api
