//! The rules of a virtqueue, kept by random drivers and broken by hostile ones.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::chain::Chain;
use super::device::GuestMemory;
use super::guest_driver::{Buffer, DriverQueue, INDIRECT, NEXT, WRITE, guest_memory, write_descriptor};
use super::queue::{Queue, QueueError};

const BASE: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const SIZE: usize = 0x20_0000;

fn pair(size: u16, event_idx: bool) -> (DriverQueue, Queue, GuestMemory) {
    let memory = guest_memory(SIZE);
    let driver = DriverQueue::new(&memory, BASE, size, event_idx);
    let device = driver.device_side(0);
    (driver, device, memory)
}

/// What the device says to a ring of 8 after `break_it`.
fn error_after(break_it: impl FnOnce(&DriverQueue, &GuestMemory)) -> QueueError {
    let (driver, mut device, memory) = pair(8, true);
    break_it(&driver, &memory);
    driver.available_index(1);
    device.pop().expect_err("the ring is broken")
}

#[test]
fn a_queue_is_refused_when_its_size_or_its_place_is_wrong() {
    let memory = guest_memory(0x10000);
    let new = |size, d, a, u| Queue::new(0, size, d, a, u, false, &memory);
    assert!(new(8, 0x1000, 0x2000, 0x3000).is_ok());
    for size in [0, 3, 7, 32769, 65535] {
        assert!(matches!(new(size, 0x1000, 0x2000, 0x3000), Err(QueueError::Size(s)) if s == size));
    }
    for (d, a, u) in [(0x1008, 0x2000, 0x3000), (0x1000, 0x2001, 0x3000), (0x1000, 0x2000, 0x3002)] {
        assert!(matches!(new(8, d, a, u), Err(QueueError::Misaligned { .. })));
    }
    for (d, a, u) in [
        (0xff90, 0x2000, 0x3000),
        (0x1000, 0xfff0, 0x3000),
        (0x1000, 0x2000, 0xffbc),
        (u64::MAX - 15, 0x2000, 0x3000),
        (0x1000, u64::MAX - 1, 0x3000),
    ] {
        assert!(matches!(new(8, d, a, u), Err(QueueError::AreaOutside { .. })), "{d:#x} {a:#x} {u:#x}");
    }
}

#[test]
fn a_disabled_queue_never_has_a_chain() {
    let mut queue = Queue::disabled(3);
    assert!(!queue.is_enabled());
    assert!(queue.pop().unwrap().is_none());
    assert!(!queue.enable_kicks().unwrap());
    assert!(!queue.publish().unwrap());
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    let error = error_after(|driver, _| {
        driver.descriptor(0, DATA, 16, NEXT, 1);
        driver.descriptor(1, DATA, 16, NEXT, 0);
    });
    assert!(matches!(error, QueueError::TooLong { head: 0, limit: 8 }), "{error}");
}

#[test]
fn a_loop_in_an_indirect_table_is_refused() {
    let error = error_after(|driver, memory| {
        driver.descriptor(0, DATA, 32, INDIRECT, 0);
        write_descriptor(memory, DATA, DATA, 16, NEXT, 1);
        write_descriptor(memory, DATA + 16, DATA, 16, NEXT, 0);
    });
    assert!(matches!(error, QueueError::TooLong { .. }), "{error}");
}

#[test]
fn indices_outside_their_table_are_refused() {
    let head = error_after(|driver, _| driver.available_entry(0, 8));
    assert!(matches!(head, QueueError::Index { index: 8, size: 8 }), "{head}");
    let next = error_after(|driver, _| driver.descriptor(0, DATA, 16, NEXT, 9));
    assert!(matches!(next, QueueError::Index { index: 9, size: 8 }), "{next}");
    let indirect = error_after(|driver, memory| {
        driver.descriptor(0, DATA, 16, INDIRECT, 0);
        write_descriptor(memory, DATA, DATA, 16, NEXT, 1);
    });
    assert!(matches!(indirect, QueueError::Index { index: 1, size: 1 }), "{indirect}");
}

#[test]
fn an_indirect_table_that_is_none_is_refused() {
    for (length, flags) in [(0, 0), (17, 0), (16 * 1025, 0), (16 * 65536, 0), (16, NEXT)] {
        let error = error_after(|driver, _| driver.descriptor(0, DATA, length, INDIRECT | flags, 1));
        assert!(matches!(error, QueueError::Indirect { .. }), "{length}: {error}");
    }
    let nested = error_after(|driver, memory| {
        driver.descriptor(0, DATA, 16, INDIRECT, 0);
        write_descriptor(memory, DATA, DATA, 16, INDIRECT, 0);
    });
    assert!(matches!(nested, QueueError::Indirect { .. }), "{nested}");
    let outside = error_after(|driver, _| driver.descriptor(0, SIZE as u64 - 16, 32, INDIRECT, 0));
    assert!(matches!(outside, QueueError::BufferOutside { .. }), "{outside}");
}

