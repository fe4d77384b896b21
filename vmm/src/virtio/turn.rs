//! How a device gives others their turn: it stops after a bounded amount of work and sends itself an event.

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Watch;

/// Event of a device to itself (or to it from another thread): there is more to do.
#[derive(Debug)]
pub struct Turn(EventFd);

impl Turn {
    /// A turn that nobody asked for yet.
    ///
    /// # Errors
    /// No descriptor was left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Another handle to the same event, for another thread.
    ///
    /// # Errors
    /// No descriptor was left.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Watches the event under `token`.
    ///
    /// # Errors
    /// The system's answer.
    pub fn watch(&self, watch: &mut dyn Watch, token: u64) -> io::Result<()> {
        watch.add(self.0.as_raw_fd(), EventSet::IN.bits(), token)
    }

    /// Watches it no more.
    pub fn unwatch(&self, watch: &mut dyn Watch) {
        watch.remove(self.0.as_raw_fd());
    }

    /// Asks for a turn.
    pub fn ask(&self) {
        // The only failure is a full counter (EAGAIN): then the turn is already asked for.
        let _full = self.0.write(1);
    }

    /// Takes the turn: what is asked for from now on is a new one.
    pub fn take(&self) {
        // The only failure is an empty counter (EAGAIN): then somebody took it.
        let _empty = self.0.read();
    }
}
