//! Persistent memory through its driver, and what is mapped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;

use super::backing::{Backing, BackingError};
use super::block_engine::Engine;
use super::device::Device;
use super::guest_driver::{Buffer, Machine};
use super::pmem::{ALIGNMENT, Pmem, PmemError};

const ENGINES: [fn(Backing) -> Engine; 2] = [Engine::new, Engine::plain];

fn file(size: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"beginning").unwrap();
    file.set_len(size).unwrap();
    file
}

fn fd(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

fn request(machine: &mut Machine<Pmem>, kind: u32) -> u32 {
    let at = machine.buffers;
    machine.put(at, &kind.to_le_bytes());
    machine.put(at + 8, &[0xee; 4]);
    machine.queues[0].post(&[Buffer::Readable(at, 4), Buffer::Writable(at + 8, 4)]).unwrap();
    machine.kick(0);
    assert_eq!(machine.wait_used(0).1, 4);
    u32::from_le_bytes(machine.get(at + 8, 4).try_into().unwrap())
}

fn mapped(device: &Pmem, at: u64, length: usize) -> Vec<u8> {
    let from = std::ptr::with_exposed_provenance::<u8>((device.mapping().address + at) as usize);
    // SAFETY: the range lies in the mapping, which stays, and nobody writes to it meanwhile.
    unsafe { std::slice::from_raw_parts(from, length) }.to_vec()
}

#[test]
fn the_file_is_mapped_aligned_and_the_driver_told_where() {
    for (read_only, size, length) in
        [(true, 10_000, ALIGNMENT), (true, ALIGNMENT, ALIGNMENT), (false, 2 * ALIGNMENT, 2 * ALIGNMENT)]
    {
        let mut device = Pmem::new(fd(&file(size)), read_only).unwrap();
        let mapping = device.place(1 << 32);
        assert_eq!((mapping.length, mapping.read_only), (length, read_only));
        assert!(mapping.address.is_multiple_of(ALIGNMENT));
        assert_eq!(mapped(&device, 0, 10), b"beginning\0");
        assert_eq!(mapped(&device, length - 4096, 4096), [0; 4096], "behind a short file there is nothing");
        let mut bytes = [0; 16];
        device.config().read(0, &mut bytes);
        assert_eq!(bytes[..8], (1u64 << 32).to_le_bytes());
        assert_eq!(bytes[8..], length.to_le_bytes());
    }
}

#[test]
fn flushes_are_answered_and_other_requests_fail() {
    for engine in ENGINES {
        let device = Pmem::with_engine(fd(&file(ALIGNMENT)), false, engine).unwrap();
        let mut machine = Machine::start(device, 0, true);
        assert_eq!(request(&mut machine, 0), 0);
        assert_eq!(request(&mut machine, 1), 1);
        assert_eq!(request(&mut machine, u32::MAX), 1);
        let counters = machine.device.counters();
        assert!(counters.contains(&("flushes", 1)) && counters.contains(&("errors", 2)));
        machine.reset();
        assert_eq!(machine.events.watched(), 0);
    }
    let mut machine = Machine::start(Pmem::new(fd(&file(ALIGNMENT)), true).unwrap(), 0, true);
    assert_eq!(request(&mut machine, 0), 0, "what nobody writes is durable");
}

#[test]
fn all_flushes_are_answered_before_a_pause_begins() {
    for engine in ENGINES {
        let device = Pmem::with_engine(fd(&file(ALIGNMENT)), false, engine).unwrap();
        let mut machine = Machine::start(device, 0, true);
        let at = machine.buffers;
        for i in 0..16 {
            machine.queues[0].post(&[Buffer::Readable(at, 4), Buffer::Writable(at + 8 + 4 * i, 4)]).unwrap();
        }
        machine.kick(0);
        machine.device.on_pause(true, &mut machine.events);
        assert_eq!(std::iter::from_fn(|| machine.queues[0].take_used()).count(), 16);
        machine.reset();
    }
}

#[test]
fn a_request_without_room_for_its_answer_stops_the_device_until_its_reset() {
    for buffers in
        [vec![Buffer::Readable(0x8000, 4)], vec![Buffer::Readable(0x8000, 3), Buffer::Writable(0x9000, 4)]]
    {
        let mut machine = Machine::start(Pmem::new(fd(&file(ALIGNMENT)), false).unwrap(), 0, true);
        machine.queues[0].post(&buffers).unwrap();
        machine.kick(0);
        machine.until(|device, _| device.failure().is_some());
        machine.reset();
        machine.activate();
        assert_eq!(request(&mut machine, 0), 0);
    }
}

#[test]
fn what_cannot_be_mapped_is_refused_with_the_reason() {
    let error = |file: &File, read_only| Pmem::new(fd(file), read_only).err().unwrap();
    assert!(matches!(error(&file(0), true), PmemError::Backing(BackingError::Empty)));
    assert!(matches!(error(&file(ALIGNMENT + 512), false), PmemError::Partial(_)));
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(error(&File::open(&directory).unwrap(), true), PmemError::Backing(BackingError::Kind)));
    let path = directory.path().join("pmem");
    std::fs::write(&path, vec![0; 2 << 20]).unwrap();
    let read = OpenOptions::new().read(true).open(&path).unwrap();
    assert!(matches!(error(&read, false), PmemError::Backing(BackingError::NotWritable)));
    assert!(Pmem::new(fd(&read), true).is_ok());
}
