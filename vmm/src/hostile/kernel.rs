//! Files that somebody else made: kernels, and configurations.

use std::io::Write;

use blixard_vmm_api::VmConfig;

use crate::memory::memfd;

const CONFIG: &str = r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","vcpus":1,"memory_mib":32,"kvm":"kvm","kernel":"kernel",
    "cmdline":"console=ttyS0","descriptors":{"kvm":3,"kernel":4}}"#;

/// A kernel, with an initramfs when the first byte is odd: loaded into guest memory or refused, before a guest runs.
pub(super) fn kernel_load(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    let mut kernel = memfd(c"kernel", 0).unwrap();
    kernel.write_all(data).unwrap();
    let mut initramfs = memfd(c"initramfs", 0).unwrap();
    initramfs.set_len(u64::from(*mode) << 17).unwrap();
    initramfs.write_all(data).unwrap();
    let config: VmConfig = serde_json::from_str(CONFIG).unwrap();
    let memory = crate::memory::create(32).unwrap();
    let _ = crate::boot::load(&memory, &config, &kernel, (mode & 1 == 1).then_some(&initramfs));
}

/// A configuration: refused, or the same when it is written down and read again.
pub(super) fn config(data: &[u8]) {
    let Ok(config) = serde_json::from_slice::<VmConfig>(data) else { return };
    let first = config.validate().is_ok();
    let again: VmConfig = serde_json::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap();
    assert_eq!(again.validate().is_ok(), first);
}
