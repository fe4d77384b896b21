//! What a guest can put into the queues and the configuration space of devices without a peer: disk, entropy, balloon,
//! persistent memory.

use std::fs::File;
use std::os::fd::OwnedFd;

use blixard_vmm_api::config::BalloonConfig;
use blixard_vmm_api::rate::{Bucket, RateLimit};

use super::Input;
use super::driver::drive;
use crate::memory::memfd;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::block_engine::Engine;
use crate::virtio::device::{Device, DeviceRequest};
use crate::virtio::guest_driver::{Buffer, Machine};
use crate::virtio::pmem::{ALIGNMENT, Pmem};
use crate::virtio::rng::Rng;

const DISK: u64 = 64 << 10;

fn file(size: u64) -> OwnedFd {
    let file: File = memfd(c"backing", 0).unwrap();
    file.set_len(size).unwrap();
    file.into()
}

/// Offers a chain; when the queue is full, descriptors are used again.
fn offer<D: Device>(machine: &mut Machine<D>, buffers: &[Buffer]) {
    if machine.queues[0].post(buffers).is_none() {
        machine.queues[0].forget();
    }
}

/// The queue of a disk that is resized and swapped meanwhile.
pub(super) fn block(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let bucket = |bit: u8, size| (mode & bit != 0).then_some(Bucket { size, burst: 4 * size, refill_ms: 1 });
    let limit = RateLimit { bytes: bucket(1, 4096), operations: bucket(2, 4) };
    let engine = if mode & 4 == 0 { Engine::plain } else { Engine::new };
    let device = Block::with_engine("fuzz", file(DISK), mode & 8 != 0, &limit, engine).unwrap();
    let features = if mode & 16 == 0 { device.features() } else { 0 };
    let mut machine = Machine::start(device, features, mode & 32 == 0);
    drive(&mut machine, &mut input, |machine, input| match input.byte() % 8 {
        0 => drop(machine.device.on_request(DeviceRequest::Resize, &mut machine.events)),
        1 => {
            let swap = DeviceRequest::Swap(file(u64::from(input.byte()) << 9));
            drop(machine.device.on_request(swap, &mut machine.events));
        }
        _ => {
            let at = machine.buffers + 4096 * u64::from(input.byte());
            let kind = [0u32, 1, 4, 8, 11, 13, 0, 1][usize::from(input.byte()) % 8];
            let sector = u64::from(input.byte());
            machine.put(at, &[kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat());
            let (data_at, length) = (input.address(), input.length() / 512 * 512);
            let data = if kind == 1 { Buffer::Readable } else { Buffer::Writable }(data_at, length);
            match kind {
                // A flush has no data, discard and write-zeroes have a list of ranges.
                4 => offer(machine, &[Buffer::Readable(at, 16), Buffer::Writable(at + 16, 1)]),
                11 | 13 => {
                    let range = [input.byte().into(), 0, input.byte().into(), u32::from(input.byte() & 1)];
                    machine.put(at + 32, &range.map(u32::to_le_bytes).concat());
                    let range = Buffer::Readable(at + 32, 16);
                    offer(machine, &[Buffer::Readable(at, 16), range, Buffer::Writable(at + 16, 1)]);
                }
                _ => offer(machine, &[Buffer::Readable(at, 16), data, Buffer::Writable(at + 16, 1)]),
            }
        }
    });
}

/// The queue of the entropy device.
pub(super) fn rng(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let bytes = (mode & 1 != 0).then_some(Bucket { size: 100, burst: 1000, refill_ms: 1 });
    let device = Rng::with_limit(&RateLimit { bytes, operations: None }).unwrap();
    let mut machine = Machine::start(device, 0, mode & 2 == 0);
    drive(&mut machine, &mut input, |_, _| {});
}

/// The queues and the configuration space of a balloon.
pub(super) fn balloon(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let config = BalloonConfig {
        target_mib: 1,
        deflate_on_oom: mode & 1 != 0,
        statistics_s: u16::from(mode & 2 != 0),
        free_page_reporting: mode & 4 != 0,
        free_page_hinting: mode & 8 != 0,
    };
    let memory = crate::memory::create(16).unwrap();
    let device = Balloon::new(&config, &memory).unwrap();
    let features = device.features();
    let mut machine = Machine::with_memory(device, memory, features, mode & 16 == 0);
    drive(&mut machine, &mut input, |machine, input| {
        let request = match input.byte() % 5 {
            0 => DeviceRequest::Inflate(input.byte().into()),
            1 => DeviceRequest::StopHinting,
            2 => DeviceRequest::StartHinting,
            3 => {
                // Page numbers as a driver tells them, near the queues too.
                let count = usize::from(input.byte() % 32);
                let pages: Vec<u8> =
                    (0..count).flat_map(|_| u32::from(input.short() & 0x1FFF).to_le_bytes()).collect();
                machine.put(machine.buffers + 4096, &pages);
                let buffer = Buffer::Readable(machine.buffers + 4096, pages.len() as u32);
                return offer(machine, &[buffer]);
            }
            _ => {
                let round = machine.device.config().field(8).to_le_bytes();
                return machine.put(machine.buffers, &round);
            }
        };
        drop(machine.device.on_request(request, &mut machine.events));
    });
}

thread_local! {
    /// All runs share one file.
    static PERSISTENT: File = File::from(file(ALIGNMENT));
}

/// The queue of a persistent memory.
pub(super) fn pmem(data: &[u8]) {
    let mut input = Input::new(data);
    let mode = input.byte();
    let backing = PERSISTENT.with(|file| file.try_clone().unwrap());
    let engine = if mode & 1 == 0 { Engine::plain } else { Engine::new };
    let device = Pmem::with_engine(backing.into(), mode & 2 != 0, engine).unwrap();
    let mut machine = Machine::start(device, 0, mode & 4 == 0);
    drive(&mut machine, &mut input, |machine, input| {
        let at = machine.buffers + 16 * u64::from(input.byte());
        machine.put(at, &u32::from(input.byte() / 128).to_le_bytes());
        offer(machine, &[Buffer::Readable(at, 4), Buffer::Writable(at + 8, 4)]);
    });
}
