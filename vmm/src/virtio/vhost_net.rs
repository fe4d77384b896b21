//! A pair of queues served by the kernel (vhost-net): frames pass between guest memory and the tap without us.
//!
//! ```text
//!   new() ──► Stopped ── start() ──► Running ── pause() ──► Paused ── resume() ──► Running
//!                ▲                                                 any ── stop() ──► Stopped
//! ```
//!
//! The kernel waits for kicks at the events of the transport and raises interrupts through those of its vectors, so this
//! process has no part in a frame. It finds a ring broken on its own and says so through [`Vhost::error_fd`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::GuestMemory;
use super::queue::Queue;
use crate::ioctl;

// include/uapi/linux/vhost.h, ioctls of type 0xAF.
const VHOST_GET_FEATURES: libc::Ioctl = ioctl::number(0x8008_AF00);
const VHOST_SET_FEATURES: libc::Ioctl = ioctl::number(0x4008_AF00);
const VHOST_SET_OWNER: libc::Ioctl = ioctl::number(0xAF01);
const VHOST_SET_MEM_TABLE: libc::Ioctl = ioctl::number(0x4008_AF03);
const VHOST_SET_VRING_NUM: libc::Ioctl = ioctl::number(0x4008_AF10);
const VHOST_SET_VRING_ADDR: libc::Ioctl = ioctl::number(0x4028_AF11);
const VHOST_SET_VRING_BASE: libc::Ioctl = ioctl::number(0x4008_AF12);
const VHOST_GET_VRING_BASE: libc::Ioctl = ioctl::number(0xC008_AF12);
const VHOST_SET_VRING_KICK: libc::Ioctl = ioctl::number(0x4008_AF20);
const VHOST_SET_VRING_CALL: libc::Ioctl = ioctl::number(0x4008_AF21);
const VHOST_SET_VRING_ERR: libc::Ioctl = ioctl::number(0x4008_AF22);
const VHOST_NET_SET_BACKEND: libc::Ioctl = ioctl::number(0x4008_AF30);

/// Features of the rings and of the header, which the kernel has to know: those of the frames are the tap's business.
/// `VIRTIO_NET_F_MRG_RXBUF`, `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_VERSION_1`.
const RING_FEATURES: u64 = 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;

