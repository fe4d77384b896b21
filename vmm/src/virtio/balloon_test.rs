//! A balloon through its driver: what is given up goes back to the host, and nothing else does.

use std::time::Duration;

use blixard_vmm_api::config::BalloonConfig;
use blixard_vmm_api::snapshot::MemoryConfig;
use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::balloon::Balloon;
use super::device::{Device, DeviceRequest, GuestMemory};
use super::guest_driver::{Buffer, Machine, guest_memory};
use crate::memory;
use crate::snapshot::codec::{Reader, Writer};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const F_STATISTICS: u64 = 1 << 1;
const F_OOM: u64 = 1 << 2;
const F_HINTING: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;
const ALL: u64 = F_STATISTICS | F_OOM | F_HINTING | F_REPORTING;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;

fn config() -> BalloonConfig {
    BalloonConfig {
        target_mib: 0,
        deflate_on_oom: true,
        statistics_s: 1,
        free_page_reporting: true,
        free_page_hinting: true,
    }
}

fn start(memory: GuestMemory, config: &BalloonConfig, features: u64) -> Machine<Balloon> {
    let balloon = Balloon::new(config, &memory).unwrap();
    assert_eq!(balloon.queue_sizes().len(), 2 + (balloon.features() & !F_OOM).count_ones() as usize);
    Machine::with_memory(balloon, memory, features, true)
}

fn balloon() -> Machine<Balloon> {
    start(memory::create(16).unwrap(), &config(), ALL)
}

fn count(machine: &Machine<Balloon>, name: &str) -> u64 {
    machine.device.counters().iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1
}

fn ask(machine: &mut Machine<Balloon>, request: DeviceRequest) -> Result<(), String> {
    machine.device.on_request(request, &mut machine.events)
}

/// Pages of memory that the host holds.
fn held(memory: &GuestMemory) -> u64 {
    crate::memory::sparse::resident(memory).unwrap().count()
}

/// Sends bytes on a queue; false when the device failed.
fn send(machine: &mut Machine<Balloon>, queue: usize, bytes: &[u8]) -> bool {
    let at = machine.buffers;
    machine.put(at, bytes);
    machine.queues[queue].post(&[Buffer::Readable(at, bytes.len() as u32)]).unwrap();
    machine.kick(queue as u16);
    machine.queues[queue].take_used().is_some()
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|page| (*page as u32).to_le_bytes()).collect()
}

#[test]
fn given_up_pages_go_back_to_the_host_and_come_back_empty() {
    for fork_ready in [false, true] {
        let options = MemoryConfig { fork_ready, ..Default::default() };
        give_up_pages(memory::create_as(16, options).unwrap().0);
    }
}

fn give_up_pages(memory: GuestMemory) {
    let mut machine = start(memory, &config(), ALL);
    for page in 1024..1100 {
        machine.put(page * PAGE, &[page as u8; 4096]);
    }
    // The list itself takes a page.
    machine.put(machine.buffers, &[0]);
    let before = held(&machine.memory);
    let mut given: Vec<u64> = (1030..1050).rev().chain([1070, 1070, 1072]).collect();
    given.rotate_left(5);
    assert!(send(&mut machine, INFLATE, &numbers(&given)));
    assert_eq!(held(&machine.memory), before - 22);
    assert_eq!(count(&machine, "released_bytes"), 22 * PAGE);
    for page in 1024..1100u64 {
        let expected = if given.contains(&page) { 0 } else { page as u8 };
        assert_eq!(machine.get(page * PAGE, 4096), [expected; 4096], "page {page}");
    }
    assert!(send(&mut machine, DEFLATE, &numbers(&given)));
    machine.put(1070 * PAGE, &[1]);
    assert_eq!(count(&machine, "deflated_pages"), 23);
    assert_eq!(machine.device.failure(), None);
}

#[test]
fn over_the_file_of_a_snapshot_a_vm_drops_its_own_copy_and_the_file_stays() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 * MIB).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&[5; 4096], 1024 * PAGE).unwrap();
    let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let mapping = MmapRegion::build(
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        16 << 20,
        libc::PROT_READ | libc::PROT_WRITE,
        private,
    );
    let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(0)).unwrap();
    let mut machine = start(GuestMemory::from_regions(vec![region]).unwrap(), &config(), ALL);
    machine.put(1024 * PAGE, &[9; 4096]);
    assert!(send(&mut machine, INFLATE, &numbers(&[1024])));
    assert_eq!(machine.get(1024 * PAGE, 4096), [5; 4096]);
    let mut kept = [0; 4096];
    file.read_exact_at(&mut kept, 1024 * PAGE).unwrap();
    assert_eq!(kept, [5; 4096]);
}

