//! A disk through its driver: what it says of itself, what it refuses, and that it remembers like a plain file.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use blixard_vmm_api::rate::{Bucket, RateLimit};
use blixard_vmm_api::stats::Value;
use proptest::prelude::*;

use super::backing::{Backing, BackingError};
use super::block::{Block, BlockError};
use super::block_engine::Engine;
use super::device::{Device, DeviceRequest};
use super::guest_driver::{Buffer, Machine};
use crate::snapshot::codec::{Reader as StateReader, Writer};
use crate::stats::Samples;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status is before the device writes it.
const UNWRITTEN: u8 = 0xee;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

struct Disk {
    machine: Machine<Block>,
    file: File,
}

fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn fd_of(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

/// With io_uring where the kernel has it, and without.
const ENGINES: [fn(Backing) -> Engine; 2] = [Engine::new, Engine::plain];

impl Disk {
    fn new(content: &[u8], read_only: bool) -> Self {
        Self::with(content, read_only, Engine::new, F_FLUSH)
    }

    fn with(content: &[u8], read_only: bool, engine: fn(Backing) -> Engine, features: u64) -> Self {
        let file = file_of(content);
        let device =
            Block::with_engine("disk-0", fd_of(&file), read_only, &RateLimit::default(), engine).unwrap();
        Self { machine: Machine::start(device, features, true), file }
    }

    fn count(&self, name: &str) -> u64 {
        self.machine.device.counters().iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
        self.machine.put(at, &header);
    }

    /// One request from beginning to end: status, used length, data read.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], space: u32) -> (u8, u32, Vec<u8>) {
        let at = self.machine.buffers;
        self.header(at, kind, sector);
        let (data_at, status_at) = (at + 4096, at + (4 << 20));
        self.machine.put(data_at, data);
        self.machine.put(status_at, &[UNWRITTEN]);
        let mut buffers = vec![Buffer::Readable(at, 16)];
        if !data.is_empty() {
            // In two pieces that end at no sector.
            let cut = (data.len() as u32).min(100);
            buffers.push(Buffer::Readable(data_at, cut));
            buffers.push(Buffer::Readable(data_at + u64::from(cut), data.len() as u32 - cut));
        }
        if space > 0 {
            buffers.push(Buffer::Writable(data_at, space));
        }
        buffers.push(Buffer::Writable(status_at, 1));
        let head = self.machine.queues[0].post(&buffers).unwrap();
        self.machine.kick(0);
        let (used, length) = self.machine.wait_used(0);
        assert_eq!(used, head);
        (self.machine.get(status_at, 1)[0], length, self.machine.get(data_at, space as usize))
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], space: u32) -> u8 {
        self.request(kind, sector, data, space).0
    }

    fn status_of_swap(&mut self, backing: OwnedFd) -> Result<(), String> {
        self.machine.device.on_request(DeviceRequest::Swap(backing), &mut self.machine.events)
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut content, 0).unwrap();
        content
    }
}

fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    list.iter()
        .flat_map(|(s, n, f)| {
            [s.to_le_bytes().to_vec(), n.to_le_bytes().to_vec(), f.to_le_bytes().to_vec()].concat()
        })
        .collect()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i / 512) as u8 ^ i as u8).collect()
}

