//! Files that somebody else made: kernels, and configurations.

use std::io::Write;

use blixard_vmm_api::VmConfig;

use super::Input;
use crate::memory::memfd;

const CONFIG: &str = r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","vcpus":1,"memory_mib":32,"kvm":"kvm","kernel":"kernel",
    "cmdline":"console=ttyS0","descriptors":{"kvm":3,"kernel":4}}"#;
/// A configuration with as many different parts as there are.
const LARGE_CONFIG: &str = r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","vcpus":2,"memory_mib":64,"kvm":"kvm","kernel":"kernel",
    "initramfs":"initrd","cmdline":"console=ttyS0","memory":{"huge_pages":false,"transparent_huge_pages":true,"merge":false},
    "disks":[{"id":"root","backing":"disk","read_only":true,"limit":{"bytes":{"size":1,"burst":2,"refill_ms":3}}}],
    "pmem":[{"id":"p","backing":"disk2","read_only":true}],
    "nics":[{"id":"n","tap":"tap","more_taps":[],"vhost":[],"mac":"52:54:00:00:00:01","mtu":1500}],
    "vsock":{"cid":3,"listener":"vsock","hook":"hook"},"rng":true,"rng_limit":{"operations":{"size":1,"refill_ms":1}},
    "balloon":{"target_mib":1,"deflate_on_oom":true,"statistics_s":1,"free_page_reporting":true,"free_page_hinting":true},
    "console":{"listener":"console","log":"log","log_bytes_max":100},"control":"control","boot_timer":true,
    "descriptors":{"kvm":3,"kernel":4,"initrd":5,"disk":6,"disk2":7,"tap":8,"vsock":9,"hook":10,"console":11,"log":12,"control":13}}"#;
/// Most bytes of a made kernel that are changed.
const CHANGES_MAX: usize = 64;

/// An ELF kernel of 8 KiB with two segments and a PVH note.
fn elf() -> Vec<u8> {
    let mut file = vec![0; 8192];
    let mut put = |at: usize, value: u64, length: usize| {
        file[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
    };
    // Magic, class, byte order, version; kind, machine, version; entry; program headers at 64, three of 56 bytes.
    put(0, 0x0001_0102_464C_457F, 8);
    put(16, 2 | 62 << 16 | 1 << 32, 8);
    put(24, 0x10_0000, 8);
    put(32, 64, 8);
    put(52, 64 | 56 << 16 | 3 << 32, 8);
    // Kind, offset, physical address, bytes in the file, bytes in memory.
    for (at, kind, offset, address, size) in
        [(64, 1, 4096, 0x10_0000, 4096), (120, 1, 4096, 0x20_0000, 100), (176, 4, 512, 0, 24)]
    {
        put(at, kind, 4);
        for (field, value) in [(8, offset), (24, address), (32, size), (40, size)] {
            put(at + field, value, 8);
        }
    }
    for (at, value) in [(512, 4 | 8 << 32), (520, 18 | 0x006E_6558 << 32), (528, 0x10_0000)] {
        put(at, value, 8);
    }
    file
}

/// A bzImage of 8 KiB.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 8192];
    let mut put = |at: usize, value: u64, length: usize| {
        file[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
    };
    for (at, value, length) in [
        (0x1F1, 1, 1),
        (0x1F4, 256, 4),
        (0x1FE, 0xAA55, 2),
        (0x200, 0x66EB, 2),
        (0x202, 0x5372_6448, 4),
        (0x206, 0x020C, 2),
        (0x22C, 0x7FFF_FFFF, 4),
        (0x236, 1, 2),
        (0x258, 0x10_0000, 8),
        (0x260, 0x20_0000, 4),
    ] {
        put(at, value, length);
    }
    file
}

/// `base` with bytes changed as the input says.
fn changed(mut base: Vec<u8>, input: &mut Input<'_>) -> Vec<u8> {
    for _ in 0..CHANGES_MAX {
        if input.is_empty() {
            break;
        }
        let place = usize::from(input.short()) % base.len();
        // Most fields are of several bytes.
        let count = 1usize << (input.byte() & 3);
        for (to, from) in base.iter_mut().skip(place).zip(input.bytes(count)) {
            *to = *from;
        }
    }
    base
}

/// A kernel: loaded into guest memory with its initramfs or refused, before a guest runs.
pub(super) fn kernel_load(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let content = match mode & 3 {
        0 => data.to_vec(),
        1 => changed(bzimage(), &mut input),
        _ => changed(elf(), &mut input),
    };
    let mut kernel = memfd(c"kernel", 0).unwrap();
    kernel.write_all(&content).unwrap();
    let initramfs = memfd(c"initramfs", 0).unwrap();
    initramfs.set_len(u64::from(mode) << 17).unwrap();
    let config: VmConfig = serde_json::from_str(CONFIG).unwrap();
    let memory = crate::memory::create(32).unwrap();
    let loaded = crate::boot::load(&memory, &config, &kernel, (mode & 4 != 0).then_some(&initramfs));
    if content == elf() || content == bzimage() {
        assert!(loaded.is_ok() || mode & 4 != 0, "a kernel that nobody changed is loaded");
    }
}

/// A configuration: refused, or the same when it is written down and read again.
pub(super) fn config(data: &[u8]) {
    let mut input = Input::new(data);
    let text = match input.byte() & 1 {
        0 => data.get(1..).unwrap_or_default().to_vec(),
        _ => changed(LARGE_CONFIG.into(), &mut input),
    };
    let read = serde_json::from_slice::<VmConfig>(&text);
    if text == LARGE_CONFIG.as_bytes() {
        read.as_ref().unwrap().validate().unwrap();
    }
    let Ok(config) = read else { return };
    let first = config.validate().is_ok();
    let again: VmConfig = serde_json::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap();
    assert_eq!(again.validate().is_ok(), first);
}
