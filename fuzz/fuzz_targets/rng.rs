//! What a guest can put into the queue of the entropy device.
#![no_main]

use blixard_vmm::virtio::guest_driver::Machine;
use blixard_vmm::virtio::hostile::{Input, drive};
use blixard_vmm::virtio::rng::Rng;
use blixard_vmm_api::rate::{Bucket, RateLimit};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mode = input.byte();
    let bytes = (mode & 1 != 0).then_some(Bucket { size: 100, burst: 1000, refill_ms: 1 });
    let device = Rng::with_limit(&RateLimit { bytes, operations: None }).expect("a device");
    let mut machine = Machine::start(device, 0, mode & 2 == 0);
    drive(&mut machine, &mut input, |_, _| {});
});
