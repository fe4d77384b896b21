//! What a user can upload as a kernel: any bundle is read or refused, within bounds.
#![no_main]

use std::io::Cursor;

use blixard_images::kernel::{KernelLimits, read_kernel_bundle};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let limits = KernelLimits { bytes: 4 << 20, module_bytes: 1 << 20 };
    let _ = read_kernel_bundle(&mut Cursor::new(data), &std::env::temp_dir(), &limits);
});