#[test]
fn buffers_outside_guest_memory_are_refused() {
    for (address, length) in
        [(SIZE as u64, 1), (SIZE as u64 - 8, 9), (u64::MAX, 1), (u64::MAX - 7, 16), (0, u32::MAX)]
    {
        let error = error_after(|driver, _| driver.descriptor(0, address, length, WRITE, 0));
        assert!(matches!(error, QueueError::BufferOutside { .. }), "{address:#x} {length}: {error}");
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_is_refused() {
    let error = error_after(|driver, _| {
        driver.descriptor(0, DATA, 16, WRITE | NEXT, 1);
        driver.descriptor(1, DATA, 16, 0, 0);
    });
    assert!(matches!(error, QueueError::Order(0)), "{error}");
}

#[test]
fn a_total_of_4_gib_is_refused() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 30)]).unwrap();
    let driver = DriverQueue::new(&memory, BASE, 8, false);
    let mut device = driver.device_side(0);
    for index in 0..8 {
        driver.descriptor(index, 0, 1 << 30, NEXT, index + 1);
    }
    driver.available_index(1);
    let error = device.pop().expect_err("too large");
    assert!(matches!(error, QueueError::TooLarge(0)), "{error}");
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    let (driver, mut device, _) = pair(8, false);
    driver.available_index(9);
    assert!(matches!(device.pop(), Err(QueueError::AvailableJump { from: 0, to: 9, size: 8 })));
    let (driver, mut device, _) = pair(8, false);
    driver.available_index(u16::MAX);
    assert!(matches!(device.pop(), Err(QueueError::AvailableJump { .. })));
}

#[test]
fn a_head_is_refused_while_it_is_in_flight_and_taken_again_afterwards() {
    let (driver, mut device, _) = pair(8, false);
    driver.descriptor(5, DATA, 16, 0, 0);
    driver.available_entry(0, 5);
    driver.available_entry(1, 5);
    driver.available_index(2);
    let chain = device.pop().unwrap().unwrap();
    assert!(matches!(device.pop(), Err(QueueError::InFlight(5))));
    device.add_used(chain, 0).unwrap();
    assert_eq!(device.pop().unwrap().unwrap().head(), 5);
}

#[test]
fn a_buffer_over_the_border_of_two_regions_is_whole() {
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)]).unwrap();
    let mut driver = DriverQueue::new(&memory, BASE, 8, false);
    let mut device = driver.device_side(0);
    driver.post(&[Buffer::Writable(0x10000 - 3, 8)]).unwrap();
    let chain = device.pop().unwrap().unwrap();
    let mut writer = chain.writer(&memory);
    writer.write(b"abcdefgh").unwrap();
    assert!(writer.write(b"i").is_err());
    driver.post(&[Buffer::Readable(0x10000 - 3, 8)]).unwrap();
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(&chain.reader(&memory).read_array::<8>().unwrap(), b"abcdefgh");
}

#[test]
fn used_entries_are_seen_all_at_once() {
    let (mut driver, mut device, _) = pair(8, false);
    for _ in 0..3 {
        driver.post(&[Buffer::Writable(DATA, 4)]).unwrap();
    }
    for _ in 0..3 {
        let chain = device.pop().unwrap().unwrap();
        device.add_used(chain, 4).unwrap();
        assert_eq!(driver.take_used(), None);
    }
    assert!(device.publish().unwrap());
    assert_eq!((0..3).filter_map(|_| driver.take_used()).count(), 3);
}

fn post(driver: &mut DriverQueue, table: u64, id: u64, buffers: usize, indirect: bool) -> Option<u16> {
    let buffers: Vec<_> = (0..buffers as u64)
        .map(|i| if i == 0 { Buffer::Readable(DATA, 1 + id as u32) } else { Buffer::Writable(DATA, 8) })
        .collect();
    if indirect { driver.post_indirect(table, &buffers) } else { driver.post(&buffers) }
}