#[test]
fn the_configuration_tells_size_limits_and_features() {
    let disk = Disk::new(&pattern(8 * 512), false);
    let mut config = [0; 64];
    disk.machine.device.config().read(0, &mut config);
    assert_eq!(config[0..8], 8u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[52..56], 32u32.to_le_bytes(), "max_write_zeroes_seg");
    assert_eq!(config[60..], [0; 4], "nothing behind the end");
    assert_eq!(disk.machine.device.features() & (F_RO | F_FLUSH | F_WRITE_ZEROES), F_FLUSH | F_WRITE_ZEROES);
    let disk = Disk::new(&pattern(512), true);
    assert_eq!(disk.machine.device.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
}

#[test]
fn reads_and_writes_tell_the_bytes_they_filled_in() {
    for (engine, features) in [(ENGINES[0], F_FLUSH), (ENGINES[1], F_FLUSH), (ENGINES[0], 0), (ENGINES[1], 0)]
    {
        let mut disk = Disk::with(&pattern(16 * 512), false, engine, features);
        let (status, length, data) = disk.request(IN, 3, &[], 1024);
        assert_eq!((status, length), (OK, 1025));
        assert_eq!(data, pattern(16 * 512)[3 * 512..5 * 512]);
        let (status, length, _) = disk.request(OUT, 15, &[7; 512], 0);
        assert_eq!((status, length), (OK, 1));
        assert_eq!(disk.content()[15 * 512..], [7; 512]);
        assert_eq!(disk.status(FLUSH, 0, &[], 0), OK);
        let (status, length, id) = disk.request(GET_ID, 0, &[], 20);
        assert_eq!((status, length), (OK, 21));
        assert_eq!(&id, b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let mut disk = Disk::new(&pattern(8 * 512), false);
    let before = disk.content();
    for sector in [8, 9, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(disk.request(IN, sector, &[], 512).0, IOERR, "{sector}");
        assert_eq!(disk.status(OUT, sector, &[1; 512], 0), IOERR, "{sector}");
        assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(sector, 1, 0)]), 0), IOERR, "{sector}");
        assert_eq!(disk.status(DISCARD, 0, &ranges(&[(sector, 1, 0)]), 0), IOERR, "{sector}");
    }
    assert_eq!(disk.status(IN, 7, &[], 1024), IOERR);
    assert_eq!(disk.status(IN, 0, &[], 511), IOERR);
    assert_eq!(disk.status(OUT, 0, &[1; 700], 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, u32::MAX, 0)]), 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, 1, 0)])[..15], 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &[], 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, 1, 0); 33]), 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, 1, 2)]), 0), UNSUPP);
    assert_eq!(disk.status(DISCARD, 0, &ranges(&[(0, 1, 1)]), 0), UNSUPP);
    assert_eq!(disk.status(GET_ID, 0, &[], 19), IOERR);
    for kind in [2, 3, 5, 9, 10, 12, 14, 0x100, u32::MAX] {
        assert_eq!(disk.status(kind, 0, &[0; 512], 0), UNSUPP, "{kind}");
    }
    assert_eq!(disk.content(), before);
    assert_eq!(disk.machine.interrupts.reset_count(), 0, "the disk goes on");
}

#[test]
fn a_range_longer_than_was_promised_is_refused() {
    let mut disk = Disk::new(&pattern(512), false);
    disk.machine.reset();
    // Sparse: nothing is stored.
    disk.file.set_len(1 << 30).unwrap();
    disk.machine.device = Block::new("disk-0", fd_of(&disk.file), false, &RateLimit::default()).unwrap();
    disk.machine.activate();
    let mut config = [0; 60];
    disk.machine.device.config().read(0, &mut config);
    let limit = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    for (kind, most) in [(DISCARD, limit(36)), (WRITE_ZEROES, limit(48))] {
        assert_eq!(disk.status(kind, 0, &ranges(&[(0, most, 0)]), 0), OK);
        assert_eq!(disk.status(kind, 0, &ranges(&[(0, most + 1, 0)]), 0), IOERR);
    }
}

#[test]
fn a_read_only_disk_refuses_all_that_changes_it() {
    let mut disk = Disk::new(&pattern(8 * 512), true);
    assert_eq!(disk.status(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(disk.status(DISCARD, 0, &ranges(&[(0, 1, 0)]), 0), IOERR);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, 1, 0)]), 0), IOERR);
    assert_eq!(disk.status(IN, 0, &[], 512), OK);
    assert_eq!(disk.content(), pattern(8 * 512));
}

#[test]
fn a_backing_that_became_shorter_is_an_error_of_the_request_only() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(8 * 512), false, engine, F_FLUSH);
        disk.file.set_len(4 * 512).unwrap();
        let (status, length, _) = disk.request(IN, 3, &[], 1024);
        assert_eq!((status, length), (IOERR, 0), "no byte is promised");
        assert_eq!(disk.status(IN, 3, &[], 512), OK);
    }
}

#[test]
fn a_chain_without_header_or_status_stops_the_device_until_its_reset() {
    for buffers in [
        vec![Buffer::Readable(0x8000, 15), Buffer::Writable(0x9000, 1)],
        vec![Buffer::Readable(0x8000, 16)],
        vec![Buffer::Writable(0x8000, 16)],
    ] {
        let mut disk = Disk::new(&pattern(512), false);
        disk.machine.queues[0].post(&buffers).unwrap();
        disk.machine.kick(0);
        assert_eq!(disk.machine.interrupts.reset_count(), 1);
        assert!(disk.machine.device.failure().is_some());
        disk.machine.reset();
        disk.machine.activate();
        assert_eq!(disk.status(IN, 0, &[], 512), OK);
    }
}

