//! The guest: a root with busybox, fio and iperf3, its disks, what runs in it, and how it is found to be whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::host::{HOST, PORTS, content, run, sh};
use crate::kernel::Kernel;
use crate::vm::Vm;

/// MiB of its memory.
pub const MEMORY_MIB: u32 = 384;
/// Bytes of each content whose checksum is known.
const KNOWN: usize = 8 << 20;
/// Copies of the known content: in memory, on the volume, in persistent memory.
const COPIES: &str = "/dev/shm/known /root/known /mnt/pmem/known";
/// What the kernel says when something went wrong.
const TROUBLE: &str =
    "I/O error|BUG:|WARNING:|EXT4-fs error|EXT4-fs warning|Oops|hung_task|virtio.*(fail|error|bad)";

/// What stays in the guest between commands: writes, reads back and compares for as long as it is not told to stop. Each round
/// has other data: what a device or a copy of memory lost is found by its checksum, what it kept too long by its seed.
const LOAD: &str = r#"#!/bin/sh
for disk in /sys/block/vd*; do [ "$(cat $disk/serial)" != disk2 ] || raw=/dev/${disk##*/}; done
round=0
while [ ! -e /dev/shm/stop ]; do
    fio --thread --verify=crc32c --verify_fatal=1 --verify_backlog=64 --verify_state_save=0 --randseed=$((7919 + round)) \
        --name=small --filename=$raw --offset=0 --size=2m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 \
        --name=large --filename=$raw --offset=16m --size=8m --rw=randwrite --bs=128k --ioengine=libaio --iodepth=4 --direct=1 \
        --name=memory --filename=/dev/shm/busy --size=3m --rw=randwrite --bs=4k --ioengine=psync \
        --name=pmem --filename=/mnt/pmem/busy --size=1m --rw=randwrite --bs=4k --ioengine=psync --fsync=16 \
        >/dev/shm/fio.log 2>&1 || { echo failed >/dev/shm/load; exit 1; }
    round=$((round + 1))
    echo $round >/dev/shm/rounds
done
echo good >/dev/shm/load
"#;

/// The content that the guest is given.
pub fn written() -> Vec<u8> {
    content(2, KNOWN)
}

/// Builds the root of the guest: busybox, the host's fio and iperf3 with their libraries, and content that is known. The image
/// has whole 2 MiB, so that it can be persistent memory too.
pub fn root(kernel: &Kernel, folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    let at = tree.display();
    sh(&format!(
        "mkdir -p {at}/drivers; tar -xf /opt/images/busybox.tar -C {at}
        for program in fio iperf3; do
            cp /usr/bin/$program {at}/usr/bin/
            for library in $(ldd /usr/bin/$program | grep -o '/[^ ]*'); do
                mkdir -p {at}/${{library%/*}}; cp -L $library {at}/$library
            done
        done"
    ));
    for (name, bytes) in &kernel.pmem_modules {
        fs::write(tree.join("drivers").join(name), bytes).unwrap();
    }
    fs::write(tree.join("known"), content(1, KNOWN)).unwrap();
    fs::write(tree.join("load"), LOAD).unwrap();
    let image = folder.join("root.erofs");
    run("mkfs.erofs", &["--quiet", image.to_str().unwrap(), tree.to_str().unwrap()]);
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(file.metadata().unwrap().len().next_multiple_of(2 << 20)).unwrap();
    sh(&format!("rm -r {at}"));
    image
}

/// The files that a VM writes: volume, disk without a file system, persistent memory.
pub struct Disks(pub [PathBuf; 3]);

impl Disks {
    fn named(folder: &Path, name: &str) -> Self {
        Self(["volume", "raw", "pmem"].map(|what| folder.join(format!("{name}.{what}"))))
    }

    /// Empty ones.
    pub fn new(folder: &Path, name: &str) -> Self {
        let disks = Self::named(folder, name);
        let [volume, raw, pmem] = disks.0.each_ref().map(|path| path.display());
        sh(&format!(
            "truncate -s 256M {volume}; mkfs.ext4 -q {volume}; truncate -s 64M {raw}
            truncate -s 32M {pmem}; mkfs.ext4 -q -b 4096 {pmem}"
        ));
        disks
    }

    /// Copies of them as they are now. The VM must be at rest.
    pub fn copy(&self, folder: &Path, name: &str) -> Self {
        let copies = Self::named(folder, name);
        for (from, to) in self.0.iter().zip(&copies.0) {
            run("cp", &["--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
        }
        copies
    }
}

/// All devices on the command line, with what init of the guest `name` is told.
pub fn devices(folder: &Path, name: &str, root: &Path, disks: &Disks) -> Vec<String> {
    let config = folder.join(format!("{name}.json"));
    let text = format!(
        r#"{{"hostname": "{name}", "root": {{"image_disk": "disk0", "image_fs": "erofs", "volume_disk": "disk1"}},
        "nics": [{{"mac": "52:54:00:00:00:00", "addresses": [["10.9.0.2", 24]], "gateways": ["{HOST}"], "mtu": 1500}}],
        "workload": {{"args": ["sleep", "1000000"]}}}}"#
    );
    fs::write(&config, text).unwrap();
    let [volume, raw, pmem] = disks.0.each_ref().map(|path| path.to_str().unwrap());
    let root = format!("{},ro", root.display());
    let words = ["--disk", &root, "--disk", volume, "--disk", raw, "--pmem", &root, "--pmem", pmem];
    let rest = ["--tap", "tap0", "--rng", "--balloon", "0,oom,reporting,statistics=1", "--no-stdin"];
    let guest = ["--guest", config.to_str().unwrap()];
    words.iter().chain(&rest).chain(&guest).map(|word| (*word).to_owned()).collect()
}

/// What the kernel says that nobody should have to read, since it was asked last.
fn trouble(vm: &Vm) -> String {
    vm.exec(&format!("dmesg -c | grep -E '{TROUBLE}' || true"))
}

/// Mounts persistent memory, puts the known content everywhere and begins to load all devices.
pub fn set_up(vm: &Vm) {
    // Of the boot it is only shown: kernels complain about emulated processors.
    print!("{}", trouble(vm));
    vm.exec(
        "for driver in /drivers/*; do insmod $driver 2>/dev/null || true; done
        until [ -e /dev/pmem0 ] && [ -e /dev/pmem1 ]; do sleep 0.1; done
        mkdir -p /mnt/root /mnt/pmem
        mount -t erofs -o ro,dax /dev/pmem0 /mnt/root
        mount -t ext4 -o dax /dev/pmem1 /mnt/pmem",
    );
    vm.exec_with("cat >/dev/shm/known", &written());
    vm.exec("cp /dev/shm/known /root/known; cp /dev/shm/known /mnt/pmem/known; sync");
    vm.exec(&format!(
        "setsid sh /load </dev/null >/dev/null 2>&1 &
        setsid iperf3 -c {HOST} -p {} -t 80000 --bidir </dev/null >/dev/shm/iperf.log 2>&1 &",
        PORTS[0]
    ));
}

/// Rounds of the load that are done.
pub fn rounds(vm: &Vm) -> u32 {
    vm.exec("cat /dev/shm/rounds 2>/dev/null || echo 0").trim().parse().unwrap()
}

/// Waits until the load has done one round more than it has now.
pub fn works(vm: &Vm) {
    let until = rounds(vm) + 1;
    vm.exec(&format!(
        "until [ -e /dev/shm/rounds ] && [ $(cat /dev/shm/rounds) -ge {until} ]; do
            if [ -e /dev/shm/load ]; then cat /dev/shm/load /dev/shm/fio.log >&2; exit 1; fi
            sleep 0.2
        done"
    ));
}

/// Ends the load of a guest and looks at all that it can have lost.
pub fn is_whole(vm: &Vm) {
    let load = vm.exec(
        "touch /dev/shm/stop
        until [ -e /dev/shm/load ]; do sleep 0.2; done
        killall -q iperf3 || true
        grep -q good /dev/shm/load || cat /dev/shm/fio.log; cat /dev/shm/load",
    );
    assert_eq!(load.trim(), "good", "what fio wrote is what it reads");
    // Out of the guest's own memory, so that it comes from the devices again.
    let sums = vm
        .exec(&format!("sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum {COPIES} /known /mnt/root/known"));
    let found: Vec<&str> = sums.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let (written, image) = (sha256(&written()), sha256(&content(1, KNOWN)));
    assert_eq!(found, [&written, &written, &written, &image, &image], "{sums}");
    for direction in ["", "-R"] {
        let end = vm.exec(&format!("iperf3 -c {HOST} -p {} -t 1 {direction} | grep receiver", PORTS[1]));
        assert!(!end.contains(" 0.00 bits/sec"), "{end}");
    }
    assert_eq!(vm.exec("dd if=/dev/hwrng bs=64 count=1 iflag=fullblock 2>/dev/null | wc -c").trim(), "64");
    assert_eq!(trouble(vm), "");
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
