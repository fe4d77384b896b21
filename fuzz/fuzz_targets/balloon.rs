//! What a guest can put into the queues and the configuration space of a balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("balloon", data));
