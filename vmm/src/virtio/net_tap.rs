//! The host's end of a network card: a tap device whose frames begin with a virtio-net header.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::iovec::IoVecs;
use super::socket;
use crate::ioctl;

/// Bytes of `struct virtio_net_hdr` in front of each frame (virtio 1.3 section 5.1.6).
pub const HEADER: usize = 12;
/// Longest frame with its header: an IP packet of 65535 bytes behind an Ethernet header with a VLAN tag.
pub const FRAME_MAX: usize = HEADER + 18 + 65535;

/// What the driver takes off our hands; the values are those of `include/uapi/linux/if_tun.h`.
pub mod offload {
    /// Checksums may be missing.
    pub const CSUM: u32 = 1;
    /// TCP over IPv4 may come in frames larger than the MTU.
    pub const TSO4: u32 = 2;
    /// The same over IPv6.
    pub const TSO6: u32 = 4;
    /// TCP segments with an ECN mark may be in such frames.
    pub const TSO_ECN: u32 = 8;
    /// UDP over IPv4 may come in frames larger than the MTU. The kernel takes it together with [`USO6`] only.
    pub const USO4: u32 = 0x20;
    /// The same over IPv6.
    pub const USO6: u32 = 0x40;
}

// include/uapi/linux/if_tun.h: _IOW('T', 208, unsigned int), _IOR('T', 210, unsigned int), _IOW('T', 216, int),
// _IOW('T', 217, int).
const TUNSETOFFLOAD: libc::Ioctl = ioctl::number(0x4004_54d0);
const TUNGETIFF: libc::Ioctl = ioctl::number(0x8004_54d2);
const TUNSETVNETHDRSZ: libc::Ioctl = ioctl::number(0x4004_54d8);
const TUNSETQUEUE: libc::Ioctl = ioctl::number(0x4004_54d9);
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

/// Why a descriptor cannot carry frames.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is no tap device, or one without an interface.
    #[error("the descriptor is not a tap queue with an interface")]
    NotATap(#[source] io::Error),
    /// It was made with other flags than `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    #[error("the tap has flags {0:#06x}, IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed")]
    Flags(u16),
    /// The length of the header cannot be set.
    #[error("the tap does not take a header of {HEADER} bytes")]
    Header(#[source] io::Error),
    /// It cannot be made non-blocking.
    #[error("the tap cannot be made non-blocking")]
    NonBlocking(#[source] io::Error),
}

/// How a transfer of a frame ended.
#[derive(Debug)]
pub enum Outcome {
    /// The frame, with so many bytes, passed.
    Done(usize),
    /// Not now.
    Wait,
    /// The kernel did not like this frame; the next one may pass.
    Refused,
    /// The interface is gone.
    Gone,
}

/// A descriptor for frames.
pub struct Tap {
    fd: OwnedFd,
    is_tap: bool,
    /// UDP frames larger than the MTU pass in both directions.
    uso: bool,
    /// It is one of several queues of its interface.
    is_multi_queue: bool,
    /// The interface gives and takes frames here.
    attached: bool,
}

impl Tap {
    /// Prepares a tap queue.
    ///
    /// # Errors
    /// What makes it unusable.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let flags = interface_flags(fd.as_fd()).map_err(TapError::NotATap)?;
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(TapError::Flags(flags));
        }
        socket::set_nonblocking(&fd).map_err(TapError::NonBlocking)?;
        let length: libc::c_int = 12;
        // SAFETY: TUNSETVNETHDRSZ reads one int, from `length`.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const length) };
        answer(result).map_err(TapError::Header)?;
        let is_multi_queue = flags & IFF_MULTI_QUEUE != 0;
        let mut tap = Self { fd, is_tap: true, uso: false, is_multi_queue, attached: true };
        // Linux 6.2 and later know these.
        let all = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::USO4 | offload::USO6;
        tap.uso = tap.set_offload(all).is_ok() && tap.set_offload(0).is_ok();
        Ok(tap)
    }

    /// A datagram socket whose datagrams are frames with a header: a tap without a kernel interface.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn from_datagrams(fd: OwnedFd) -> Result<Self, TapError> {
        socket::set_nonblocking(&fd).map_err(TapError::NonBlocking)?;
        Ok(Self { fd, is_tap: false, uso: true, is_multi_queue: true, attached: true })
    }

    /// Whether UDP frames larger than the MTU pass, in both directions.
    pub fn has_uso(&self) -> bool {
        self.uso
    }

    /// Whether it can be one of several queues.
    pub fn is_multi_queue(&self) -> bool {
        self.is_multi_queue
    }

    /// Whether the interface gives and takes frames at this queue.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Lets the interface use this queue, or not: the kernel spreads flows over those that are attached. Frames that wait
    /// in a queue are lost when it is detached.
    ///
    /// # Errors
    /// The system's answer.
    pub fn attach(&mut self, attached: bool) -> io::Result<()> {
        if self.attached == attached {
            return Ok(());
        }
        if self.is_tap {
            let mut request = [0u8; 40];
            let flag = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
            for (to, from) in request.iter_mut().skip(16).zip(flag.to_ne_bytes()) {
                *to = from;
            }
            // SAFETY: TUNSETQUEUE reads a struct ifreq of 40 bytes, from `request`.
            answer(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETQUEUE, request.as_ptr()) })?;
        }
        self.attached = attached;
        Ok(())
    }

    /// For watching.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Tells the kernel what the frames it gives us may leave undone, a set of [`offload`] bits.
    ///
    /// # Errors
    /// The system's answer.
    pub fn set_offload(&self, bits: u32) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes a number, no memory.
        answer(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }

    /// Receives a frame into guest memory, which has room for [`FRAME_MAX`].
    pub fn receive(&self, into: &IoVecs) -> Outcome {
        outcome(|| into.read_from(self.fd.as_fd()))
    }

    /// Receives a frame into our own memory.
    pub fn receive_here(&self, into: &mut [u8]) -> Outcome {
        // SAFETY: `into` is writable for its whole length while the call runs and nobody else refers to it.
        let read = |into: &mut [u8]| unsafe {
            libc::read(self.fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len())
        };
        outcome(|| usize::try_from(read(into)).map_err(|_| io::Error::last_os_error()))
    }

    /// Sends a frame out of guest memory.
    pub fn send(&self, frame: &IoVecs) -> Outcome {
        outcome(|| frame.write_to(self.fd.as_fd()))
    }
}

fn outcome(mut act: impl FnMut() -> io::Result<usize>) -> Outcome {
    loop {
        match act() {
            Ok(count) => return Outcome::Done(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Outcome::Wait,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENOTCONN | libc::ECONNREFUSED) => {
                        Outcome::Gone
                    }
                    _ => Outcome::Refused,
                };
            }
        }
    }
}

fn interface_flags(fd: BorrowedFd<'_>) -> io::Result<u16> {
    // struct ifreq: a name of 16 bytes, then a union of 24 whose first two are the flags.
    let mut request = [0u8; 40];
    // SAFETY: TUNGETIFF writes a struct ifreq of 40 bytes, to `request`.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, request.as_mut_ptr()) })?;
    let [.., low, high] = request.first_chunk::<18>().copied().unwrap_or([0; 18]);
    Ok(u16::from_ne_bytes([low, high]))
}

fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