/// Offers a read of each of the first `count` sectors at once, without kicking.
fn offer_reads(disk: &mut Disk, count: u64) -> Vec<u16> {
    let at = disk.machine.buffers;
    let mut heads = vec![];
    for i in 0..count {
        let (header, table) = (at + 0x1000 * i, at + 0x1000 * i + 2048);
        disk.header(header, IN, i);
        disk.machine.put(header + 16, &[UNWRITTEN]);
        let buffers = [
            Buffer::Readable(header, 16),
            Buffer::Writable(header + 512, 512),
            Buffer::Writable(header + 16, 1),
        ];
        heads.push(disk.machine.queues[0].post_indirect(table, &buffers).unwrap());
    }
    heads
}

#[test]
fn more_requests_than_the_engine_takes_are_each_answered_once() {
    for engine in ENGINES {
        let content = pattern(256 * 512);
        let mut disk = Disk::with(&content, false, engine, F_FLUSH);
        let mut heads = offer_reads(&mut disk, 256);
        disk.machine.kick(0);
        let mut used: Vec<_> = (0..256).map(|_| disk.machine.wait_used(0).0).collect();
        used.sort_unstable();
        heads.sort_unstable();
        assert_eq!(used, heads);
        let at = disk.machine.buffers;
        for i in 0..256u64 {
            assert_eq!(disk.machine.get(at + 0x1000 * i + 512, 512), content[i as usize * 512..][..512]);
            assert_eq!(disk.machine.get(at + 0x1000 * i + 16, 1), [OK]);
        }
        assert_eq!(disk.count("in_flight"), 0);
    }
}

#[test]
fn what_is_in_flight_is_finished_before_a_pause_or_a_reset_ends() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(256 * 512), false, engine, F_FLUSH);
        offer_reads(&mut disk, 256);
        disk.machine.kick(0);
        disk.machine.device.on_pause(true, &mut disk.machine.events);
        assert_eq!(disk.count("in_flight"), 0);
        let before = std::iter::from_fn(|| disk.machine.queues[0].take_used()).count();
        while disk.machine.events.turn(&mut disk.machine.device, Duration::from_millis(20)) > 0 {}
        assert_eq!(disk.machine.queues[0].take_used(), None, "a paused disk begins nothing");
        disk.machine.device.on_pause(false, &mut disk.machine.events);
        for _ in before..256 {
            disk.machine.wait_used(0);
        }

        offer_reads(&mut disk, 256);
        disk.machine.kick(0);
        disk.machine.reset();
        assert_eq!(disk.count("in_flight"), 0);
        assert_eq!(disk.machine.events.watched(), 0);
        disk.machine.activate();
        assert_eq!(disk.status(IN, 0, &[], 512), OK);
    }
}

#[test]
fn a_pause_waits_for_flushes_under_way() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(512), false, engine, F_FLUSH);
        let at = disk.machine.buffers;
        for i in 0..40 {
            disk.header(at + 32 * i, FLUSH, 0);
            let buffers = [Buffer::Readable(at + 32 * i, 16), Buffer::Writable(at + 32 * i + 16, 1)];
            disk.machine.queues[0].post(&buffers).unwrap();
        }
        disk.machine.kick(0);
        disk.machine.device.on_pause(true, &mut disk.machine.events);
        assert_eq!(disk.count("in_flight"), 0);
        let used = std::iter::from_fn(|| disk.machine.queues[0].take_used()).count();
        assert_eq!(used, 40, "all that was begun is answered when the pause begins");
    }
}

#[test]
fn a_broken_ring_with_requests_in_flight_stops_the_disk_only() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(256 * 512), false, engine, F_FLUSH);
        offer_reads(&mut disk, 50);
        disk.machine.queues[0].available_entry(50, 999);
        disk.machine.queues[0].available_index(51);
        disk.machine.kick(0);
        assert_eq!(disk.machine.interrupts.reset_count(), 1);
        assert_eq!(disk.count("in_flight"), 0);
        assert_eq!(
            disk.machine.events.turn(&mut disk.machine.device, Duration::from_millis(20)),
            0,
            "nothing spins"
        );
        disk.machine.reset();
        disk.machine.activate();
        assert_eq!(disk.status(IN, 0, &[], 512), OK);
    }
}

