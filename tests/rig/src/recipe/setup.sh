# Turns a fresh Debian root into the emulated host. Runs once, inside the new root (chroot), at build time.
set -eu

# --- identity: placeholders, every run gives each host its own -------------------------------------------
echo rig >/etc/hostname
: >/etc/machine-id
{
    echo '127.0.0.1 localhost'
    for i in 0 1 2; do echo "10.77.0.$((i + 1)) rig$i"; done
} >/etc/hosts
# QEMU's user-mode network: .2 is the way out, .3 answers DNS, .15 is us.
echo 'nameserver 10.0.2.3' >/etc/resolv.conf
echo '/dev/vda / ext4 noatime,noinit_itable 0 1' >/etc/fstab

# /etc/rig/segment (MAC and address on the private segment) is written when a run starts; it is a file so that
# a host that reboots in the middle of a run comes back with the same addresses.
mkdir -p /etc/rig
cat >/usr/local/sbin/rig-network <<'X'
#!/bin/sh -e
case $1 in
control) ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2 ;;
segment) [ -s /etc/rig/segment ] || exit 0
    read -r mac address </etc/rig/segment
    ip link set eth1 address "$mac"; ip addr add "$address" dev eth1; ip link set eth1 up ;;
esac
X
chmod +x /usr/local/sbin/rig-network
cat >/etc/systemd/system/rig-network.service <<X
[Unit]
Description=Networks of the emulated host
DefaultDependencies=no
After=systemd-remount-fs.service
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/rig-network control
ExecStart=/usr/local/sbin/rig-network segment
[Install]
WantedBy=sysinit.target
X

# --- ssh: the control channel from outside, and passwordless between the hosts ----------------------------
mkdir -p /etc/systemd/journald.conf.d /etc/ssh/sshd_config.d /root/.ssh
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/rig.conf
# PAM and DNS only cost time here; AcceptEnv lets tests pass variables through ssh.
cat >/etc/ssh/sshd_config.d/rig.conf <<X
UsePAM no
UseDNS no
PermitRootLogin yes
MaxSessions 500
MaxStartups 500
AcceptEnv *
X
rm -f /etc/ssh/ssh_host_rsa* /etc/ssh/ssh_host_ecdsa* # one host key: fewer exchanges under emulation
cat >/root/.ssh/config <<X
Host rig* 10.77.0.*
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    KexAlgorithms curve25519-sha256
    ControlMaster auto
    ControlPath /run/ssh-%n
    ControlPersist 600
    ServerAliveInterval 5
    ServerAliveCountMax 12
X
ssh-keygen -qt ed25519 -N '' -C rig -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
rm -f /root/.bashrc /root/.profile

# --- modules -----------------------------------------------------------------------------------------------
# Left out: self-tests and SIMD code that cost seconds under TCG, and drivers of devices that are not there.
for m in crct10dif_pclmul crc32_pclmul ghash_clmulni_intel sha512_ssse3 sha256_ssse3 sha1_ssse3 aesni_intel \
    ahci iTCO_wdt psmouse pcspkr i2c_i801 lpc_ich evdev serio_raw button powernow_k8 drm; do
    echo "blacklist $m"
done >/etc/modprobe.d/rig.conf
printf '%s\n' vhost_net vhost_vsock tun 9pnet_virtio 9p dm_thin_pool loop >/etc/modules-load.d/rig.conf

# --- services ----------------------------------------------------------------------------------------------
systemctl -q enable rig-network.service ssh.service
systemctl -q mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer \
    systemd-timesyncd.service lvm2-monitor.service e2scrub_reap.service systemd-random-seed.service \
    serial-getty@ttyS0.service

# --- what QEMU boots: kernel and an initramfs of a static busybox and the few modules the root disk needs ---
host=$(ls /lib/modules | grep -v cloud)
cloud=$(ls /lib/modules | grep cloud)
depmod "$host"
depmod "$cloud"
tree=$(mktemp -d)
mkdir -p "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/new" "$tree/modules"
cp /bin/busybox "$tree/bin/busybox"
ln -s busybox "$tree/bin/sh"
n=100 # three digits: the name order is the load order
for m in $(modprobe -aS "$host" --show-depends virtio_pci virtio_blk virtio_net ext4 crc32c_generic |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }'); do
    cp "$m" "$tree/modules/$n-${m##*/}"
    n=$((n + 1))
done
cat >"$tree/init" <<'X'
#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for m in /modules/*; do insmod "$m"; done
mount -o noatime,noinit_itable /dev/vda /new
umount /proc /sys
exec switch_root /new /sbin/init
X
chmod +x "$tree/init"
mkdir -p /boot/rig
(cd "$tree" && find . | busybox cpio -o -H newc >/boot/rig/initramfs 2>/dev/null)
rm -r "$tree"
ln -s "../vmlinuz-$host" /boot/rig/kernel
rm -f /boot/initrd* /initrd* /vmlinuz*

# Guest images are made outside from this list.
busybox --list >/boot/rig/applets