/// Why the kernel does not serve a pair of queues.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The descriptor is no vhost-net device, or it is another process's.
    #[error("the descriptor is not a fresh /dev/vhost-net")]
    NotVhost(#[source] io::Error),
    /// No descriptor was left for its errors.
    #[error("event for errors")]
    Event(#[source] io::Error),
    /// The kernel lacks what both sides of the queue agreed on.
    #[error("vhost-net lacks the features {0:#x}")]
    Features(u64),
    /// A queue is not enabled, or its interrupt has no way through the kernel.
    #[error("queue {0} has no events of the kernel")]
    Events(u16),
    /// A ring is not in guest memory.
    #[error("queue {0} is not in guest memory")]
    Memory(u16),
    /// A step was refused.
    #[error("{step}")]
    Refused {
        /// The ioctl.
        step: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// A queue with the events of its transport.
pub struct Ring<'a> {
    /// The queue; it is not used by anybody else while the kernel serves it.
    pub queue: &'a Queue,
    /// Where kicks arrive.
    pub kick: RawFd,
    /// What raises its interrupt.
    pub call: RawFd,
}

/// One descriptor of `/dev/vhost-net`.
pub struct Vhost {
    fd: OwnedFd,
    error: EventFd,
    features: u64,
    running: bool,
}

impl Vhost {
    /// Takes possession of a descriptor of `/dev/vhost-net` that nobody has used.
    ///
    /// # Errors
    /// It is something else.
    pub fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        let mut features = 0u64;
        // SAFETY: VHOST_GET_FEATURES writes a u64, to `features`.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), VHOST_GET_FEATURES, &raw mut features) };
        answer(got).map_err(VhostError::NotVhost)?;
        // SAFETY: VHOST_SET_OWNER takes no argument: the kernel's thread uses the memory of this process from now on.
        let owned = unsafe { libc::ioctl(fd.as_raw_fd(), VHOST_SET_OWNER, 0) };
        answer(owned).map_err(VhostError::NotVhost)?;
        let error = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VhostError::Event)?;
        Ok(Self { fd, error, features, running: false })
    }

    /// An event that the kernel writes when it finds a ring broken.
    pub fn error_fd(&self) -> RawFd {
        self.error.as_raw_fd()
    }

    /// Takes the event of [`Self::error_fd`].
    pub fn take_error(&self) {
        // Nothing to read means that an earlier turn took it.
        let _taken = self.error.read();
    }

    /// Lets the kernel serve `receive` and `send` between `memory` and `tap`. `features` are those that both sides agreed on.
    ///
    /// # Errors
    /// Why it does not; then it touches neither queue.
    pub fn start(
        &mut self,
        rings: &[Ring<'_>; 2],
        features: u64,
        memory: &GuestMemory,
        tap: RawFd,
    ) -> Result<(), VhostError> {
        let wanted = features & RING_FEATURES;
        if wanted & !self.features != 0 {
            return Err(VhostError::Features(wanted & !self.features));
        }
        self.set("VHOST_SET_FEATURES", VHOST_SET_FEATURES, &wanted)?;
        let table = memory_table(memory);
        let first = table.first().copied().unwrap_or(0);
        // The argument of this call is longer than its number says: a count, then as many regions.
        self.set_slice("VHOST_SET_MEM_TABLE", VHOST_SET_MEM_TABLE, &table)?;
        debug_assert!(first > 0);
        for (number, ring) in (0u32..).zip(rings) {
            self.set_ring(number, ring, memory)?;
        }
        self.attach(tap)
    }

    fn set_ring(&self, number: u32, ring: &Ring<'_>, memory: &GuestMemory) -> Result<(), VhostError> {
        let queue = ring.queue;
        let [descriptors, available, used] = queue.areas().map(|(address, length)| {
            let place = memory.get_slice(GuestAddress(address), length);
            place.map(|slice| slice.ptr_guard_mut().as_ptr().expose_provenance() as u64)
        });
        let outside = |_| VhostError::Memory(queue.index());
        let (descriptors, available, used) =
            (descriptors.map_err(outside)?, available.map_err(outside)?, used.map_err(outside)?);
        let state = |value: u16| [number, u32::from(value)];
        self.set("VHOST_SET_VRING_NUM", VHOST_SET_VRING_NUM, &state(queue.size()))?;
        self.set("VHOST_SET_VRING_BASE", VHOST_SET_VRING_BASE, &state(queue.next_available()))?;
        // struct vhost_vring_addr: number, flags, descriptors, used, available, log.
        let address = [u64::from(number), descriptors, used, available, 0];
        self.set("VHOST_SET_VRING_ADDR", VHOST_SET_VRING_ADDR, &address)?;
        for (step, call, fd) in [
            ("VHOST_SET_VRING_KICK", VHOST_SET_VRING_KICK, ring.kick),
            ("VHOST_SET_VRING_CALL", VHOST_SET_VRING_CALL, ring.call),
            ("VHOST_SET_VRING_ERR", VHOST_SET_VRING_ERR, self.error.as_raw_fd()),
        ] {
            self.set(step, call, &file(number, fd))?;
        }
        Ok(())
    }

    fn attach(&mut self, tap: RawFd) -> Result<(), VhostError> {
        for number in [0, 1] {
            if let Err(error) = self.set("VHOST_NET_SET_BACKEND", VHOST_NET_SET_BACKEND, &file(number, tap)) {
                self.detach();
                return Err(error);
            }
        }
        self.running = true;
        Ok(())
    }

    fn detach(&mut self) {
        for number in [0, 1] {
            // Refused only for a descriptor that is no vhost-net or not ours, which `new` made sure of.
            let _not_ours = self.set("VHOST_NET_SET_BACKEND", VHOST_NET_SET_BACKEND, &file(number, -1));
        }
        self.running = false;
    }

    /// Stops in the middle: the kernel touches neither guest memory nor the tap until [`Self::resume`].
    pub fn pause(&mut self) {
        if self.running {
            self.detach();
        }
    }

    /// Goes on after [`Self::pause`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn resume(&mut self, tap: RawFd) -> Result<(), VhostError> {
        if self.running { Ok(()) } else { self.attach(tap) }
    }

    /// Ends it. The next chain that each ring would have taken, for a queue that goes on elsewhere.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop(&mut self) -> Result<[u16; 2], VhostError> {
        self.detach();
        let mut next = [0; 2];
        for (number, next) in (0u32..).zip(&mut next) {
            let mut state = [number, 0u32];
            // SAFETY: VHOST_GET_VRING_BASE reads and writes a struct vhost_vring_state of two u32, in `state`.
            let got = unsafe { libc::ioctl(self.fd.as_raw_fd(), VHOST_GET_VRING_BASE, state.as_mut_ptr()) };
            answer(got).map_err(|source| VhostError::Refused { step: "VHOST_GET_VRING_BASE", source })?;
            let [_, base] = state;
            *next = u16::try_from(base & 0xFFFF).unwrap_or(0);
        }
        Ok(next)
    }

    fn set<T>(&self, step: &'static str, call: libc::Ioctl, argument: &T) -> Result<(), VhostError> {
        self.set_slice(step, call, std::slice::from_ref(argument))
    }

    fn set_slice<T>(&self, step: &'static str, call: libc::Ioctl, argument: &[T]) -> Result<(), VhostError> {
        // SAFETY: the callers pass for each call what its number says: the kernel only reads it.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), call, argument.as_ptr()) };
        answer(done).map_err(|source| VhostError::Refused { step, source })
    }
}

/// `struct vhost_memory`: the number of regions, and of each the guest's address, the length, our address and a reserve.
fn memory_table(memory: &GuestMemory) -> Vec<u64> {
    let mut table = vec![memory.num_regions() as u64];
    for region in memory.iter() {
        let ours = region.as_ptr().expose_provenance() as u64;
        table.extend([region.start_addr().0, region.len(), ours, 0]);
    }
    table
}

/// `struct vhost_vring_file`.
fn file(number: u32, fd: RawFd) -> [u32; 2] {
    [number, fd.cast_unsigned()]
}

fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
