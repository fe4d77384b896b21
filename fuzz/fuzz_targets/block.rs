//! What a guest can put into the queue of a disk.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("block", data));
