#!/bin/sh
# What a new user types, shown with its output. Runs beside a node that is ready (BLIXARD_HOST is set). Ends in an error
# when anything is not as promised.
set -eu
show() { printf '\n$ %s\n' "$*"; "$@"; }
fail() { printf 'demo failed: %s\n' "$*" >&2; exit 1; }

page=$(mktemp -d)
echo "hello from $(hostname)" >"$page/index.html"
busybox httpd -f -p 8099 -h "$page" &
server=$!
trap 'kill $server 2>/dev/null; rm -rf "$page"' EXIT

# The guest's kernel: the cloud kernel when this host has one (its modules are all a guest needs), else the host's own.
release=$(ls /lib/modules | grep cloud | head -n 1 || true)
if [ -n "$release" ]; then
    show blixard kernel import --kernel "/boot/vmlinuz-$release" --modules "/lib/modules/$release" --name default
fi
show blixard image import "$IMAGES/busybox.tar" --name busybox
show blixard run -d --wait ready --name hello busybox sh -c 'uname -sr; exec sleep 1000'
show blixard ps
show blixard logs hello
show blixard exec hello uname -r
show blixard exec hello sh -c 'wget -q -O - "http://$(ip route | sed -n "s/^default via \([^ ]*\).*/\1/p"):8099/"'
show blixard rm -f --wait hello

# Without trace: no process, no interface, no rule, no cgroup, no file.
[ -z "$(blixard ps -a -q)" ] || fail "blixard ps still shows a VM"
! pgrep -x blixard-vmm >/dev/null || fail "a VMM still runs"
! ip -o link | grep -q 'bxv' || fail "a TAP is left"
! nft list ruleset | grep -q 'bxv[^*]' || fail "a packet filter rule is left"
[ -z "$(find /sys/fs/cgroup -type d -regextype posix-extended -regex '.*/(vm-)?[0-9A-Z]{26}.*')" ] || fail "a cgroup is left"
[ -z "$(find "$BLIXARD_STATE" -regextype posix-extended -regex '.*/(vm-)?[0-9A-Z]{26}.*')" ] || fail "a file is left"
[ -z "$(awk '/^Uid:/ && $2 >= 700000 && $2 < 710000' /proc/[0-9]*/status 2>/dev/null)" ] || fail "a process with the uid of a VM is left"
printf '\nremoved without trace: no process, uid in use, TAP, rule, cgroup or file is left\n'
