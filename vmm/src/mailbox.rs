//! Messages from vCPU threads to the I/O thread.
//!
//! Bounded without counting: a device has at most one request under way, the serial line tells only that its empty buffer
//! got a byte or that its full input has room again, and a vCPU thread that ends tells it once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use blixard_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

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

/// Where messages wait.
#[derive(Debug)]
pub struct Mailbox {
    messages: Mutex<VecDeque<Message>>,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { messages: Mutex::default(), wake })
    }

    /// Adds a message and wakes the I/O thread.
    pub fn post(&self, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push_back(message);
        let first = messages.len() == 1;
        // Woken while the lock is held, the I/O thread would wait for it at once.
        drop(messages);
        if first {
            // An eventfd refuses only at its largest count; then the reader is awake anyway.
            let _ = self.wake.write(1);
        }
    }

    /// Takes all messages.
    pub fn take(&self) -> VecDeque<Message> {
        // Read before the messages are taken: one that comes between is taken now and wakes once more for nothing. "Nothing to
        // read" is as good: the count only wakes.
        let _ = self.wake.read();
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
