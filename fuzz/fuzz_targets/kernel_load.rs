//! What the VMM is given as a kernel: any file is loaded into guest memory or refused, before a guest runs.
#![no_main]

use std::io::Write;

use blixard_vmm_api::VmConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(mut kernel) = tempfile::tempfile() else { return };
    if kernel.write_all(data).is_err() {
        return;
    }
    let text = r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","vcpus":1,"memory_mib":32,"kvm":"kvm","kernel":"kernel",
        "cmdline":"console=ttyS0","descriptors":{"kvm":3,"kernel":4}}"#;
    let config: VmConfig = serde_json::from_str(text).expect("a valid configuration");
    let Ok(memory) = blixard_vmm::memory::create(32) else { return };
    let _ = blixard_vmm::boot::load(&memory, &config, &kernel, None);
});
