//! The guest's side of virtqueues, without a guest: tests, benches and fuzz targets drive devices with it.
//!
//! [`DriverQueue`] keeps to the rules, with [`DriverQueue::descriptor`] and its neighbours one breaks them. [`EventLoop`]
//! stands for the I/O thread and [`Recorder`] for the interrupts of the transport.

#![cfg_attr(
    not(test),
    expect(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        reason = "a tool of tests: where it cannot go on, the test has failed"
    )
)]

use std::collections::BTreeMap;
use std::io;
use std::num::Wrapping;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{Activation, Device, GuestMemory, Interrupt, Watch};
use super::queue::Queue;

/// A descriptor continues with another one.
pub const NEXT: u16 = 1;
/// A descriptor's buffer is for the device to fill.
pub const WRITE: u16 = 2;
/// A descriptor's buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Guest memory of `size` bytes at address 0.
pub fn guest_memory(size: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// A buffer of a chain: guest address and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// The device reads it.
    Readable(u64, u32),
    /// The device fills it.
    Writable(u64, u32),
}

impl Buffer {
    fn parts(self) -> (u64, u32, u16) {
        match self {
            Self::Readable(address, length) => (address, length, 0),
            Self::Writable(address, length) => (address, length, WRITE),
        }
    }
}

/// A split virtqueue as the driver sees it (virtio 1.3 section 2.7).
pub struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    next_available: Wrapping<u16>,
    kicked_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
}

impl DriverQueue {
    /// Bytes that the areas of a queue take.
    pub fn bytes(size: u16) -> u64 {
        let size = u64::from(size);
        (16 * size + 6 + 2 * size).next_multiple_of(4) + 6 + 8 * size
    }

    /// A fresh queue whose areas begin at `base`, a multiple of 16.
    pub fn new(memory: &GuestMemory, base: u64, size: u16, event_idx: bool) -> Self {
        let entries = u64::from(size);
        let available = base + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        memory.write_slice(&vec![0; Self::bytes(size) as usize], GuestAddress(base)).unwrap();
        Self {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used,
            event_idx,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            next_available: Wrapping(0),
            kicked_available: Wrapping(0),
            next_used: Wrapping(0),
        }
    }

    /// The device's side of this queue.
    pub fn device_side(&self, index: u16) -> Queue {
        Queue::new(
            index,
            self.size,
            self.descriptors,
            self.available,
            self.used,
            self.event_idx,
            &self.memory,
        )
        .unwrap()
    }

    /// Offers a chain; its head, or `None` when there are too few free descriptors.
    pub fn post(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || self.free.len() < buffers.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (i, (index, buffer)) in indices.iter().zip(buffers).enumerate() {
            let (address, length, flags) = buffer.parts();
            let (flags, next) = indices.get(i + 1).map_or((flags, 0), |next| (flags | NEXT, *next));
            self.descriptor(*index, address, length, flags, next);
        }
        Some(self.offer(indices))
    }

