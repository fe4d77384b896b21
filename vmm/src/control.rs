//! The control socket: answers the agent and tells subscribers what happens.
//!
//! Sockets never block. A client that does not read its answers is dropped; the VM does not notice.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use blixard_vmm_api::control::{Event, FromVmm, MESSAGE_BYTES_MAX, Reply, Request, Status};
use blixard_vmm_api::snapshot::DESCRIPTORS_MAX;

use crate::devices::console::{accept, set_nonblocking};
use crate::passing;
use crate::poll::{Owner, Poll};

/// Most clients at once; one more is turned away.
pub const CLIENTS_MAX: usize = 16;
/// Most requests of one client before others get their turn.
const REQUESTS_PER_TURN: usize = 8;
const LISTENER: u64 = 0;
const IN: u32 = libc::EPOLLIN.cast_unsigned();

struct Client {
    socket: OwnedFd,
    subscribed: bool,
}

/// Socket and clients.
pub struct Control {
    listener: OwnedFd,
    clients: BTreeMap<u64, Client>,
    next: u64,
    buffer: Vec<u8>,
}

/// Who does what is asked.
pub trait Answer {
    /// Does `request`, with what was passed beside it, and answers it.
    fn answer(&mut self, request: &Request, given: Vec<OwnedFd>, poll: &mut Poll) -> Answered;
}

/// A reply and the files that are passed beside it.
pub type Answered = (Reply, Vec<Arc<File>>);

fn refused(reason: String) -> Answered {
    (Reply::Refused { reason }, vec![])
}

impl Control {
    /// Accepts clients on `listener`, a listening SEQPACKET socket.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn new(listener: OwnedFd, poll: &mut Poll) -> io::Result<Self> {
        set_nonblocking(&listener)?;
        poll.add(Owner::Control, listener.as_raw_fd(), IN, LISTENER)?;
        Ok(Self { listener, clients: BTreeMap::new(), next: LISTENER + 1, buffer: vec![] })
    }

    /// The descriptor named `token` is ready.
    pub fn on_event(&mut self, token: u64, poll: &mut Poll, vm: &mut dyn Answer) {
        if token == LISTENER {
            return self.accept(poll);
        }
        for _ in 0..REQUESTS_PER_TURN {
            let Some(client) = self.clients.get(&token) else { return };
            self.buffer.resize(MESSAGE_BYTES_MAX, 0);
            let received = match passing::receive(&client.socket, &mut self.buffer) {
                Ok(Some(received)) if received.length > 0 => received,
                Ok(None) => return,
                _ => return self.drop_client(token, poll),
            };
            let message = self.buffer.get(..received.length);
            let request = message.map(serde_json::from_slice::<Request>);
            let reply = match &request {
                _ if received.too_many => refused(format!("more than {DESCRIPTORS_MAX} descriptors")),
                Some(Ok(request)) => vm.answer(request, received.descriptors, poll),
                Some(Err(error)) => refused(format!("not a request: {error}")),
                None => refused(format!("longer than {MESSAGE_BYTES_MAX} bytes")),
            };
            if let (Some(Ok(Request::Subscribe)), Some(client)) = (&request, self.clients.get_mut(&token)) {
                client.subscribed = true;
            }
            let (reply, files) = reply;
            self.send(token, &FromVmm::Reply(reply), &files, poll);
        }
    }

    /// Tells all subscribers how the VM is now.
    pub fn changed(&mut self, status: &Status, poll: &mut Poll) {
        self.tell(&FromVmm::Event(Event::Changed(status.clone())), poll);
    }

    /// Tells all subscribers something.
    pub fn tell(&mut self, message: &FromVmm, poll: &mut Poll) {
        let subscribers: Vec<u64> =
            self.clients.iter().filter(|(_, c)| c.subscribed).map(|(n, _)| *n).collect();
        for token in subscribers {
            self.send(token, message, &[], poll);
        }
    }

    fn accept(&mut self, poll: &mut Poll) {
        let Some(socket) = accept::<OwnedFd>(&self.listener) else { return };
        if self.clients.len() >= CLIENTS_MAX {
            return;
        }
        let token = self.next;
        if poll.add(Owner::Control, socket.as_raw_fd(), IN, token).is_ok() {
            self.next += 1;
            self.clients.insert(token, Client { socket, subscribed: false });
        }
    }

    fn drop_client(&mut self, token: u64, poll: &mut Poll) {
        if let Some(client) = self.clients.remove(&token) {
            poll.remove(client.socket.as_raw_fd());
        }
    }

    fn send(&mut self, token: u64, message: &FromVmm, files: &[Arc<File>], poll: &mut Poll) {
        let Some(client) = self.clients.get(&token) else { return };
        let descriptors: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = serde_json::to_vec(message)
            .is_ok_and(|bytes| passing::send(&client.socket, &bytes, &descriptors));
        if !sent {
            self.drop_client(token, poll);
        }
    }
}
