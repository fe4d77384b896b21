//! Drivers that do anything at all: each device answers or stops, and neither panics, hangs nor keeps a descriptor watched.
//! The fuzz targets of the same names go on where these end.

use std::fs::File;
use std::os::fd::OwnedFd;

use blixard_vmm_api::config::BalloonConfig;
use blixard_vmm_api::rate::{Bucket, RateLimit};
use proptest::prelude::*;

use super::balloon::Balloon;
use super::block::Block;
use super::block_engine::Engine;
use super::device::{Device, DeviceRequest};
use super::guest_driver::{Buffer, Machine};
use super::hostile::{Input, drive};
use super::pmem::{ALIGNMENT, Pmem};
use super::rng::Rng;

fn file(size: u64) -> OwnedFd {
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file.into()
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..3000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_disk_survives_any_driver(data in bytes(), plain: bool, read_only: bool, limited: bool) {
        let bucket = |size| limited.then_some(Bucket { size, burst: 4 * size, refill_ms: 1 });
        let limit = RateLimit { bytes: bucket(4096), operations: bucket(4) };
        let engine = if plain { Engine::plain } else { Engine::new };
        let device = Block::with_engine("disk", file(64 << 10), read_only, &limit, engine).unwrap();
        let features = device.features();
        let mut machine = Machine::start(device, features, true);
        drive(&mut machine, &mut Input::new(&data), |machine, input| match input.byte() % 8 {
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
                machine.queues[0].post(&[Buffer::Readable(at, 16), data, Buffer::Writable(at + 16, 1)]);
            }
        });
    }

    #[test]
    fn the_entropy_device_survives_any_driver(data in bytes(), limited: bool) {
        let bytes = limited.then_some(Bucket { size: 100, burst: 1000, refill_ms: 1 });
        let device = Rng::with_limit(&RateLimit { bytes, operations: None }).unwrap();
        drive(&mut Machine::start(device, 0, true), &mut Input::new(&data), |_, _| {});
    }

    #[test]
    fn a_balloon_survives_any_driver(data in bytes(), few: bool) {
        let config = BalloonConfig {
            target_mib: 1,
            deflate_on_oom: true,
            statistics_s: 1,
            free_page_reporting: true,
            free_page_hinting: !few,
        };
        let memory = crate::memory::create(16).unwrap();
        let device = Balloon::new(&config, &memory).unwrap();
        let features = device.features();
        let mut machine = Machine::with_memory(device, memory, features, true);
        drive(&mut machine, &mut Input::new(&data), |machine, input| {
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
    }

    #[test]
    fn persistent_memory_survives_any_driver(data in bytes(), plain: bool, read_only: bool) {
        let engine = if plain { Engine::plain } else { Engine::new };
        let device = Pmem::with_engine(file(ALIGNMENT), read_only, engine).unwrap();
        drive(&mut Machine::start(device, 0, true), &mut Input::new(&data), |machine, input| {
            let at = machine.buffers + 16 * u64::from(input.byte());
            machine.put(at, &u32::from(input.byte() / 128).to_le_bytes());
            machine.queues[0].post(&[Buffer::Readable(at, 4), Buffer::Writable(at + 8, 4)]);
        });
    }
}