#[derive(Debug, Clone)]
enum Step {
    Post { buffers: usize, indirect: bool },
    Pop,
    GiveBack { which: usize },
    Publish,
    TakeUsed,
    Sleep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1usize..5, any::<bool>()).prop_map(|(buffers, indirect)| Step::Post { buffers, indirect }),
        4 => Just(Step::Pop),
        4 => any::<usize>().prop_map(|which| Step::GiveBack { which }),
        2 => Just(Step::Publish),
        3 => Just(Step::TakeUsed),
        1 => Just(Step::Sleep),
    ];
    proptest::collection::vec(step, 1..400)
}

proptest! {
    /// Whatever both sides do in whatever order: the device sees the chains in the order of posting, the driver gets each
    /// back once, in the order of giving back, with the length written; nothing is lost and nobody sleeps over work.
    #[test]
    fn no_chain_is_lost_or_doubled_and_no_wake_up_is_lost(
        steps in steps(), order in 0u32..7, event_idx in any::<bool>(), turns in 0usize..3,
    ) {
        let size = 1u16 << order;
        let (mut driver, mut device, memory) = pair(size, event_idx);
        let mut posted: Vec<(u16, u64)> = vec![];
        let mut held: Vec<Chain> = vec![];
        let mut given: Vec<(u16, u32)> = vec![];
        let (mut popped, mut published, mut taken, mut id) = (0, 0, 0, 0u64);
        let mut marks: BTreeMap<u16, u64> = BTreeMap::new();
        // The device sleeps when it waits for a kick, the driver when it waits for an interrupt.
        let (mut device_sleeps, mut driver_sleeps) = (false, false);
        for step in steps.iter().cycle().take(steps.len() * (turns * turns * 40 + 1)) {
            match step {
                Step::Post { buffers, indirect } => {
                    id += 1;
                    // A table is the device's until its chain came back: at most 64 are out.
                    let table = DATA + 0x10000 + posted.len() as u64 % 256 * 256;
                    if let Some(head) = post(&mut driver, table, id % 1000, *buffers, *indirect) {
                        posted.push((head, id % 1000));
                        if driver.wants_kick() {
                            device_sleeps = false;
                        }
                    }
                }
                Step::Pop => {
                    if let Some(chain) = device.pop().unwrap() {
                        prop_assert_eq!(chain.head(), posted[popped].0);
                        prop_assert_eq!(u64::from(chain.readable_length()), posted[popped].1 + 1);
                        let mut all = vec![0; chain.readable_length() as usize];
                        chain.reader(&memory).read(&mut all).unwrap();
                        marks.insert(chain.head(), posted[popped].1);
                        popped += 1;
                        held.push(chain);
                    } else {
                        prop_assert_eq!(popped, posted.len());
                    }
                }
                Step::GiveBack { which } => {
                    if !held.is_empty() {
                        let chain = held.swap_remove(which % held.len());
                        let written = *which as u32 % 1000;
                        given.push((chain.head(), written));
                        device.add_used(chain, written).unwrap();
                    }
                }
                Step::Publish => {
                    if device.publish().unwrap() {
                        driver_sleeps = false;
                    }
                    published = given.len();
                }
                Step::TakeUsed => match driver.take_used() {
                    Some(used) => {
                        prop_assert!(taken < published, "seen before it was published");
                        prop_assert_eq!(used, given[taken]);
                        taken += 1;
                    }
                    None => prop_assert_eq!(taken, published),
                },
                Step::Sleep => {
                    device_sleeps = !device.enable_kicks().unwrap();
                    driver_sleeps = !driver.want_interrupt();
                }
            }
            prop_assert!(!(device_sleeps && popped < posted.len()), "the device sleeps over a chain");
            prop_assert!(!(driver_sleeps && taken < published), "the driver sleeps over a used chain");
            prop_assert_eq!(usize::from(device.in_flight()), held.len());
            prop_assert_eq!(driver.outstanding(), posted.len() - taken);
        }
    }

    /// Heads in any order, given back in any order: the device has each at most once, and says which was offered twice.
    #[test]
    fn a_head_in_flight_is_never_taken_again(
        heads in proptest::collection::vec(0u16..8, 1..60), given_back in proptest::collection::vec(any::<bool>(), 60),
    ) {
        let (driver, mut device, _memory) = pair(8, true);
        for index in 0..8 {
            driver.descriptor(index, DATA + 64 * u64::from(index), 16, WRITE, 0);
        }
        let mut held: Vec<Chain> = vec![];
        for (n, head) in heads.iter().enumerate() {
            driver.available_entry(n as u16, *head);
            driver.available_index(n as u16 + 1);
            let is_held = held.iter().any(|chain| chain.head() == *head);
            match device.pop() {
                Ok(Some(chain)) => {
                    prop_assert_eq!((chain.head(), is_held), (*head, false));
                    held.push(chain);
                }
                Err(QueueError::InFlight(refused)) => {
                    prop_assert_eq!((refused, is_held), (*head, true));
                    break;
                }
                other => prop_assert!(false, "{:?}", other),
            }
            if given_back[n] {
                let chain = held.swap_remove(n % held.len());
                device.add_used(chain, 0).unwrap();
            }
        }
    }

    /// Random bytes as rings: an error or a chain inside memory, never a panic, never without end.
    #[test]
    fn random_rings_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 16 * 8 + 32),
        index in any::<u16>(), flags in proptest::collection::vec(0u16..8, 8),
    ) {
        use vm_memory::Bytes;
        let (driver, mut device, memory) = pair(8, true);
        memory.write_slice(&bytes, GuestAddress(BASE)).unwrap();
        for (i, flags) in flags.iter().enumerate() {
            let half = u32::from(bytes[i]);
            driver.descriptor(i as u16, DATA + u64::from(half), 16 * half, *flags, u16::from(bytes[i + 8] % 9));
        }
        driver.available_index(index % 10);
        while let Ok(Some(chain)) = device.pop() {
            let (mut read, mut write) = (chain.reader(&memory), chain.writer(&memory));
            while let Some(piece) = read.next_slice(usize::MAX).unwrap() { prop_assert!(!piece.is_empty()); }
            while let Some(piece) = write.next_slice(7).unwrap() { prop_assert!(piece.len() <= 7); }
            prop_assert_eq!(read.left() + write.left(), 0);
        }
    }

    /// A chain's content is the same however it is cut into buffers and however it is read.
    #[test]
    fn a_readers_pieces_are_the_bytes_in_order(
        lengths in proptest::collection::vec(1u32..300, 1..6), cut in 0usize..1800, limit in 1usize..400,
    ) {
        let (mut driver, mut device, memory) = pair(8, false);
        let total: u32 = lengths.iter().sum();
        let content: Vec<u8> = (0..total).map(|i| i as u8).collect();
        let (mut at, mut done, mut buffers) = (DATA, 0, vec![]);
        for length in &lengths {
            use vm_memory::Bytes;
            memory.write_slice(&content[done..done + *length as usize], GuestAddress(at)).unwrap();
            buffers.push(Buffer::Readable(at, *length));
            done += *length as usize;
            at += u64::from(*length) + 5;
        }
        driver.post(&buffers).unwrap();
        let chain = device.pop().unwrap().unwrap();
        let mut rest = chain.reader(&memory);
        let cut = cut.min(content.len());
        let mut front = rest.split(cut).unwrap();
        prop_assert!(front.split(cut + 1).is_err());
        let mut seen = vec![];
        for reader in [&mut front, &mut rest] {
            while let Some(piece) = reader.next_slice(limit).unwrap() {
                let mut bytes = vec![0; piece.len()];
                piece.copy_to(&mut bytes);
                seen.extend(bytes);
            }
        }
        prop_assert_eq!(seen, content);
    }
}

