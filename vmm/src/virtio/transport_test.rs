//! Tests of the PCI transport, driven as a vCPU does it: by configuration space and BAR.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::device::{Device, DeviceKind, GuestMemory, Interrupt};
use super::guest_driver::guest_memory;
use super::rng::Rng;
use super::transport::{BAR_SIZE, Transport, first_bar};
use crate::interrupt::Routes;
use crate::mailbox::{Mailbox, Message};
use crate::pci::Function;
use crate::snapshot::codec::{Invalid, Reader, Writer};

const STATUS: u64 = 0x14;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const DRIVER_OK: u64 = 4;
const NEEDS_RESET: u64 = 64;

struct Bench {
    transport: Transport,
    mailbox: Arc<Mailbox>,
    routes: Arc<Routes>,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        let (mailbox, routes) = (Arc::new(Mailbox::new().unwrap()), Arc::new(Routes::for_test()));
        let (memory, device) = (guest_memory(1 << 20), Rng::new().unwrap());
        let transport =
            Transport::new(5, &device, &memory, first_bar(0), routes.clone(), mailbox.clone(), None);
        transport.config_write(4, &[6, 0]);
        Self { transport, mailbox, routes, memory }
    }

    fn read(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.transport.bar_read(offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, length: usize, value: u64) {
        self.transport.bar_write(offset, &value.to_le_bytes()[..length]);
    }

    fn negotiate(&self, features: u64) {
        self.write(STATUS, 1, 1);
        self.write(STATUS, 1, 3);
        for half in 0..2 {
            self.write(0x08, 4, half);
            self.write(0x0C, 4, features >> (32 * half) & 0xFFFF_FFFF);
        }
        self.write(STATUS, 1, 11);
    }

    fn queue(&self, descriptors: u64) {
        self.write(0x16, 2, 0);
        self.write(0x18, 2, 16);
        self.write(0x1A, 2, 1);
        self.write(0x20, 8, descriptors);
        // As two halves, as Linux writes them.
        self.write(0x28, 4, 0x2000);
        self.write(0x2C, 4, 0);
        self.write(0x30, 8, 0x3000);
        self.write(0x1C, 2, 1);
    }

    fn start(&self) {
        self.negotiate(1 << 32);
        self.queue(0x1000);
        self.write(STATUS, 1, 15);
    }
}

#[test]
fn a_driver_negotiates_and_the_device_gets_its_queue() {
    let bench = Bench::new();
    assert_eq!(bench.transport.kind(), DeviceKind::Rng);
    bench.write(0x00, 4, 1);
    assert_eq!((bench.read(0x04, 4), bench.read(0x12, 2)), (1, 1));
    bench.start();
    assert_eq!(bench.read(STATUS, 1), 15);
    assert_eq!(bench.mailbox.take(), [Message::Activate(5)]);
    let ready = bench.transport.take_ready().unwrap();
    assert_eq!((ready.features, ready.queues[0].size(), ready.kicks.len()), (1 << 32, 16, 1));
    assert!(bench.transport.take_ready().is_none());
}

#[test]
fn features_that_were_not_offered_or_an_old_driver_are_refused() {
    for features in [0, 1 << 32 | 1 << 40, 1 << 28] {
        let bench = Bench::new();
        bench.negotiate(features);
        assert_eq!(bench.read(STATUS, 1), 3);
        bench.write(STATUS, 1, 15);
        assert_eq!(bench.read(STATUS, 1) & DRIVER_OK, 0);
        assert!(bench.mailbox.take().is_empty());
    }
}

#[test]
fn an_enabled_queue_cannot_be_changed() {
    let bench = Bench::new();
    bench.start();
    let before = [0x18, 0x20, 0x28, 0x30].map(|at| bench.read(at, 8));
    bench.write(0x18, 2, 8);
    bench.write(0x1C, 2, 0);
    for at in [0x20, 0x24, 0x28, 0x2C, 0x30, 0x34] {
        bench.write(at, 4, 0xFFFF_FFF0);
    }
    bench.write(0x0C, 4, 0);
    assert_eq!([0x18, 0x20, 0x28, 0x30].map(|at| bench.read(at, 8)), before);
}

