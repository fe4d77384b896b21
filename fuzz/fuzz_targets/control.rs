//! What a client can send to the control socket of a VM.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("control", data));
