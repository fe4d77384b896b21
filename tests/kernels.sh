#!/bin/sh
# Stock kernels with all devices, under load, through snapshot, restore and fork, in the rig (tests/tests/stock_kernels).
#   kernels.sh KERNEL...     of: cloud generic backports
set -eu
cd "$(dirname "$0")/.."
cargo=${CARGO:-cargo}
target=x86_64-unknown-linux-musl
programs=$PWD/target/programs images=$PWD/target/guest-images backports=$PWD/target/backports

sh tests/prerequisites.sh rig
$cargo build -p blixard-vmm -p blixard-rig --bins
$cargo build --release -p blixard-init
program=$($cargo test -p blixard-tests --test stock_kernels --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*stock_kernels[^"]*\)".*/\1/p' | tail -n 1)
mkdir -p "$programs" "$backports"
cp -f "target/$target/debug/blixard-vmm" "target/$target/release/blixard-init" "$programs/"
cp -f "$program" "$programs/stock_kernels"
case " $* " in *" backports "*) sh tests/backports.sh "$backports" ;; esac
rig=target/$target/debug/blixard-rig
"$rig" guest-images "$images"
sh tests/in-rig.sh "$rig" --timeout "$((400 * $#))" --share "$programs:/opt/blixard" --share "$images:/opt/images" --share "$backports:/opt/backports" -- \
    "BLIXARD_STOCK_KERNELS='$*' /opt/blixard/stock_kernels --test-threads=1 --nocapture"