#[test]
fn sizes_that_are_none_are_not_taken() {
    let bench = Bench::new();
    bench.negotiate(1 << 32);
    let largest = Rng::new().unwrap().queue_sizes()[0];
    for size in [0, 3, u64::from(largest) * 2, 0xFFFF] {
        bench.write(0x18, 2, size);
        assert_eq!(bench.read(0x18, 2), u64::from(largest));
    }
}

#[test]
fn a_queue_outside_memory_asks_for_a_reset_and_starts_nothing() {
    let bench = Bench::new();
    bench.negotiate(1 << 32);
    bench.queue(0xFFFF_FFFF_FFFF_FFF0);
    bench.write(STATUS, 1, 15);
    assert_eq!(bench.read(STATUS, 1) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(bench.transport.failures(), 1);
    assert!(bench.mailbox.take().is_empty() && bench.transport.take_ready().is_none());
    bench.write(STATUS, 1, 0);
    assert_eq!(bench.read(STATUS, 1), 0);
}

#[test]
fn a_reset_is_over_when_the_device_has_stopped() {
    let bench = Bench::new();
    bench.start();
    bench.transport.take_ready().unwrap();
    bench.write(STATUS, 1, 0);
    assert_eq!(bench.mailbox.take(), [Message::Activate(5), Message::Reset(5)]);
    // In flight: the status is not 0, and nothing can be changed.
    assert_ne!(bench.read(STATUS, 1), 0);
    bench.write(STATUS, 1, 0);
    bench.start();
    assert!(bench.mailbox.take().is_empty());
    bench.transport.confirm_reset();
    assert_eq!((bench.read(STATUS, 1), bench.read(0x1C, 2)), (0, 0));
    bench.start();
    assert_eq!(bench.mailbox.take(), [Message::Activate(5)]);
}

#[test]
fn a_reset_before_the_device_was_activated_activates_nothing() {
    let bench = Bench::new();
    bench.start();
    bench.write(STATUS, 1, 0);
    assert!(bench.transport.take_ready().is_none());
    bench.transport.confirm_reset();
    assert_eq!(bench.read(STATUS, 1), 0);
}

#[test]
fn a_notification_that_comes_before_the_device_is_not_lost() {
    let bench = Bench::new();
    bench.start();
    bench.write(NOTIFY, 2, 0);
    let ready = bench.transport.take_ready().unwrap();
    let mut poll = libc::pollfd { fd: ready.kicks[0].1, events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 1);
}

#[test]
fn used_buffers_raise_the_vector_of_their_queue() {
    let bench = Bench::new();
    bench.start();
    bench.write(TABLE + 16, 8, 0xFEE0_1000);
    bench.write(TABLE + 24, 8, 0x41);
    bench.transport.used(0);
    // Without MSI-X the interrupt status tells, once.
    assert_eq!((bench.read(0x1000, 1), bench.read(0x1000, 1)), (1, 0));
    let mut capability = [0];
    bench.transport.config_read(0x34, &mut capability);
    bench.transport.config_write(u16::from(capability[0]) + 2, &[0, 0x80]);
    bench.transport.used(0);
    bench.transport.used(7);
    assert_eq!(bench.routes.sent(), [(0xFEE0_1000, 0x41)]);
}

#[test]
fn the_bar_is_decoded_where_the_driver_puts_it() {
    let bench = Bench::new();
    let at = first_bar(0);
    assert_eq!(bench.transport.decodes(at + 8, 4), Some(8));
    assert_eq!(bench.transport.decodes(at + BAR_SIZE - 2, 4), None);
    bench.transport.config_write(0x10, &0xD100_0000u32.to_le_bytes());
    assert_eq!((bench.transport.decodes(at, 4), bench.transport.decodes(0xD100_0000, 4)), (None, Some(0)));
    bench.transport.config_write(4, &[0, 0]);
    assert_eq!(bench.transport.decodes(0xD100_0000, 4), None);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let bench = Bench::new();
    let mut at = [0];
    bench.transport.config_read(0x34, &mut at);
    loop {
        let mut head = [0; 4];
        bench.transport.config_read(at[0].into(), &mut head);
        if head[0] == 9 && head[3] == 5 {
            break;
        }
        assert_ne!(head[1], 0, "the capability is there");
        at = [head[1]];
    }
    let window = u16::from(at[0]);
    bench.transport.config_write(window + 8, &0x12u32.to_le_bytes());
    bench.transport.config_write(window + 12, &2u32.to_le_bytes());
    let mut queues = [0; 2];
    bench.transport.config_read(window + 16, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 1);
    bench.transport.config_write(window + 8, &0x14u32.to_le_bytes());
    bench.transport.config_write(window + 12, &1u32.to_le_bytes());
    bench.transport.config_write(window + 16, &[1]);
    assert_eq!(bench.read(STATUS, 1), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Bar(u64, usize, u64),
    Config(u16, usize, u32),
    Register(usize, u64),
    IoThread,
    Interrupt(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let length = prop::sample::select(vec![1usize, 2, 4, 8]);
    prop_oneof![
        (0..BAR_SIZE, length, any::<u64>()).prop_map(|(at, length, value)| Step::Bar(at, length, value)),
        (0u16..256, prop::sample::select(vec![1usize, 2, 4]), any::<u32>())
            .prop_map(|(at, length, value)| Step::Config(at, length, value)),
        (0usize..13, prop_oneof![0u64..20, any::<u64>()])
            .prop_map(|(which, value)| Step::Register(which, value)),
        Just(Step::IoThread),
        (0u16..3).prop_map(Step::Interrupt),
    ]
}

const REGISTERS: [(u64, usize); 13] = [
    (0x00, 4),
    (0x08, 4),
    (0x0C, 4),
    (0x10, 2),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1A, 2),
    (0x1C, 2),
    (0x20, 8),
    (0x28, 8),
    (0x30, 8),
    (NOTIFY, 2),
];

proptest! {
    /// Whatever order registers are touched in: no panic, activation and reset alternate, and a queue that the device gets
    /// lies in memory.
    #[test]
    fn any_order_of_accesses_keeps_the_rules(steps in prop::collection::vec(step(), 1..200)) {
        let bench = Bench::new();
        let mut active = false;
        for step in steps {
            match step {
                Step::Bar(at, length, value) => {
                    if at + length as u64 <= BAR_SIZE {
                        bench.write(at, length, value);
                        bench.read(at, length);
                    }
                }
                Step::Config(at, length, value) => {
                    bench.transport.config_write(at, &value.to_le_bytes()[..length]);
                    bench.transport.config_read(at, &mut [0; 4][..length]);
                }
                Step::Register(which, value) => bench.write(REGISTERS[which].0, REGISTERS[which].1, value),
                Step::Interrupt(queue) => bench.transport.used(queue),
                Step::IoThread => for message in bench.mailbox.take() {
                    match message {
                        Message::Activate(5) => if let Some(ready) = bench.transport.take_ready() {
                            prop_assert!(!active);
                            active = true;
                            for queue in ready.queues.iter().filter(|q| q.is_enabled()) {
                                prop_assert!(queue.size().is_power_of_two());
                            }
                        },
                        Message::Reset(5) => {
                            active = false;
                            bench.transport.confirm_reset();
                        }
                        other => prop_assert!(false, "{other:?}"),
                    }
                },
            }
        }
        prop_assert_eq!(bench.memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }
}

/// Saves `bench` and restores it into a fresh one over the same memory, after `change` was made to the bytes.
fn restored(bench: &Bench, change: impl FnOnce(&mut Vec<u8>)) -> Result<Bench, Invalid> {
    let mut state = Writer::new();
    bench.transport.save(&mut state);
    let mut bytes = state.into_bytes();
    change(&mut bytes);
    let mut copy = Bench::new();
    let device = Rng::new().unwrap();
    let (routes, mailbox) = (copy.routes.clone(), copy.mailbox.clone());
    copy.transport = Transport::new(5, &device, &bench.memory, first_bar(0), routes, mailbox, None);
    copy.memory = bench.memory.clone();
    let mut reader = Reader::new(&bytes);
    copy.transport.restore(&mut reader)?;
    reader.end()?;
    Ok(copy)
}

#[test]
fn a_restored_device_goes_on_behind_the_last_used_chain_and_its_driver_is_woken() {
    let bench = Bench::new();
    bench.start();
    drop(bench.transport.take_ready().unwrap());
    bench.write(TABLE + 16, 8, 0xFEE0_0000);
    bench.write(TABLE + 24, 8, 0x41);
    bench.transport.config_write(0x42, &[0, 0x80]);
    // 700 chains were given back and two more are there.
    bench.memory.write_obj(700u16, GuestAddress(0x3002)).unwrap();
    bench.memory.write_obj(702u16, GuestAddress(0x2002)).unwrap();
    bench.memory.write_obj(1u16, GuestAddress(0x2004 + 2 * (701 % 16))).unwrap();
    let copy = restored(&bench, |_| {}).unwrap();
    assert_eq!(copy.mailbox.take(), [Message::Activate(5)]);
    let mut ready = copy.transport.take_ready().unwrap();
    assert!(ready.queues[0].pop().unwrap().is_some());
    assert!(ready.queues[0].pop().unwrap().is_some());
    assert!(ready.queues[0].pop().unwrap().is_none());
    assert_eq!(
        [0x18, 0x20, 0x28, 0x30].map(|at| copy.read(at, 8)),
        [0x18, 0x20, 0x28, 0x30].map(|at| bench.read(at, 8))
    );
    copy.transport.wake_driver();
    assert_eq!(copy.routes.sent(), [(0xFEE0_0000, 0x41)]);
}

#[test]
fn a_device_that_waits_for_its_reset_does_so_after_a_restore() {
    let bench = Bench::new();
    bench.start();
    bench.transport.needs_reset();
    let copy = restored(&bench, |_| {}).unwrap();
    assert!(!copy.transport.take_ready().unwrap().queues[0].is_enabled());
    assert_eq!(copy.read(STATUS, 1) & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn what_does_not_fit_the_device_is_refused_with_the_reason() {
    let bench = Bench::new();
    bench.start();
    // Kind, vendor, MSI-X count, features, size and place of the queue.
    let (msix, registers) = (2 + 256, 2 + 256 + 2 + 2 * 17);
    for (at, value, reason) in [
        (0, 2, "virtio device 2, here is a Rng"),
        (2, 0, "PCI register 0x0 is that of another device"),
        (msix, 9, "9 MSI-X vectors, this device has 2"),
        (registers, 7, "active: 0x7"),
        (registers + 1, 16, "status: 0x10"),
        (registers + 1, 1, "status of an active device: 0x1"),
        (registers + 17, 1, "features 0x10000000000"),
        (registers + 20, 3, "vector: 0xff03"),
        (registers + 24, 2, "2 queues, this device has 1"),
        (registers + 26, 3, "queue size: 0x3"),
        (registers + 31, 1, "queue 0: descriptor table at 0x1001 is not aligned"),
        (registers + 35, 1, "queue 0: descriptor table of 256 bytes at 0x100001000 is not inside"),
    ] {
        let error =
            restored(&bench, |bytes| bytes[at] = value).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(reason), "{at}: {error}");
    }
}

proptest! {
    #[test]
    fn no_state_panics(bytes: Vec<u8>, at in any::<prop::sample::Index>(), value: u8) {
        let bench = Bench::new();
        bench.start();
        drop(bench.transport.restore(&mut Reader::new(&bytes)));
        if let Ok(copy) = restored(&bench, |bytes| *at.get_mut(bytes) = value) {
            copy.transport.wake_driver();
            copy.transport.bar_write(NOTIFY, &[0; 4]);
            if let Some(mut ready) = copy.transport.take_ready() {
                let _ = ready.queues[0].pop();
            }
        }
    }
}
