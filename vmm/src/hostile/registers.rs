//! What a guest can do to the registers of a whole bus: PCI configuration space by memory and by ports, BARs, MSI-X, I/O APIC,
//! at any address and size, while the I/O thread does what the registers ask for.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use blixard_vmm_api::config::BalloonConfig;
use blixard_vmm_api::rate::RateLimit;

use super::Input;
use crate::bus::Bus;
use crate::devices::ioapic::{IoApic, Signal};
use crate::devices::serial::Serial;
use crate::interrupt::Routes;
use crate::layout::{BOOT_TIMER, ECAM, IOAPIC, PCI_WINDOW, SERIAL_PORT};
use crate::mailbox::{Mailbox, Message};
use crate::memory::memfd;
use crate::pci::{Function, PORTS, Root};
use crate::snapshot::codec::{Reader, Writer};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::block_engine::Engine;
use crate::virtio::device::{Activation, Device, GuestMemory, Interrupt, Watch};
use crate::virtio::guest_driver::{EventLoop, guest_memory};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{BAR_SIZE, Transport, first_bar};

/// Most steps of one run.
const STEPS: usize = 300;
/// Bytes of configuration space that one function has by ECAM.
const FUNCTION: u64 = 4096;
const DEVICES: usize = 3;
/// What a guest cannot write: identity and class.
const IDENTITY: [u64; 2] = [0, 8];
const MEMORY: usize = 1 << 20;

/// Interrupts that go nowhere.
pub(super) struct Nowhere;

impl Signal for Nowhere {
    fn signal(&self, _: u64, _: u32) {}
}

fn devices(memory: &GuestMemory) -> [Box<dyn Device>; DEVICES] {
    let disk = memfd(c"disk", 0).unwrap();
    disk.set_len(64 << 10).unwrap();
    let limit = RateLimit::default();
    let config = BalloonConfig {
        target_mib: 0,
        deflate_on_oom: true,
        statistics_s: 1,
        free_page_reporting: true,
        free_page_hinting: true,
    };
    [
        Box::new(Block::with_engine("fuzz", disk.into(), false, &limit, Engine::plain).unwrap()),
        Box::new(Balloon::new(&config, memory).unwrap()),
        Box::new(Rng::new().unwrap()),
    ]
}

/// A device and its registers, as the I/O thread has them.
struct Slot {
    device: Box<dyn Device>,
    transport: Arc<Transport>,
    active: bool,
    kicks: Vec<(u16, RawFd)>,
    events: EventLoop,
}

struct Machine {
    memory: GuestMemory,
    bus: Bus,
    slots: Vec<Slot>,
}

impl Machine {
    fn new() -> Self {
        let memory = guest_memory(MEMORY);
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let slot = |(index, device): (usize, Box<dyn Device>)| {
            let (routes, bar) = (Arc::new(Routes::for_test()), first_bar(index));
            let transport = Transport::new(index, &*device, &memory, bar, routes, mailbox.clone(), None);
            let (transport, events) = (Arc::new(transport), EventLoop::new());
            Slot { device, transport, active: false, kicks: vec![], events }
        };
        let slots: Vec<Slot> = devices(&memory).into_iter().enumerate().map(slot).collect();
        let functions = slots.iter().map(|slot| slot.transport.clone() as Arc<dyn Function>);
        let pci = Arc::new(Root::new(functions.collect()));
        let ioapic = Arc::new(IoApic::new(Arc::new(Nowhere)));
        let serial = Arc::new(Serial::new(ioapic.clone(), mailbox.clone(), Arc::default()));
        let bus = Bus { serial, ioapic, pci, times: Arc::default(), mailbox, boot_timer: true };
        Self { memory, bus, slots }
    }

    /// A turn of the I/O thread: messages, then kicks and other events.
    fn turn(&mut self) {
        for message in self.bus.mailbox.take() {
            match message {
                Message::Activate(index) => self.activate(index),
                Message::Reset(index) => self.reset(index),
                Message::Serial => self.bus.serial.take_output(&mut vec![]),
                Message::Progress | Message::Exit(_) => {}
            }
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.active) {
            for (queue, _) in &slot.kicks {
                slot.device.on_kick(*queue, &mut slot.events);
            }
            slot.events.turn(&mut *slot.device, Duration::ZERO);
        }
    }

