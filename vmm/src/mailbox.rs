//! Messages from vCPU threads to the I/O thread.
//!
//! Bounded without counting: a device has at most one request under way, the serial line tells only that its empty buffer
//! got a byte or that its full input has room again, and a vCPU thread that ends tells it once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::PoisonError;

use blixard_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sync::Mutex;

/// Something the I/O thread shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The driver of this device is ready.
    Activate(usize),
    /// The driver resets this device.
    Reset(usize),
    /// The guest printed; or it read input, so that there is room for more.
    Serial,
    /// A time of the boot is known now.
    Progress,
    /// The VM has ended.
    Exit(ExitReason),
}

/// Where messages wait. `W` wakes who takes them.
#[derive(Debug)]
pub struct Mailbox<W = EventFd> {
    messages: Mutex<VecDeque<Message>>,
    wake: W,
}

/// Wakes the I/O thread, and keeps it awake until it is cleared.
pub trait Wake {
    /// Wakes it, now or as soon as it waits.
    fn wake(&self);
    /// It is awake.
    fn clear(&self);
}

impl Wake for EventFd {
    fn wake(&self) {
        // An eventfd refuses only at its largest count; then the reader is awake anyway.
        let _ = self.write(1);
    }

    fn clear(&self) {
        // "Nothing to read" is as good: the count only wakes.
        let _ = self.read();
    }
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self::with)
    }
}

impl<W: Wake> Mailbox<W> {
    /// An empty mailbox.
    pub fn with(wake: W) -> Self {
        Self { messages: Mutex::new(VecDeque::new()), wake }
    }

    /// What wakes.
    pub fn waker(&self) -> &W {
        &self.wake
    }

    /// Adds a message and wakes the I/O thread.
    pub fn post(&self, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push_back(message);
        let first = messages.len() == 1;
        // Woken while the lock is held, the I/O thread would wait for it at once.
        drop(messages);
        if first {
            self.wake.wake();
        }
    }

    /// Takes all messages.
    pub fn take(&self) -> VecDeque<Message> {
        // Cleared before the messages are taken: one that comes between is taken now and wakes once more for nothing.
        self.wake.clear();
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_in_order_and_once() {
        let mailbox = Mailbox::new().unwrap();
        mailbox.post(Message::Serial);
        mailbox.post(Message::Reset(3));
        assert_eq!(mailbox.take(), [Message::Serial, Message::Reset(3)]);
        assert!(mailbox.take().is_empty());
        mailbox.post(Message::Serial);
        assert_eq!(mailbox.take().len(), 1);
    }
}