#[test]
fn a_page_that_is_not_the_guests_stops_the_balloon_and_releases_nothing() {
    for page in [4096, 0xC_0000, 0x10_0000, u64::from(u32::MAX)] {
        let mut machine = balloon();
        machine.put(2048 * PAGE, &[1; 4096]);
        assert!(!send(&mut machine, INFLATE, &numbers(&[page])));
        assert!(machine.device.failure().unwrap().contains("not inside guest memory"));
        assert_eq!(count(&machine, "released_bytes"), 0);
        machine.reset();
        machine.activate();
        assert!(send(&mut machine, INFLATE, &numbers(&[2048])));
        assert_eq!(machine.get(2048 * PAGE, 4096), [0; 4096]);
    }
}

#[test]
fn of_a_huge_list_the_beginning_is_released_and_the_rest_told() {
    let mut machine = balloon();
    let list: Vec<u64> = (0..8192).map(|n| 1024 + n % 2).collect();
    assert!(send(&mut machine, INFLATE, &numbers(&list)));
    assert_eq!((count(&machine, "inflated_pages"), count(&machine, "ignored_pages")), (8192, 4096));
}

#[test]
fn the_target_is_told_and_bounded() {
    let mut machine = balloon();
    assert_eq!(ask(&mut machine, DeviceRequest::Inflate(5)), Ok(()));
    assert_eq!(machine.interrupts.config_count(), 1);
    assert_eq!(machine.device.config().field(0), 5 * 256);
    machine.device.config().write(4, &700u32.to_le_bytes());
    machine.device.config().write(0, &[0xff; 4]);
    machine.device.config().write(8, &[0xff; 200]);
    assert_eq!(machine.device.config().field(0), 5 * 256, "only the size is the driver's to write");
    assert_eq!(machine.device.config().field(8), 0);
    assert_eq!(count(&machine, "actual_bytes"), 700 * PAGE);
    let error = ask(&mut machine, DeviceRequest::Inflate(16)).unwrap_err();
    assert!(error.contains("16 MiB asked for, the VM has 16 MiB"), "{error}");
    assert!(ask(&mut machine, DeviceRequest::Resize).is_err());
}

#[test]
fn reported_ranges_are_released_whole_pages_of_them() {
    let mut machine = balloon();
    machine.put(4 * MIB, &vec![3; 3 << 20]);
    let ranges = [Buffer::Writable(4 * MIB, 1 << 20), Buffer::Writable(5 * MIB + 100, 2 * 4096)];
    machine.queues[REPORTING].post(&ranges).unwrap();
    machine.kick(REPORTING as u16);
    assert_eq!(machine.queues[REPORTING].take_used().unwrap().1, 0);
    assert_eq!(machine.get(4 * MIB, 1 << 20), vec![0; 1 << 20]);
    let second = machine.get(5 * MIB, 4 * 4096);
    assert_eq!((&second[..4096], &second[4096..8192]), (&[3; 4096][..], &[0; 4096][..]));
    assert_eq!(second[8192..], [3; 2 * 4096]);
    assert_eq!(count(&machine, "reported_bytes"), MIB + 2 * PAGE);
}

