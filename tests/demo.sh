#!/bin/sh
# The first five minutes, on this machine when it can run guests (it tries), else in the rig; it says which and why.
#   demo.sh FOLDER-OF-PROGRAMS
set -eu
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
images=$PWD/target/guest-images
sh tests/prerequisites.sh rig
"$bin/blixard-rig" guest-images "$images"

why=""
state=$("$bin/blixard-vmm" probe || true)
case $state in "linux guests"*) ;; *) why="its /dev/kvm: $state" ;; esac
[ "$(id -u)" = 0 ] || why="${why:+$why; }you are not root"
[ -f /sys/fs/cgroup/cgroup.controllers ] || why="${why:+$why; }no cgroup v2 at /sys/fs/cgroup"

if [ -z "$why" ]; then
    echo "demo: on this machine"
    folder=$(mktemp -d /var/tmp/blixard-demo.XXXXXX)
    trap 'rm -rf "$folder"' EXIT
    chmod 755 "$folder"
    PATH=$bin:$PATH IMAGES=$images BLIXARD_STATE=$folder/state "$bin/blixard" dev --no-kernel --state "$folder/state" --run "$folder/run" -- sh tests/demo-inside.sh
else
    echo "demo: in the rig (an emulated bare-metal host), because this machine cannot run Linux guests: $why"
    "$bin/blixard-rig" run --timeout 600 --share "$bin:/opt/blixard" --share "$images:/opt/images" --share "$PWD/tests:/opt/tests" -- \
        'export PATH=/opt/blixard:$PATH IMAGES=/opt/images BLIXARD_STATE=/var/tmp/demo/state
         blixard dev --no-kernel --state /var/tmp/demo/state --run /var/tmp/demo/run -- sh /opt/tests/demo-inside.sh'
fi
