//! What a virtio device is here: a value that lives in the I/O thread.
//!
//! ```text
//!            driver sets DRIVER_OK: activate()
//!  Inactive ─────────────────────────────────► Active   queue kicks, descriptor events, control requests
//!     ▲                                          │
//!     └────────────── reset: deactivate() ◄──────┘
//! ```
//!
//! The PCI transport (registers, MSI-X table) answers vCPU threads; the device itself is touched by the I/O thread only.
//! What a vCPU reads of the device's configuration is a [`ConfigSpace`] shared by both.

use std::ops::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::queue::Queue;
use crate::memory::dirty::{DirtyMap, DirtySlice};
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::stats::Samples;

/// Guest memory as all parts of the VMM share it. What the VMM writes there is noted when pages are tracked.
pub type GuestMemory = GuestMemoryMmap<DirtyMap>;
/// A piece of it.
pub type Slice<'a> = VolatileSlice<'a, DirtySlice<'a>>;

/// Virtio device ids (virtio 1.3 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Host-guest streams.
    Vsock = 19,
    /// Persistent memory.
    Pmem = 27,
}

/// Device-specific configuration space, at most 256 bytes, readable by vCPUs while the I/O thread owns the device.
#[derive(Debug, Clone, Default)]
pub struct ConfigSpace {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// What the driver may write.
    writable: Range<usize>,
}

impl ConfigSpace {
    /// A configuration space with this content.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::with_writable(bytes, 0..0)
    }

    /// The same, of which the driver may write a part.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), writable }
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads at `offset`; bytes beyond the end read as 0.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.bytes();
        data.fill(0);
        let from = bytes.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// Replaces the content (for example after a resize). The caller raises the configuration interrupt.
    pub fn set(&self, new: Vec<u8>) {
        *self.bytes() = new;
    }

    /// The driver writes at `offset`; what it may not write stays.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.bytes();
        for (at, from) in (offset..).zip(data).filter(|(at, _)| self.writable.contains(at)) {
            bytes.get_mut(at).into_iter().for_each(|to| *to = *from);
        }
    }

    /// The field of four bytes at `offset`.
    pub fn field(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The device changes the field of four bytes at `offset`. As [`Self::set`].
    pub fn set_field(&self, offset: usize, value: u32) {
        let mut bytes = self.bytes();
        bytes.iter_mut().skip(offset).zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

/// Raises interrupts of one device; cheap to clone, usable from any thread.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that queue `index` has used buffers.
    fn used(&self, index: u16);
    /// Tells the driver that the configuration space changed.
    fn config_changed(&self);
    /// The device found the driver's memory nonsense: sets DEVICE_NEEDS_RESET and tells the driver
    /// (virtio 1.3 section 2.1.2). The device then ignores its queues until it is reset.
    fn needs_reset(&self);
    /// The event at which kicks of queue `index` arrive, for a kernel that serves the queue itself (vhost). Who hands it on
    /// ends the I/O thread's watch of it.
    fn kick_fd(&self, _index: u16) -> Option<RawFd> {
        None
    }
    /// An event that raises the interrupt of queue `index` through the kernel alone (irqfd), as long as the driver leaves
    /// its vector unmasked; what comes meanwhile is raised when it is unmasked.
    fn call_fd(&self, _index: u16) -> Option<RawFd> {
        None
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features that both sides agreed on.
    pub features: u64,
    /// The queues, by index. Queues that the driver did not enable have [`Queue::is_enabled`] false.
    pub queues: Vec<Queue>,
    /// How to raise interrupts.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Where a device registers descriptors that the I/O thread watches for it. `token` is the device's own name for the
/// event; it comes back in [`Device::on_event`].
pub trait Watch {
    /// Watches `fd`. `events` is a set of `EPOLLIN`, `EPOLLOUT`, `EPOLLET`, `EPOLLRDHUP`.
    ///
    /// # Errors
    /// The system's answer.
    fn add(&mut self, fd: RawFd, events: u32, token: u64) -> std::io::Result<()>;
    /// Changes what is watched.
    ///
    /// # Errors
    /// The system's answer.
    fn modify(&mut self, fd: RawFd, events: u32, token: u64) -> std::io::Result<()>;
    /// Stops watching. Must be called before the descriptor is closed.
    fn remove(&mut self, fd: RawFd);
}

/// What is asked of one device over the control socket.
#[derive(Debug)]
pub enum DeviceRequest {
    /// A disk: look at the size of the backing again.
    Resize,
    /// A disk: go on with this backing.
    Swap(OwnedFd),
    /// A balloon: take or give until it has this many MiB.
    Inflate(u32),
    /// A balloon: let the driver tell once which pages are free, and release them.
    StartHinting,
    /// A balloon: the driver may use the pages again that it told.
    StopHinting,
}

/// A virtio device. All methods but the first four run on the I/O thread and must not block.
pub trait Device: Send {
    /// Kind of device.
    fn kind(&self) -> DeviceKind;
    /// Features offered by the device (bits of its own; the transport adds VERSION_1 and those of the ring).
    fn features(&self) -> u64;
    /// Largest size of each queue, a power of two each; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The configuration space, shared with the transport.
    fn config(&self) -> ConfigSpace;
    /// The driver is ready.
    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch);
    /// The driver kicked queue `index`.
    fn on_kick(&mut self, index: u16, watch: &mut dyn Watch);
    /// A watched descriptor is ready.
    fn on_event(&mut self, token: u64, events: u32, watch: &mut dyn Watch);
    /// The driver resets the device: stop watching, wait for what is in flight, drop queues and memory.
    fn deactivate(&mut self, watch: &mut dyn Watch);
    /// The VM was paused (`true`) or goes on (`false`); a paused device starts nothing new. When it returns after `true`
    /// the device is at rest: requests of which a part is done are finished and published. Chains that were only taken
    /// may stay with the device when they are the newest ones: after a restore it takes them once more.
    /// Default: nothing to do.
    fn on_pause(&mut self, _paused: bool, _watch: &mut dyn Watch) {}
    /// Writes what a snapshot needs besides registers, queues and configuration space, which the transport saves. Called
    /// while paused. Default: nothing.
    fn save(&self, _to: &mut Writer) {}
    /// Takes what [`Self::save`] of a device of the same kind wrote; somebody else may have changed it. Called once, before
    /// a device that was active is activated. Default: nothing.
    ///
    /// # Errors
    /// What cannot be.
    fn restore(&mut self, _from: &mut Reader<'_>) -> Result<(), Invalid> {
        Ok(())
    }
    /// Does what was asked over the control socket. Default: refuses everything.
    ///
    /// # Errors
    /// What is told to who asked.
    fn on_request(&mut self, _request: DeviceRequest, _watch: &mut dyn Watch) -> Result<(), String> {
        Err("this kind of device does nothing of the kind".into())
    }
    /// Somebody else than the guest and this process writes guest memory for it now, so that nobody can tell what changed.
    /// Default: nobody does.
    fn writes_unseen(&self) -> bool {
        false
    }
    /// Why the device asked for a reset, until it gets one.
    fn failure(&self) -> Option<String> {
        None
    }
    /// Counters by name, for example `read_bytes`.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// Counters of its queues too, and its histograms. Default: [`Self::counters`].
    fn samples(&self, samples: &mut Samples) {
        samples.counters(None, &self.counters());
    }
}