#[test]
fn chains_and_interrupts_pass_between_two_threads_without_a_lost_wake_up() {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::Duration;

    const CHAINS: u32 = 20_000;
    let wait = |bell: &Receiver<()>| bell.recv_timeout(Duration::from_secs(20)).expect("a wake-up was lost");
    let ring = |bell: &SyncSender<()>| _ = bell.try_send(());
    for event_idx in [false, true] {
        let (mut driver, mut device, _memory) = pair(16, event_idx);
        // A bell that rings is remembered once, like an eventfd.
        let (kick, kicked) = sync_channel(1);
        let (interrupt, interrupted) = sync_channel(1);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut served = 0;
                while served < CHAINS {
                    while let Some(chain) = device.pop().unwrap() {
                        served += 1;
                        device.add_used(chain, served).unwrap();
                        if device.publish().unwrap() {
                            ring(&interrupt);
                        }
                    }
                    if served < CHAINS && !device.enable_kicks().unwrap() {
                        wait(&kicked);
                    }
                }
            });
            let (mut posted, mut seen) = (0, 0);
            while seen < CHAINS {
                while posted < CHAINS && driver.post(&[Buffer::Writable(DATA, 4)]).is_some() {
                    posted += 1;
                }
                if driver.wants_kick() {
                    ring(&kick);
                }
                let before = seen;
                while let Some((_, written)) = driver.take_used() {
                    seen += 1;
                    assert_eq!(written, seen);
                }
                if seen == before && seen < CHAINS && !driver.want_interrupt() {
                    wait(&interrupted);
                }
            }
        });
    }
}
