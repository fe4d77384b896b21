#!/bin/sh
# Makes the guest of `blixard-bench io`, of this host's busybox, fio and iperf3 and of the modules of a kernel: a small initramfs
# and a root. What the guest does is what the kernel's command line says: `bench` is block or net, `seconds` the time of each job,
# `host` the address of an iperf3 server.
#   io-guest.sh FOLDER RELEASE-OF-THE-KERNEL
set -eu
folder=$1 release=$2
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$folder" "$tree/root/bin" "$tree/root/dev" "$tree/root/proc" "$tree/root/sys" "$tree/root/usr/bin" "$tree/root/tmp"
mkdir -p "$tree/first/bin" "$tree/first/dev" "$tree/first/proc" "$tree/first/sys" "$tree/first/root" "$tree/first/modules"
for program in fio iperf3; do
    cp "/usr/bin/$program" "$tree/root/usr/bin/"
    for library in $(ldd "/usr/bin/$program" | grep -o '/[^ ]*'); do
        mkdir -p "$tree/root/${library%/*}"
        cp -L "$library" "$tree/root/$library"
    done
done
for root in root first; do
    cp /bin/busybox "$tree/$root/bin/"
    for name in $(busybox --list); do [ "$name" = busybox ] || ln -s busybox "$tree/$root/bin/$name"; done
done

cat >"$tree/root/bench" <<'X'
#!/bin/sh
# What a disk and a card do. Results are lines `RESULT NAME NUMBER`.
block() {
    # terse: bandwidth in KiB/s and operations per second, of reading (7, 8) and of writing (48, 49)
    job() {
        fio --name=job --filename=/dev/vdb --ioengine=libaio --direct=1 --time_based --runtime="$seconds" --ramp_time=1 --randrepeat=1 \
            --minimal "$@" 2>&1 |
            awk -F';' -v name="$name" '{ print "RESULT " name, (NF > 100 ? $8 + $49 : "failed: " $0) }'
    }
    for depth in 1 32; do
        for way in read write; do
            name=$way-4k-$depth job --rw="rand$way" --bs=4k --iodepth="$depth"
        done
    done
    for way in read write; do name=$way-128k job --rw="$way" --bs=128k --iodepth=8; done
}
net() {
    ip link set lo up
    ip address add "${host%.*}.2/24" dev eth0
    ip link set eth0 up
    for size in 128K 64; do
        for way in "" -R; do
            iperf3 -c "$host" -t "$seconds" -O 1 -l $size $way -f k |
                awk -v name="tcp$way-$size" '/receiver/ { print "RESULT " name, $7 / 1000 }'
        done
    done
    # busybox: round-trip min/avg/max = 0.1/0.2/0.3 ms
    ping -A -q -c $((seconds * 200)) -w "$seconds" "$host" | awk -F'[ /]' '/min.avg.max/ { print "RESULT ping", $8 * 1000 }'
}
$bench
X
cat >"$tree/first/init" <<'X'
#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do insmod "$module"; done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t erofs -o ro /dev/vda /root
for name in dev proc sys; do mount --bind /$name /root/$name; done
mount -t tmpfs tmp /root/tmp
# fio aligns its buffers as the processor's cache says, and ends where an emulated processor says nonsense.
cache=/root/sys/devices/system/cpu/cpu0/cache
[ ! -d $cache ] || mount -t tmpfs none $cache
chroot /root /bin/sh /bench
echo "RESULT done 1"
reboot -f
X
chmod +x "$tree/first/init"
number=100 # three digits: the order of names is the order of loading
for module in $(modprobe -aS "$release" --show-depends virtio_pci virtio_mmio virtio_blk virtio_net erofs crc32c_intel |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }'); do
    cp "$module" "$tree/first/modules/$number-${module##*/}"
    number=$((number + 1))
done
(cd "$tree/first" && find . | busybox cpio -o -H newc 2>/dev/null) >"$folder/io-initramfs"
mkfs.erofs --quiet "$folder/io-root.new" "$tree/root"
mv "$folder/io-root.new" "$folder/io-root"
