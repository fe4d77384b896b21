//! The I/O thread's epoll set. An event is named by who registered it and by a number of his own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::virtio::device::Watch;

/// Who registered a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The mailbox of vCPU threads.
    Mailbox,
    /// The signal descriptor.
    Signals,
    /// The control socket and its clients; the number says which.
    Control,
    /// The console: listener, client, standard streams.
    Console,
    /// A device's own descriptor.
    Device(usize),
    /// A queue kick of a device; the number is the queue.
    Kick(usize),
}

/// A descriptor and what it is ready for.
pub type Ready = (RawFd, u32);

/// The set.
pub struct Poll {
    epoll: OwnedFd,
    watched: BTreeMap<RawFd, (Owner, u64)>,
    events: Vec<libc::epoll_event>,
}

impl Poll {
    /// Most events of one turn.
    const EVENTS: usize = 32;

    /// An empty set.
    ///
    /// # Errors
    /// The system's answer.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let events = vec![libc::epoll_event { events: 0, u64: 0 }; Self::EVENTS];
        Ok(Self { epoll, watched: BTreeMap::new(), events })
    }

    fn control(&self, operation: i32, fd: RawFd, events: u32) -> io::Result<()> {
        let data = u64::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the pointer is to an event that outlives the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Watches `fd` for `owner`, who calls it `token`.
    ///
    /// # Errors
    /// The system's answer; for example `EPERM` for a regular file.
    pub fn add(&mut self, owner: Owner, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, events)?;
        self.watched.insert(fd, (owner, token));
        Ok(())
    }

    /// Changes what is watched.
    ///
    /// # Errors
    /// The system's answer.
    pub fn modify(&mut self, owner: Owner, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, events)?;
        self.watched.insert(fd, (owner, token));
        Ok(())
    }

    /// Stops watching `fd`, if it is watched.
    pub fn remove(&mut self, fd: RawFd) {
        if self.watched.remove(&fd).is_some() {
            // The descriptor is ours and open, so this can only fail when it was not in the set.
            let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0);
        }
    }

    /// Waits for events, at most `timeout_ms` milliseconds (-1: without end), and puts them into `ready`.
    ///
    /// # Errors
    /// The system's answer.
    pub fn wait(&mut self, timeout_ms: i32, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let room = i32::try_from(self.events.len()).unwrap_or(0);
        // SAFETY: the buffer holds `room` events and is not otherwise used during the call.
        let count =
            unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), room, timeout_ms) };
        let Ok(count) = usize::try_from(count) else {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                error => Err(error),
            };
        };
        for event in self.events.iter().take(count) {
            let (events, fd) = (event.events, event.u64);
            ready.extend(RawFd::try_from(fd).ok().map(|fd| (fd, events)));
        }
        Ok(())
    }

    /// Who watches `fd` and his number for it. Asked right before an event is handled: an earlier event of the same
    /// turn may have ended the watch.
    pub fn owner(&self, fd: RawFd) -> Option<(Owner, u64)> {
        self.watched.get(&fd).copied()
    }
}

/// The part of the set that one device sees.
pub struct DeviceWatch<'a> {
    /// The set.
    pub poll: &'a mut Poll,
    /// The device.
    pub device: usize,
}

impl Watch for DeviceWatch<'_> {
    fn add(&mut self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.poll.add(Owner::Device(self.device), fd, events, token)
    }

    fn modify(&mut self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        self.poll.modify(Owner::Device(self.device), fd, events, token)
    }

    fn remove(&mut self, fd: RawFd) {
        self.poll.remove(fd);
    }
}