#[test]
fn statistics_are_asked_for_in_intervals_and_the_buffer_stays_meanwhile() {
    let mut machine = balloon();
    let pair = |tag: u16, value: u64| [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat();
    let first = [pair(4, 123), pair(5, 456), pair(999, 7)].concat();
    assert!(!send(&mut machine, STATISTICS, &first), "the buffer is kept");
    assert_eq!((count(&machine, "guest_free_bytes"), count(&machine, "guest_total_bytes")), (123, 456));
    machine.wait_used(STATISTICS);
    assert!(!send(&mut machine, STATISTICS, &pair(4, 99)));
    assert_eq!(count(&machine, "guest_free_bytes"), 99);
    assert!(send(&mut machine, STATISTICS, &pair(4, 98)), "a second buffer sends the first one back");
    assert_eq!(count(&machine, "statistics_updates"), 3);
    machine.device.on_pause(true, &mut machine.events);
    let turns = machine.events.turn(&mut machine.device, Duration::from_millis(1500));
    assert_eq!(turns, 0, "a paused VM is asked for nothing");
    machine.device.on_pause(false, &mut machine.events);
    machine.wait_used(STATISTICS);
}

#[test]
fn a_round_of_hinting_releases_what_is_told_between_its_number_and_its_end() {
    let mut machine = balloon();
    let free = |machine: &mut Machine<Balloon>, at: u64| {
        machine.put(at, &[8; 4096]);
        machine.queues[HINTING].post(&[Buffer::Writable(at, 4096)]).unwrap();
        machine.kick(HINTING as u16);
        machine.queues[HINTING].take_used().unwrap();
        machine.get(at, 4096) == [0; 4096]
    };
    assert!(!free(&mut machine, 4 * MIB), "nobody asked");
    ask(&mut machine, DeviceRequest::StartHinting).unwrap();
    assert!(ask(&mut machine, DeviceRequest::StartHinting).is_err());
    assert_eq!(count(&machine, "hinting"), 1);
    assert!(!free(&mut machine, 4 * MIB), "it did not begin this round");
    let round = machine.device.config().field(8);
    assert!(round > 1);
    assert!(send(&mut machine, HINTING, &(round - 1).to_le_bytes()));
    assert!(!free(&mut machine, 4 * MIB), "it began another round");
    assert!(send(&mut machine, HINTING, &round.to_le_bytes()));
    assert!(free(&mut machine, 4 * MIB));
    let told = machine.interrupts.config_count();
    assert!(send(&mut machine, HINTING, &0u32.to_le_bytes()));
    assert_eq!(machine.device.config().field(8), 1, "it may use its pages again");
    assert_eq!(machine.interrupts.config_count(), told + 1);
    assert!(!free(&mut machine, 4 * MIB));
    assert_eq!((count(&machine, "hinting"), count(&machine, "hinting_rounds")), (0, 1));

    ask(&mut machine, DeviceRequest::StartHinting).unwrap();
    let next = machine.device.config().field(8);
    assert_ne!(next, round);
    assert!(send(&mut machine, HINTING, &next.to_le_bytes()));
    ask(&mut machine, DeviceRequest::StopHinting).unwrap();
    assert!(!free(&mut machine, 4 * MIB), "after the stop its pages are its own");
}

#[test]
fn queues_move_up_when_those_before_them_were_not_agreed_on() {
    let mut machine = start(memory::create(16).unwrap(), &config(), F_REPORTING);
    machine.put(4 * MIB, &[3; 4096]);
    machine.queues[2].post(&[Buffer::Writable(4 * MIB, 4096)]).unwrap();
    machine.kick(2);
    assert!(machine.queues[2].take_used().is_some());
    assert_eq!(machine.get(4 * MIB, 4096), [0; 4096]);
}

#[test]
fn a_restored_balloon_has_its_size_and_target_and_ends_the_round_of_then() {
    let mut machine = balloon();
    ask(&mut machine, DeviceRequest::Inflate(3)).unwrap();
    machine.device.config().write(4, &768u32.to_le_bytes());
    ask(&mut machine, DeviceRequest::StartHinting).unwrap();
    let round = machine.device.config().field(8);
    let mut state = Writer::new();
    machine.device.save(&mut state);
    let state = state.into_bytes();
    let mut restored = Balloon::new(&config(), &machine.memory).unwrap();
    let mut reader = Reader::new(&state);
    restored.restore(&mut reader).unwrap();
    reader.end().unwrap();
    let fields = [0, 4, 8].map(|at| restored.config().field(at));
    assert_eq!(fields, [768, 768, 1]);
    let mut machine = Machine::with_memory(restored, machine.memory.clone(), ALL, true);
    ask(&mut machine, DeviceRequest::StartHinting).unwrap();
    assert!(machine.device.config().field(8) > round);
    assert!(
        Balloon::new(&config(), &machine.memory).unwrap().restore(&mut Reader::new(&state[1..])).is_err()
    );
}

#[test]
fn hinting_that_is_not_configured_is_refused() {
    let mut machine = start(guest_memory(16 << 20), &BalloonConfig::default(), 0);
    assert_eq!(machine.device.features(), 0);
    assert!(ask(&mut machine, DeviceRequest::StartHinting).unwrap_err().contains("not configured"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever is named on any queue: memory that was not named stays, and the device answers or stops.
    #[test]
    fn nothing_but_what_is_named_is_released(
        chains in proptest::collection::vec((0usize..5, proptest::collection::vec(1000u64..4200, 1..20), any::<bool>()), 1..20),
        hinting: bool,
    ) {
        let mut machine = balloon();
        let first = 1024u64;
        for page in first..4096 {
            machine.memory.write_obj(page, GuestAddress(page * PAGE)).unwrap();
        }
        if hinting {
            ask(&mut machine, DeviceRequest::StartHinting).unwrap();
            prop_assert!(send(&mut machine, HINTING, &2u32.to_le_bytes()));
        }
        let mut named = std::collections::BTreeSet::<u64>::new();
        for (queue, pages, inside) in chains {
            if machine.device.failure().is_some() {
                machine.reset();
                machine.activate();
            }
            let pages: Vec<u64> = pages.into_iter().map(|p| if inside { p.clamp(first, 4095) } else { p }).collect();
            if queue < 3 {
                send(&mut machine, queue, &numbers(&pages));
                named.extend(pages.iter().filter(|_| queue == INFLATE));
            } else {
                let ranges: Vec<Buffer> = pages.iter().map(|p| Buffer::Writable(p * PAGE, 4096)).collect();
                machine.queues[queue].post(&ranges);
                machine.kick(queue as u16);
                let _ = machine.queues[queue].take_used();
                named.extend(&pages);
            }
        }
        for page in first..4096 {
            let content: u64 = machine.memory.read_obj(GuestAddress(page * PAGE)).unwrap();
            prop_assert!(content == page || (content == 0 && named.contains(&page)), "page {}: {}", page, content);
        }
    }
}