#[test]
fn each_request_that_reached_the_backing_is_timed_with_its_kind() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(8192), false, engine, F_FLUSH);
        let begin = Instant::now();
        for _ in 0..3 {
            assert_eq!(disk.status(IN, 0, &[], 512), OK);
        }
        for _ in 0..2 {
            assert_eq!(disk.status(OUT, 1, &pattern(512), 0), OK);
        }
        assert_eq!(disk.status(FLUSH, 0, &[], 0), OK);
        assert_eq!(disk.status(WRITE_ZEROES, 0, &ranges(&[(0, 1, 0)]), 0), OK);
        assert_eq!(disk.status(IN, 1000, &[], 512), IOERR);
        let passed = begin.elapsed().as_micros() as u64;
        let mut samples = Samples::default();
        disk.machine.device.samples(samples.of("blk.root"));
        let timed = samples.page(0).samples.into_iter().filter_map(|sample| match sample.value {
            Value::Histogram(histogram) => Some((sample.name, histogram.count(), histogram.sum)),
            Value::Count(_) => None,
        });
        let timed: Vec<_> = timed.collect();
        assert!(timed.iter().map(|(_, _, sum)| sum).sum::<u64>() <= passed, "{timed:?} in {passed}");
        let counts: Vec<_> = timed.iter().map(|(name, count, _)| (name.as_str(), *count)).collect();
        let wanted =
            [("read_us", 3), ("write_us", 2), ("flush_us", 1), ("discard_us", 0), ("write_zeroes_us", 1)];
        assert_eq!(counts, wanted);
    }
}

