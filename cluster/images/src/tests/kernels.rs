//! Kernel bundles from a host's files to a guest's modules.

use std::io::Write;
use std::path::Path;

use super::{Tar, whole};
use crate::kernel::*;
use crate::kernel::{elf, image};

const RELEASE: &str = "6.1.0-9-test";

fn module(depends: &str) -> Vec<u8> {
    let (depends, magic) = (format!("depends={depends}"), format!("vermagic={RELEASE} SMP"));
    elf::test_module(&["license=GPL", &depends, &magic])
}

/// A modules directory with what guests need, some of it compressed and some of it built in.
fn host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    let write = |path: &str, contents: &[u8]| {
        let path = host.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    };
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd =
        |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    write("vmlinuz", &image::test_kernel(RELEASE));
    write("m/modules.builtin", b"kernel/fs/ext4/ext4.ko\nkernel/net/ipv6/ipv6.ko\nkernel/x/virtio-ring.ko\n");
    write("m/kernel/drivers/virtio_pci.ko.gz", &gzip(&module("virtio_ring,virtio")));
    write("m/kernel/drivers/virtio.ko", &module("virtio-ring"));
    write("m/kernel/net/vmw_vsock_virtio_transport.ko", &module("vsock"));
    write("m/kernel/net/vsock.ko.zst", &zstd(&module("")));
    write("m/kernel/drivers/virtio_blk.ko", &module("virtio"));
    write("m/kernel/drivers/virtio-rng.ko", &module("virtio"));
    write("m/kernel/fs/erofs.ko", &module(""));
    write("m/kernel/fs/overlay.ko", &module(""));
    write("m/kernel/drivers/virtio_net.ko", &module("net_failover"));
    write("m/kernel/net/net_failover.ko", &module(""));
    write("m/kernel/sound/other.ko", b"not even a module");
    host
}

fn collect(host: &Path) -> Result<Vec<BundleFile>, CollectError> {
    collect_kernel(&host.join("vmlinuz"), &host.join("m"))
}

fn read(bytes: &[u8]) -> Result<KernelBundle, BundleError> {
    let spool = tempfile::tempdir().unwrap();
    read_kernel_bundle(&mut &*bytes, spool.path(), &KernelLimits::default())
}

fn bundle(files: &[BundleFile]) -> Vec<u8> {
    let mut out = vec![];
    write_kernel_bundle(files, &mut out).unwrap();
    out
}

#[test]
fn a_collected_kernel_arrives_with_its_modules_in_load_order() {
    let host = host();
    let mut read = read(&bundle(&collect(host.path()).unwrap())).unwrap();
    assert_eq!(read.release, RELEASE);
    assert_eq!(whole(&mut read.kernel), image::test_kernel(RELEASE));
    let names: Vec<&str> = read.modules.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "virtio.ko",
            "virtio_pci.ko",
            "vsock.ko",
            "vmw_vsock_virtio_transport.ko",
            "virtio_blk.ko",
            "erofs.ko",
            "overlay.ko",
            "net_failover.ko",
            "virtio_net.ko",
            "virtio_rng.ko",
        ]
    );
    assert_eq!(read.modules[1].1, module("virtio_ring,virtio"), "uncompressed");
    let mut out = vec![];
    crate::build_initramfs(b"init", &read.modules, &mut out).unwrap();
}

#[test]
fn a_module_that_guests_need_and_is_not_there_is_named_with_its_purpose() {
    let host = host();
    std::fs::remove_file(host.path().join("m/kernel/fs/erofs.ko")).unwrap();
    let text = collect(host.path()).unwrap_err().to_string();
    assert!(text.contains("erofs") && text.contains("images"), "{text}");
    let host = super::kernels::host();
    std::fs::remove_file(host.path().join("m/kernel/net/net_failover.ko")).unwrap();
    let text = collect(host.path()).unwrap_err().to_string();
    assert!(text.contains("net_failover") && text.contains("virtio_net"), "{text}");
}

#[test]
fn a_kernel_that_is_none_is_refused_where_it_is_collected_and_where_it_arrives() {
    let host = host();
    let mut files = collect(host.path()).unwrap();
    std::fs::write(host.path().join("vmlinuz"), b"#!/bin/sh").unwrap();
    assert!(matches!(collect(host.path()), Err(CollectError::Kernel { .. })));
    files[0].contents = b"#!/bin/sh".to_vec();
    assert!(matches!(read(&bundle(&files)), Err(BundleError::Kernel(NotAKernel::Unknown))));
}

#[test]
fn modules_of_another_kernel_are_refused_by_name() {
    let host = host();
    let mut files = collect(host.path()).unwrap();
    let file = files.iter_mut().find(|file| file.path.ends_with("erofs.ko")).unwrap();
    file.contents = elf::test_module(&["vermagic=5.10.0 SMP"]);
    assert!(matches!(read(&bundle(&files)), Err(BundleError::Module { name, .. }) if name == "erofs.ko"));
    files[1].contents = b"5.10.0\n".to_vec();
    assert!(matches!(read(&bundle(&files)), Err(BundleError::Release { .. })));
}

#[test]
fn what_does_not_belong_into_a_bundle_is_refused() {
    for path in ["etc/passwd", "modules/nonumber.ko", "modules/1-../x.ko", "modules/1-x.so", "../kernel"] {
        let archive = Tar::new().file(path, b"x").finish();
        assert!(matches!(read(&archive), Err(BundleError::Unknown(_))), "{path}");
    }
    let archive = Tar::new().symlink("kernel", "/etc/shadow").finish();
    assert!(matches!(read(&archive), Err(BundleError::Unknown(_))));
    assert!(matches!(read(&Tar::new().finish()), Err(BundleError::Missing("kernel"))));
    assert!(matches!(read(b"nothing"), Err(BundleError::Tar(_))));
}

#[test]
fn a_module_that_grows_without_end_is_stopped() {
    let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::best());
    gzip.write_all(&vec![0; 8 << 20]).unwrap();
    let mut files = collect(host().path()).unwrap();
    files.truncate(2);
    files.push(BundleFile { path: "modules/000-bomb.ko.gz".into(), contents: gzip.finish().unwrap() });
    let spool = tempfile::tempdir().unwrap();
    let limits = KernelLimits { module_bytes: 1 << 20, ..KernelLimits::default() };
    let result = read_kernel_bundle(&mut bundle(&files).as_slice(), spool.path(), &limits);
    assert!(matches!(result, Err(BundleError::Limit(_))));
}