    /// Offers a chain through an indirect table that lies at `table`.
    pub fn post_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let index = self.free.pop()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let (address, length, flags) = buffer.parts();
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let at = table + 16 * i as u64;
            write_descriptor(&self.memory, at, address, length, flags | more, i as u16 + 1);
        }
        self.descriptor(index, table, 16 * buffers.len() as u32, INDIRECT, 0);
        Some(self.offer(vec![index]))
    }

    fn offer(&mut self, indices: Vec<u16>) -> u16 {
        let head = indices[0];
        self.chains.insert(head, indices);
        self.available_entry(self.next_available.0, head);
        self.next_available += 1;
        self.available_index(self.next_available.0);
        head
    }

    /// Whether the device asked to be kicked for what was offered since the last call.
    pub fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked_available, self.next_available);
        self.kicked_available = new;
        if old == new {
            return false;
        }
        if !self.event_idx {
            return self.load(self.used) & 1 == 0;
        }
        let event = Wrapping(self.load(self.used + 4 + 8 * u64::from(self.size)));
        (new - event - Wrapping(1)) < (new - old)
    }

    /// The next chain that the device gave back: its head and the number of bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap();
        if index == self.next_used.0 {
            return None;
        }
        let slot = u64::from(self.next_used.0 % self.size);
        let entry: u64 = self.memory.read_obj(GuestAddress(self.used + 4 + 8 * slot)).unwrap();
        self.next_used += 1;
        let head = entry as u16;
        let indices = self.chains.remove(&head).expect("the device gives back what it was offered, once");
        self.free.extend(indices);
        Some((head, (entry >> 32) as u32))
    }

    /// Uses all descriptors again, whoever still has them: what a driver must not do.
    pub fn forget(&mut self) {
        self.chains.clear();
        self.free = (0..self.size).rev().collect();
    }

    /// Asks for an interrupt when the next chain is given back. Returns whether one was meanwhile.
    pub fn want_interrupt(&mut self) -> bool {
        if self.event_idx {
            self.store(self.available + 4 + 2 * u64::from(self.size), self.next_used.0);
        } else {
            self.store(self.available, 0);
        }
        fence(Ordering::SeqCst);
        self.load(self.used + 2) != self.next_used.0
    }

    /// Asks for no interrupts. With EVENT_IDX: not before 32768 more chains were given back.
    pub fn refuse_interrupts(&mut self) {
        if self.event_idx {
            let event = self.next_used - Wrapping(32768);
            self.store(self.available + 4 + 2 * u64::from(self.size), event.0);
        } else {
            self.store(self.available, 1);
        }
    }

    /// Chains offered and not yet taken back.
    pub fn outstanding(&self) -> usize {
        self.chains.len()
    }

    /// Writes any descriptor.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(
            &self.memory,
            self.descriptors + 16 * u64::from(index),
            address,
            length,
            flags,
            next,
        );
    }

    /// Writes any entry of the available ring.
    pub fn available_entry(&self, position: u16, head: u16) {
        self.store(self.available + 4 + 2 * u64::from(position % self.size), head);
    }

    /// Writes any available index.
    pub fn available_index(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.available + 2), Ordering::Release).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        self.memory.load(GuestAddress(at), Ordering::Relaxed).unwrap()
    }

    fn store(&self, at: u64, value: u16) {
        self.memory.store(value, GuestAddress(at), Ordering::Relaxed).unwrap();
    }
}

/// Writes any descriptor anywhere, for example into an indirect table.
pub fn write_descriptor(memory: &GuestMemory, at: u64, address: u64, length: u32, flags: u16, next: u16) {
    let whole =
        u128::from(address) | u128::from(length) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    memory.write_slice(&whole.to_le_bytes(), GuestAddress(at)).unwrap();
}

/// Counts the interrupts of a device.
#[derive(Debug, Default)]
pub struct Recorder {
    used: [AtomicU64; 32],
    config_changed: AtomicU64,
    needs_reset: AtomicU64,
}