#[test]
fn io_uring_is_used_where_the_kernel_has_it() {
    let disk = Disk::new(&pattern(512), false);
    match io_uring::IoUring::new(1) {
        Ok(_) => assert_eq!(disk.count("io_uring"), 1),
        Err(error) => println!("skipped: io_uring: {error}"),
    }
    assert_eq!(Disk::with(&pattern(512), false, Engine::plain, F_FLUSH).count("io_uring"), 0);
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_the_reason() {
    let error = |fd: OwnedFd, read_only| match Block::new("d", fd, read_only, &RateLimit::default()) {
        Err(BlockError::Backing(_, error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 1024]).unwrap();
    let open = |options: &mut OpenOptions| -> OwnedFd { options.open(&path).unwrap().into() };
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(error(socket.into(), false), BackingError::Kind));
    assert!(matches!(error(File::open(&directory).unwrap().into(), true), BackingError::Kind));
    assert!(matches!(error(fd_of(&file_of(&[])), false), BackingError::Empty));
    assert!(matches!(error(fd_of(&file_of(&[0; 700])), false), BackingError::Partial(700)));
    assert!(matches!(error(open(OpenOptions::new().read(true)), false), BackingError::NotWritable));
    assert!(matches!(error(open(OpenOptions::new().write(true)), false), BackingError::NotReadable));
    assert!(matches!(error(open(OpenOptions::new().read(true).append(true)), false), BackingError::Append));
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: `name` is a string with a NUL that lives until the call returns. (OpenOptions drops O_PATH with musl.)
    let by_path = unsafe { libc::open(name.as_ptr(), libc::O_PATH) };
    // SAFETY: the descriptor was just opened and is owned by nobody else; -1 is refused by `from_raw_fd`.
    let by_path = unsafe { OwnedFd::from_raw_fd(by_path) };
    assert!(matches!(error(by_path, true), BackingError::NotReadable));
    assert!(Block::new("d", open(OpenOptions::new().read(true)), true, &RateLimit::default()).is_ok());
    for id in ["", "with space", "123456789012345678901", "ü"] {
        assert!(matches!(
            Block::new(id, open(OpenOptions::new().read(true)), true, &RateLimit::default()),
            Err(BlockError::Id(_))
        ));
    }
    let mut unchanged = vec![];
    File::open(&path).unwrap().read_to_end(&mut unchanged).unwrap();
    assert_eq!(unchanged, [0; 1024], "being probed changes nothing, not even the size");
}

#[test]
fn a_limited_disk_answers_what_its_buckets_allow_and_the_rest_in_time() {
    let sectors = |count: u64| Some(Bucket { size: 512 * count, burst: 0, refill_ms: 40 });
    let requests = |count| Some(Bucket { size: count, burst: 0, refill_ms: 40 });
    for limit in [
        RateLimit { bytes: sectors(8), operations: None },
        RateLimit { bytes: None, operations: requests(8) },
    ] {
        for engine in ENGINES {
            let file = file_of(&pattern(64 * 512));
            let device = Block::with_engine("disk-0", fd_of(&file), false, &limit, engine).unwrap();
            let mut disk = Disk { machine: Machine::start(device, F_FLUSH, true), file };
            let begin = std::time::Instant::now();
            offer_reads(&mut disk, 24);
            disk.machine.kick(0);
            for _ in 0..8 {
                disk.machine.wait_used(0);
            }
            assert_eq!(disk.machine.queues[0].take_used(), None);
            for _ in 8..24 {
                disk.machine.wait_used(0);
            }
            assert!(begin.elapsed() >= Duration::from_millis(80), "16 more take two refills");
            assert!(disk.count("limited") > 0);
            offer_reads(&mut disk, 24);
            disk.machine.kick(0);
            disk.machine.reset();
            assert_eq!(disk.machine.events.watched(), 0, "what is held goes with its driver");
            disk.machine.activate();
            assert_eq!(disk.status(IN, 0, &[], 512), OK);
        }
    }
}

#[test]
fn a_disk_that_grew_is_told_and_used_and_one_that_shrank_refuses_what_is_gone() {
    let mut disk = Disk::new(&pattern(8 * 512), false);
    assert_eq!(disk.status(IN, 15, &[], 512), IOERR);
    disk.file.set_len(16 * 512).unwrap();
    disk.machine.device.on_request(DeviceRequest::Resize, &mut disk.machine.events).unwrap();
    assert_eq!(disk.machine.interrupts.config_count(), 1);
    assert_eq!(disk.machine.device.config().field(0), 16);
    assert_eq!(disk.status(IN, 15, &[], 512), OK);
    disk.file.set_len(4 * 512).unwrap();
    disk.machine.device.on_request(DeviceRequest::Resize, &mut disk.machine.events).unwrap();
    assert_eq!(disk.status(IN, 4, &[], 512), IOERR);
    disk.file.set_len(700).unwrap();
    let error = disk.machine.device.on_request(DeviceRequest::Resize, &mut disk.machine.events).unwrap_err();
    assert!(error.contains("700 bytes"), "{error}");
    assert_eq!(disk.machine.device.config().field(0), 4, "the size that was usable stays");
}

#[test]
fn a_swapped_backing_gets_all_later_requests_and_the_old_one_all_earlier_ones() {
    for engine in ENGINES {
        let mut disk = Disk::with(&pattern(256 * 512), false, engine, F_FLUSH);
        let new = file_of(&vec![7; 300 * 512]);
        offer_reads(&mut disk, 200);
        disk.machine.kick(0);
        assert_eq!(disk.status_of_swap(fd_of(&new)), Ok(()));
        assert_eq!(disk.machine.device.config().field(0), 300);
        for _ in 0..200 {
            disk.machine.wait_used(0);
        }
        let at = disk.machine.buffers;
        assert_eq!(disk.machine.get(at + 512, 512), pattern(512), "the first was under way before");
        assert_eq!(disk.status(OUT, 299, &[9; 512], 0), OK);
        let mut end = [0; 512];
        new.read_exact_at(&mut end, 299 * 512).unwrap();
        assert_eq!(end, [9; 512]);
        assert_eq!(disk.content(), pattern(256 * 512));
        let (read_only, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(disk.status_of_swap(read_only.into()).unwrap_err().contains("neither a regular file"));
        assert_eq!(disk.status(IN, 299, &[], 512), OK, "the disk goes on with what it has");
    }
}

#[test]
fn a_restored_disk_has_no_more_tokens_than_it_had() {
    let limit =
        RateLimit { bytes: Some(Bucket { size: 1024, burst: 0, refill_ms: 60_000 }), operations: None };
    let file = file_of(&pattern(8 * 512));
    let disk = |file: &File| Block::new("disk-0", fd_of(file), false, &limit).unwrap();
    let mut machine = Machine::start(disk(&file), F_FLUSH, true);
    machine.device.on_pause(true, &mut machine.events);
    let mut state = Writer::new();
    machine.device.save(&mut state);
    let full = state.into_bytes();
    let mut other = Disk { machine: Machine::start(disk(&file), F_FLUSH, true), file };
    assert_eq!(other.status(IN, 0, &[], 1024), OK);
    let mut state = Writer::new();
    other.machine.device.save(&mut state);
    let spent = state.into_bytes();
    for (state, expected) in [(full, 1), (spent, 0)] {
        let mut restored = Disk {
            machine: Machine::start(disk(&other.file), F_FLUSH, true),
            file: fd_of(&other.file).into(),
        };
        restored.machine.reset();
        restored.machine.device.restore(&mut StateReader::new(&state)).unwrap();
        restored.machine.activate();
        offer_reads(&mut restored, 1);
        restored.machine.kick(0);
        restored.machine.device.on_pause(true, &mut restored.machine.events);
        let answered = std::iter::from_fn(|| restored.machine.queues[0].take_used()).count();
        assert_eq!(answered, expected);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Read { sector: u64, count: u64 },
    Write { sector: u64, count: u64, byte: u8 },
    Zero { list: Vec<(u64, u32, u32)> },
    Discard { sector: u64, count: u32 },
    Flush,
    Reset,
}

const SECTORS: u64 = 64;

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..SECTORS + 2, 1u64..20);
    prop_oneof![
        4 => place().prop_map(|(sector, count)| Step::Read { sector, count }),
        4 => (place(), any::<u8>()).prop_map(|((sector, count), byte)| Step::Write { sector, count, byte }),
        2 => proptest::collection::vec((0..SECTORS + 1, 0u32..20, 0u32..2), 1..4).prop_map(|list| Step::Zero { list }),
        1 => place().prop_map(|(sector, count)| Step::Discard { sector, count: count as u32 }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The disk remembers exactly what a plain array of sectors would.
    #[test]
    fn a_disk_behaves_like_an_array_of_sectors(
        steps in proptest::collection::vec(step(), 1..60), engine in 0usize..2, features in prop_oneof![Just(0), Just(F_FLUSH)],
    ) {
        let mut model = pattern(SECTORS as usize * 512);
        let mut disk = Disk::with(&model, false, ENGINES[engine], features);
        let bytes = |sector: u64, count: u64| sector as usize * 512..(sector + count) as usize * 512;
        for step in steps {
            match step {
                Step::Read { sector, count } => {
                    let (status, length, data) = disk.request(IN, sector, &[], count as u32 * 512);
                    if sector + count <= SECTORS {
                        prop_assert_eq!((status, u64::from(length)), (OK, count * 512 + 1));
                        prop_assert_eq!(data.as_slice(), &model[bytes(sector, count)]);
                    } else {
                        prop_assert_eq!(status, IOERR);
                    }
                }
                Step::Write { sector, count, byte } => {
                    let data: Vec<u8> = (0..count * 512).map(|i| byte.wrapping_add(i as u8)).collect();
                    let status = disk.status(OUT, sector, &data, 0);
                    if sector + count <= SECTORS {
                        prop_assert_eq!(status, OK);
                        model[bytes(sector, count)].copy_from_slice(&data);
                    } else {
                        prop_assert_eq!(status, IOERR);
                    }
                }
                Step::Zero { list } => {
                    let status = disk.status(WRITE_ZEROES, 0, &ranges(&list), 0);
                    if list.iter().all(|(sector, count, _)| sector + u64::from(*count) <= SECTORS) {
                        prop_assert_eq!(status, OK);
                        for (sector, count, _) in list {
                            model[bytes(sector, u64::from(count))].fill(0);
                        }
                    } else {
                        prop_assert_eq!(status, IOERR);
                    }
                }
                Step::Discard { sector, count } => {
                    let status = disk.status(DISCARD, 0, &ranges(&[(sector, count, 0)]), 0);
                    if disk.machine.device.features() & F_DISCARD == 0 {
                        prop_assert_eq!(status, UNSUPP);
                    } else if sector + u64::from(count) <= SECTORS {
                        prop_assert_eq!(status, OK);
                        // A hole in a regular file reads as zeroes.
                        model[bytes(sector, u64::from(count))].fill(0);
                    } else {
                        prop_assert_eq!(status, IOERR);
                    }
                }
                Step::Flush => prop_assert_eq!(disk.status(FLUSH, 0, &[], 0), OK),
                Step::Reset => { disk.machine.reset(); disk.machine.activate(); }
            }
        }
        prop_assert_eq!(disk.content(), model);
        prop_assert_eq!(disk.machine.interrupts.reset_count(), 0);
    }
}
