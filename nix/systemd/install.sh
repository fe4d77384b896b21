#!/bin/sh
# Installs Blixard on this host and starts it; running it again with newer programs upgrades. VMs run on meanwhile.
#   install.sh FOLDER-OF-PROGRAMS
set -eu
units=$(cd "$(dirname "$0")" && pwd)
programs=$(cd "$1" && pwd)
[ "$(id -u)" = 0 ] || { echo "install.sh needs root: sudo $0 $*" >&2; exit 1; }

mkdir -p /usr/lib/blixard /etc/blixard
for program in blixard-node blixard-agent blixard-netd blixard-vmm blixard-init; do
    # A new file in the old one's place: a program that runs cannot be written to.
    install -m 755 "$programs/$program" "/usr/lib/blixard/$program.new"
    mv "/usr/lib/blixard/$program.new" "/usr/lib/blixard/$program"
done
install -m 755 "$programs/blixard" /usr/bin/blixard
install -m 644 -D "$units/blixard.sysusers" /usr/lib/sysusers.d/blixard.conf
install -m 644 -D "$units/blixard.tmpfiles" /usr/lib/tmpfiles.d/blixard.conf
install -m 644 -D "$units/blixard.sysctl" /usr/lib/sysctl.d/60-blixard.conf
changed=
for unit in "$units"/*.service "$units"/*.socket; do
    there=/etc/systemd/system/${unit##*/}
    cmp -s "$unit" "$there" || { install -m 644 "$unit" "$there"; changed=yes; }
done
systemd-sysusers blixard.conf
systemd-tmpfiles --create blixard.conf
sysctl -q -p /usr/lib/sysctl.d/60-blixard.conf
[ -e /etc/blixard/agent.toml ] || printf 'node_uid = %s\nnetd = "/run/blixard/netd.sock"\n' "$(id -u blixard)" >/etc/blixard/agent.toml
# This also makes systemd read the units anew, which takes seconds on a slow host.
enabled="blixard-netd.socket blixard-guard.service blixard-agent.service blixard-node.service"
if [ -n "$changed" ] || ! systemctl -q is-enabled $enabled; then systemctl -q enable $enabled; fi
# Those that were started too often, because what was installed before does not run.
systemctl reset-failed 'blixard-*' 2>/dev/null || true
# One after the other. The guard and the agent stand in for each other, and the node, which is away no longer than it takes itself to
# stop and start, is back before its host's lease ends.
systemctl restart blixard-netd.socket blixard-guard.service
systemctl restart blixard-netd.service blixard-agent.service
systemctl restart blixard-node.service
echo "blixard is installed; members of the group blixard may use it: blixard doctor"
