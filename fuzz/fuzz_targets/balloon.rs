//! What a guest can put into the queues and the configuration space of a balloon.
#![no_main]

use blixard_vmm::virtio::balloon::Balloon;
use blixard_vmm::virtio::device::{Device, DeviceRequest};
use blixard_vmm::virtio::guest_driver::Machine;
use blixard_vmm::virtio::hostile::{Input, drive};
use blixard_vmm_api::config::BalloonConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mode = input.byte();
    let config = BalloonConfig {
        target_mib: 1,
        deflate_on_oom: mode & 1 != 0,
        statistics_s: u16::from(mode & 2 != 0),
        free_page_reporting: mode & 4 != 0,
        free_page_hinting: mode & 8 != 0,
    };
    let memory = blixard_vmm::memory::create(16).expect("memory");
    let device = Balloon::new(&config, &memory).expect("a balloon");
    let features = device.features();
    let mut machine = Machine::with_memory(device, memory, features, mode & 16 == 0);
    drive(&mut machine, &mut input, |machine, input| {
        let request = match input.byte() % 4 {
            0 => DeviceRequest::Inflate(input.byte().into()),
            1 => DeviceRequest::StopHinting,
            2 => DeviceRequest::StartHinting,
            _ => {
                let round = machine.device.config().field(8).to_le_bytes();
                return machine.put(machine.buffers, &round);
            }
        };
        drop(machine.device.on_request(request, &mut machine.events));
    });
});
