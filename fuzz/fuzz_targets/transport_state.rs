//! The registers of a device in a state file of somebody else.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("transport_state", data));
