#!/bin/sh
# `blixard-rig run ...`, once more when the emulated host hung (exit code 123, tests/rig/README.md): a host that hangs shows
# nothing about what ran in it.
#   in-rig.sh RIG OPTION... -- COMMAND
set -eu
rig=$1
shift
code=0
"$rig" run "$@" || code=$?
if [ "$code" = 123 ]; then
    echo "the emulated host hung: once more" >&2
    code=0
    "$rig" run "$@" || code=$?
fi
exit "$code"
