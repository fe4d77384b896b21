//! What a guest can put into the queue of a disk.
#![no_main]

use std::os::fd::OwnedFd;

use blixard_vmm::virtio::block::Block;
use blixard_vmm::virtio::block_engine::Engine;
use blixard_vmm::virtio::device::{Device, DeviceRequest};
use blixard_vmm::virtio::guest_driver::{Buffer, Machine};
use blixard_vmm::virtio::hostile::{Input, drive};
use blixard_vmm_api::rate::{Bucket, RateLimit};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 64 << 10;

fn backing(size: u64) -> OwnedFd {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(size).expect("its size");
    file.into()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mode = input.byte();
    let bucket = |bit: u8, size| (mode & bit != 0).then_some(Bucket { size, burst: 4 * size, refill_ms: 1 });
    let limit = RateLimit { bytes: bucket(1, 4096), operations: bucket(2, 4) };
    let engine = if mode & 4 == 0 { Engine::plain } else { Engine::new };
    let device = Block::with_engine("fuzz", backing(SIZE), mode & 8 != 0, &limit, engine).expect("a disk");
    let features = device.features();
    let mut machine = Machine::start(device, if mode & 16 == 0 { features } else { 0 }, mode & 32 == 0);
    drive(&mut machine, &mut input, |machine, input| match input.byte() % 8 {
        0 => drop(machine.device.on_request(DeviceRequest::Resize, &mut machine.events)),
        1 => {
            let size = u64::from(input.byte()) << 9;
            drop(machine.device.on_request(DeviceRequest::Swap(backing(size)), &mut machine.events));
        }
        _ => {
            let at = machine.buffers + 4096 * u64::from(input.byte());
            let kind = [0, 1, 4, 8, 11, 13, 0, 1][usize::from(input.byte()) % 8];
            let header = [u32::to_le_bytes(kind), [0; 4], u32::from(input.byte()).to_le_bytes(), [0; 4]].concat();
            machine.put(at, &header);
            let (data_at, length) = (input.address(), input.length() / 512 * 512);
            let data = if kind == 1 { Buffer::Readable(data_at, length) } else { Buffer::Writable(data_at, length) };
            machine.queues[0].post(&[Buffer::Readable(at, 16), data, Buffer::Writable(at + 16, 1)]);
        }
    });
});
