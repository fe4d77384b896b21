#!/bin/sh
# Runs each fuzz target for a number of seconds; stops at the first finding.   all.sh SECONDS [TARGET]...
set -eu
cd "$(dirname "$0")"
seconds=$1
shift
command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz"; exit 3; }
# The sanitizer's run time needs the dynamic C library.
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
for target in ${*:-$(cargo +nightly fuzz list)}; do
    echo "== $target, $seconds s"
    seeds=""
    [ -d "regressions/$target" ] && seeds="regressions/$target"
    mkdir -p "corpus/$target"
    cargo +nightly fuzz run --target "$host" "$target" "corpus/$target" $seeds -- -max_total_time="$seconds" -rss_limit_mb=2048
done
