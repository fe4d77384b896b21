#!/bin/sh
# In a host that may be spoilt (the rig): installs Blixard as systemd services and restarts, kills and stops each while a VM
# runs; the VM's own clock must go on.
#   systemd.sh FOLDER-OF-PROGRAMS FOLDER-OF-IMAGES FOLDER-OF-UNITS
set -eu
fail() {
    printf 'failed: %s\n' "$*" >&2
    journalctl -q --no-pager -n 60 -u 'blixard*' >&2
    exit 1
}
# What does not end is a failure with a name, long before the time limit of the host.
limit="timeout 60"
uptime() { $limit blixard exec steady cut -d. -f1 /proc/uptime; }
sh "$3/install.sh" "$1"
release=$(ls /lib/modules | grep cloud | head -n 1)
until blixard ps >/dev/null 2>&1; do
    [ "$(systemctl show -p NRestarts --value blixard-node.service)" -lt 5 ] || fail "the node does not start"
    sleep 0.2
done
blixard kernel import --name default --kernel "/boot/vmlinuz-$release" --modules "/lib/modules/$release"
blixard image import "$2/busybox.tar" --name busybox
$limit blixard run -d --wait ready --timeout 50s --name steady busybox sleep 100000 || fail "no VM"
before=$(uptime) || fail "exec: $?"
for service in netd agent guard node; do
    $limit systemctl restart "blixard-$service.service" || fail "restart of $service: $?"
    systemctl kill -s KILL "blixard-$service.service"
    for _ in $(seq 150); do
        systemctl is-active -q "blixard-$service.service" && now=$(uptime 2>/tmp/why) && break
        [ $? != 124 ] || fail "exec after the death of $service does not end"
        sleep 0.2
    done
    [ "${now:-0}" -ge "$before" ] ||
        fail "after restart and death of $service: uptime ${now:-unknown} after $before: $(cat /tmp/why)"
    before=$now
done
$limit blixard rm -f steady || fail "rm"
$limit systemctl stop blixard-node.service blixard-agent.service blixard-guard.service blixard-netd.service blixard-netd.socket
echo "systemd: a VM outlived restart and death of netd, agent, guard and node"