    fn activate(&mut self, index: usize) {
        let Slot { device, transport, active, kicks, events } = &mut self.slots[index];
        let Some(ready) = transport.take_ready() else { return };
        *kicks = ready.kicks;
        for (_, fd) in kicks.iter() {
            events.add(*fd, 0, 1 << 32).unwrap();
        }
        *active = true;
        let activation = Activation {
            memory: self.memory.clone(),
            features: ready.features,
            queues: ready.queues,
            interrupt: transport.clone(),
        };
        device.activate(activation, events);
    }

    fn reset(&mut self, index: usize) {
        let Slot { device, transport, active, kicks, events } = &mut self.slots[index];
        if std::mem::take(active) {
            device.deactivate(events);
        }
        let known: Vec<RawFd> = kicks.drain(..).map(|(_, fd)| fd).collect();
        assert_eq!(transport.kicks(), known, "notification events are those that were handed out");
        known.into_iter().for_each(|fd| events.remove(fd));
        assert_eq!(events.watched(), 0, "a device that was reset watches something");
        transport.confirm_reset();
    }

    fn read(&self, address: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.memory_read(address, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    fn write(&self, address: u64, length: usize, value: u64) {
        self.bus.memory_write(address, &value.to_le_bytes()[..length]);
    }

    /// What a driver does until its device runs, with all queues that `mask` has a bit of.
    fn start(&self, bar: u64, features: u64, mask: u8) {
        let write = |at: u64, length, value| self.write(bar + at, length, value);
        write(0x14, 1, 0);
        write(0x14, 1, 3);
        for half in 0..2 {
            write(0x08, 4, half);
            write(0x0C, 4, (features | 1 << 32) >> (32 * half) & 0xFFFF_FFFF);
        }
        write(0x14, 1, 11);
        for queue in (0u64..8).filter(|queue| mask >> queue & 1 == 1) {
            write(0x16, 2, queue);
            write(0x18, 2, 16);
            write(0x1A, 2, queue);
            for (at, offset) in [(0x20, 0x0), (0x28, 0x400), (0x30, 0x800)] {
                write(at, 8, 0x1_0000 + queue * 0x1000 + offset);
            }
            write(0x1C, 2, 1);
        }
        write(0x14, 1, 15);
    }

    fn function(index: u64) -> u64 {
        ECAM.start + (index + 1) * 8 * FUNCTION
    }

    /// Where the guest has put the BAR of a device.
    fn bar(&self, index: u64) -> u64 {
        let low = self.read(Self::function(index) + 0x10, 4);
        (low | self.read(Self::function(index) + 0x14, 4) << 32) & !(BAR_SIZE - 1)
    }

    fn identities(&self) -> Vec<u64> {
        let places = (0..DEVICES as u64).flat_map(|index| IDENTITY.map(|at| Self::function(index) + at));
        places.map(|at| self.read(at, 4)).collect()
    }
}

/// An address that means something, or any.
fn address(machine: &Machine, input: &mut Input<'_>, kind: u8) -> u64 {
    let index = u64::from(kind >> 3) % DEVICES as u64;
    let (small, part) = (u64::from(input.byte()), u64::from(input.byte()));
    match kind & 7 {
        0 => Machine::function(index) + small,
        1 => ECAM.start + (part << 8 | small) * 16,
        // Registers, notification, MSI-X table and pending bits of the BAR.
        2 | 3 => machine.bar(index).saturating_add((part & 7) << 12 | small & 0x3F),
        4 => machine.bar(index).saturating_add(part << 8 | small),
        5 => IOAPIC.start + (small & 0x13),
        6 => [BOOT_TIMER, PCI_WINDOW, ECAM, IOAPIC][usize::from(kind >> 3 & 3)].end() - (small & 7),
        _ => input.long(),
    }
}

/// All registers of the bus.
pub(super) fn pci(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new();
    let identities = machine.identities();
    for index in 0..DEVICES as u64 {
        // Memory decoding and bus mastering.
        machine.write(Machine::function(index) + 4, 2, 6);
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let (step, kind) = (input.byte(), input.byte());
        let length = [1, 2, 4, 8, 4, 2, 1, 3][usize::from(step >> 4 & 7)];
        match step & 15 {
            0..=4 => {
                let address = address(&machine, &mut input, kind);
                let value = if step & 0x80 == 0 { input.byte().into() } else { input.long() };
                machine.write(address, length, value);
            }
            5 | 6 => {
                let address = address(&machine, &mut input, kind);
                let value = machine.read(address, length);
                assert!(length == 8 || value >> (8 * length) == 0);
            }
            7 => {
                let port = PORTS + u16::from(kind & 7);
                let value = input.word().to_le_bytes();
                drop(machine.bus.port_write(port, &value[..length.min(4)]));
                let mut read = [0; 4];
                machine.bus.port_read(port, &mut read[..length.min(4)]);
            }
            8 => {
                // A device by the address port.
                let address = 0x8000_0000 | u32::from(kind) << 11 | u32::from(input.byte() & 0xFC);
                drop(machine.bus.port_write(PORTS, &address.to_le_bytes()));
                let value = input.word().to_le_bytes();
                drop(machine.bus.port_write(PORTS + 4 + u16::from(step >> 7), &value[..length.min(4)]));
            }
            9 => {
                let port = if kind & 1 == 0 { input.short() } else { SERIAL_PORT + u16::from(kind >> 1 & 7) };
                drop(machine.bus.port_write(port, &[input.byte()]));
                machine.bus.port_read(port, &mut [0; 1]);
            }
            10 => {
                let features = if kind & 0x80 == 0 { 1 << 29 } else { input.long() };
                let bar = machine.bar(u64::from(kind) % DEVICES as u64);
                if bar.checked_add(BAR_SIZE).is_some() {
                    machine.start(bar, features, input.byte());
                }
            }
            11 => {
                let transport = &machine.slots[usize::from(kind) % DEVICES].transport;
                match step >> 4 & 3 {
                    0 => transport.used(u16::from(kind >> 4)),
                    1 => transport.config_changed(),
                    2 => transport.needs_reset(),
                    _ => drop((transport.kick_fd(kind.into()), transport.call_fd(kind.into()))),
                }
            }
            _ => machine.turn(),
        }
    }
    machine.turn();
    assert_eq!(machine.identities(), identities, "a guest cannot write who a device is");
    for slot in &mut machine.slots {
        // As much as a vCPU can ask for: a reset, by wherever the registers are now.
        slot.transport.bar_write(0x14, &[0]);
    }
    machine.turn();
    for (index, slot) in machine.slots.iter().enumerate() {
        let mut status = [0xFF];
        slot.transport.bar_read(0x14, &mut status);
        assert_eq!((status, slot.active), ([0], false), "device {index} is not reset");
    }
}

/// The section of a device in a state file: it is refused, or the device runs on and says the same again.
pub(super) fn transport_state(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new();
    let index = usize::from(input.byte()) % DEVICES;
    let transport = machine.slots[index].transport.clone();
    let mut own = Writer::new();
    transport.save(&mut own);
    let mut bytes = own.into_bytes();
    // The registers of this device with some bytes changed: the rest would be refused at once.
    while !input.is_empty() {
        let (place, value) = (usize::from(input.short()) % bytes.len(), input.byte());
        bytes[place] = value;
    }
    if transport.restore(&mut Reader::new(&bytes)).is_err() {
        return;
    }
    let mut saved = Writer::new();
    transport.save(&mut saved);
    machine.turn();
    transport.wake_driver();
    machine.turn();
    let second = Machine::new();
    let saved = saved.into_bytes();
    second.slots[index].transport.restore(&mut Reader::new(&saved)).unwrap();
}
