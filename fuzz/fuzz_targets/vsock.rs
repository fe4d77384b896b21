//! What a guest can put into the queues of the vsock device while clients of the host come and go.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("vsock", data));