impl Recorder {
    /// Interrupts of queue `index` so far.
    pub fn used_count(&self, index: usize) -> u64 {
        self.used[index].load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn config_count(&self) -> u64 {
        self.config_changed.load(Ordering::SeqCst)
    }

    /// How often the device asked for a reset.
    pub fn reset_count(&self) -> u64 {
        self.needs_reset.load(Ordering::SeqCst)
    }
}

impl Interrupt for Recorder {
    fn used(&self, index: u16) {
        self.used[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {
        self.config_changed.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}

/// The descriptors of one device under `epoll`, as the I/O thread has them.
pub struct EventLoop {
    epoll: Epoll,
    watched: BTreeMap<RawFd, u64>,
}

impl EventLoop {
    /// A loop that watches nothing.
    pub fn new() -> Self {
        Self { epoll: Epoll::new().unwrap(), watched: BTreeMap::new() }
    }

    /// How many descriptors are watched.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }

    /// Waits for events at most `limit` long and hands them to `device`; how many there were.
    pub fn turn(&mut self, device: &mut dyn Device, limit: Duration) -> usize {
        let mut events = [EpollEvent::default(); 16];
        let limit = i32::try_from(limit.as_millis()).unwrap();
        let count = match self.epoll.wait(limit, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result.unwrap(),
        };
        for event in &events[..count] {
            // An earlier event of this round may have ended the watch of a later one.
            if self.watched.values().any(|token| *token == event.data()) {
                device.on_event(event.data(), event.events(), self);
            }
        }
        count
    }

    /// Turns until `done` says so; false when `limit` passed before.
    pub fn turn_until(
        &mut self,
        device: &mut dyn Device,
        limit: Duration,
        mut done: impl FnMut(&mut dyn Device, &mut Self) -> bool,
    ) -> bool {
        let end = Instant::now() + limit;
        while !done(device, self) {
            if Instant::now() > end {
                return false;
            }
            self.turn(device, Duration::from_millis(10));
        }
        true
    }
}

impl Default for EventLoop {
    fn default() -> Self {
        Self::new()
    }
}

impl Watch for EventLoop {
    fn add(&mut self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::from_bits_truncate(events), token);
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        self.watched.insert(fd, token);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::from_bits_truncate(events), token);
        self.epoll.ctl(ControlOperation::Modify, fd, event)?;
        self.watched.insert(fd, token);
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) {
        self.watched.remove(&fd).expect("only what is watched is removed");
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).unwrap();
    }
}

/// A device with its driver: queues at the beginning of guest memory, buffers behind [`Machine::buffers`].
pub struct Machine<D: Device> {
    /// The device.
    pub device: D,
    /// The I/O thread.
    pub events: EventLoop,
    /// The driver's side of its queues.
    pub queues: Vec<DriverQueue>,
    /// The interrupts.
    pub interrupts: Arc<Recorder>,
    /// Guest memory.
    pub memory: GuestMemory,
    /// First address behind the queues, a multiple of 4096.
    pub buffers: u64,
    features: u64,
    event_idx: bool,
}

impl<D: Device> Machine<D> {
    /// Activates `device` with these features in 16 MiB of memory.
    pub fn start(device: D, features: u64, event_idx: bool) -> Self {
        Self::with_memory(device, guest_memory(16 << 20), features, event_idx)
    }

    /// Activates `device` with these features in this memory.
    pub fn with_memory(device: D, memory: GuestMemory, features: u64, event_idx: bool) -> Self {
        let mut machine = Self {
            device,
            events: EventLoop::new(),
            queues: Vec::new(),
            interrupts: Arc::default(),
            memory,
            buffers: 0,
            features,
            event_idx,
        };
        machine.activate();
        machine
    }

    /// Makes fresh queues and activates the device with them.
    pub fn activate(&mut self) {
        self.lay_out();
        self.activate_as_is();
    }

    /// Makes fresh queues; the device does not have them yet.
    pub fn lay_out(&mut self) {
        let mut base = 0x1000;
        self.queues.clear();
        for size in self.device.queue_sizes() {
            self.queues.push(DriverQueue::new(&self.memory, base, *size, self.event_idx));
            base = (base + DriverQueue::bytes(*size)).next_multiple_of(16);
        }
        self.buffers = base.next_multiple_of(4096);
    }

    /// Activates the device with the queues as they are.
    pub fn activate_as_is(&mut self) {
        let queues = self.queues.iter().zip(0..).map(|(queue, index)| queue.device_side(index)).collect();
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues,
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
        };
        self.device.activate(activation, &mut self.events);
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.device.deactivate(&mut self.events);
    }

    /// Kicks queue `index` if the device wants it.
    pub fn kick(&mut self, index: u16) {
        if self.queues[usize::from(index)].wants_kick() {
            self.device.on_kick(index, &mut self.events);
        }
    }

    /// Turns the I/O thread until `done`; fails the test after ten seconds.
    #[track_caller]
    pub fn until(&mut self, mut done: impl FnMut(&mut D, &mut Vec<DriverQueue>) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(&mut self.device, &mut self.queues) {
            assert!(Instant::now() < end, "nothing happened for ten seconds");
            self.events.turn(&mut self.device, Duration::from_millis(20));
        }
    }

    /// Waits for the next used chain of queue `index`.
    #[track_caller]
    pub fn wait_used(&mut self, index: usize) -> (u16, u32) {
        let mut found = None;
        self.until(|_, queues| {
            found = queues[index].take_used();
            found.is_some()
        });
        found.unwrap()
    }

    /// Writes guest memory.
    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}
