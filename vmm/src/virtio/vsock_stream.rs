//! One stream between the guest and a host socket, or the guest link.
//!
//! ```text
//!                       RESPONSE                  both halves ended, all delivered
//!   Requested ─────────────────────► Open ──────────────────────────────────────► reset is due ─► Over
//!       └────── RST, deadline ────────┴──── RST from the guest ─► drain to the host ─────────────► Over
//! ```
//!
//! Credit (virtio 1.3 section 5.10.6.3): we promise [`BUFFER`] bytes and keep to what the guest promises. What the host
//! socket does not take waits in `buffer`; a guest that sends more than it has credit for loses the stream.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::LinkRecord;
use vmm_sys_util::epoll::EventSet;

use super::chain::{Chain, ChainError, Reader, Writer};
use super::device::GuestMemory;
use super::iovec::IoVecs;
use super::socket::{self, Half};
use super::vsock_link::LinkEnd;
use super::vsock_packet::{
    HEADER, HEADER_LENGTH, HOST_CID, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// Bytes the guest may have on the way to one host socket.
pub const BUFFER: u32 = 64 << 10;
/// Longest record of the guest link in bytes.
#[expect(clippy::cast_possible_truncation, reason = "both are constants of a few hundred")]
const RECORD_MAX: u32 = (LinkRecord::HEADER + LinkRecord::PAYLOAD_MAX) as u32;
/// How long the guest may take to answer a request.
pub const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long a stream may linger that one side has left completely.
pub const LINGER_TIME: Duration = Duration::from_secs(30);

/// Ports of a stream: ours, the guest's.
pub type Ports = (u32, u32);

enum End {
    Socket(OwnedFd),
    Link(LinkEnd),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Requested,
    Open,
    /// The guest knows the stream no more; its last bytes are on the way to the host.
    Draining,
    Over,
}

/// Packets to be sent to the guest.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
}

/// A stream.
pub struct Stream {
    ports: Ports,
    guest_cid: u64,
    end: End,
    state: State,
    due: Due,
    /// Bytes from the guest that the host has not taken.
    buffer: VecDeque<u8>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    sent: Wrapping<u32>,
    guest_buffer_size: u32,
    guest_forwarded: Wrapping<u32>,
    credit_asked: bool,
    readable: bool,
    writable: bool,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    host_receives: bool,
    shutdown_told: u32,
    write_half_shut: bool,
    read_half_shut: bool,
    deadline: Option<Instant>,
    /// Whether the device has it in its list of streams with something to send.
    pub queued: bool,
}

impl Stream {
    /// A stream that a host client asks for.
    pub fn from_host(ports: Ports, guest_cid: u64, socket: OwnedFd) -> Self {
        let mut stream = Self::new(ports, guest_cid, End::Socket(socket), State::Requested);
        stream.due.request = true;
        stream.deadline = Some(Instant::now() + ANSWER_TIME);
        stream
    }

    /// A stream that the guest opened with `request`, to `socket`.
    pub(super) fn from_guest(request: &Header, socket: OwnedFd) -> Self {
        Self::opened(request, End::Socket(socket))
    }

    /// The guest link, opened by the guest with `request`.
    pub(super) fn link(request: &Header, end: LinkEnd) -> Self {
        Self::opened(request, End::Link(end))
    }

    fn opened(request: &Header, end: End) -> Self {
        let ports = (request.destination_port, request.source_port);
        let mut stream = Self::new(ports, request.source_cid, end, State::Open);
        stream.take_credit(request);
        stream.due.response = true;
        stream
    }

    fn new(ports: Ports, guest_cid: u64, end: End, state: State) -> Self {
        Self {
            ports,
            guest_cid,
            end,
            state,
            due: Due::default(),
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer_size: 0,
            guest_forwarded: Wrapping(0),
            credit_asked: false,
            readable: true,
            writable: true,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
            shutdown_told: 0,
            write_half_shut: false,
            read_half_shut: false,
            deadline: None,
            queued: false,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host's socket; the guest link has none.
    pub fn socket(&self) -> Option<&OwnedFd> {
        match &self.end {
            End::Socket(socket) => Some(socket),
            End::Link(_) => None,
        }
    }

    /// Nothing is left to be done.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// The guest knows this stream: packets with its ports belong to it.
    pub fn is_known_to_guest(&self) -> bool {
        matches!(self.state, State::Requested | State::Open)
    }

    /// Both sides agreed on it.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// When to call [`Self::on_deadline`].
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Its time is up: the guest gets a reset, the host the end of its stream.
    pub fn on_deadline(&mut self) {
        self.deadline = None;
        self.abort();
    }

    /// Ends the stream from our side; what was not delivered is lost.
    pub fn abort(&mut self) {
        self.buffer = VecDeque::new();
        if self.is_known_to_guest() {
            self.due.reset = true;
        } else {
            self.state = State::Over;
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer_size = header.buffer_size;
        self.guest_forwarded = Wrapping(header.forwarded);
        self.credit_asked = false;
    }

    /// Bytes the guest has room for. Numbers that make no sense mean none.
    fn credit(&self) -> u32 {
        let credit = self.guest_buffer_size.saturating_sub((self.sent - self.guest_forwarded).0);
        match self.end {
            // A record is sent whole or not at all.
            End::Link(_) if credit < RECORD_MAX => 0,
            _ => credit,
        }
    }

    /// A packet of this stream arrived from the guest; `payload` has exactly `header.length` bytes.
    ///
    /// # Errors
    /// Guest memory went away.
    pub fn on_packet(
        &mut self,
        header: &Header,
        payload: Reader<'_>,
        buffers: &mut IoVecs,
        on_link: &mut dyn FnMut(LinkRecord),
    ) -> Result<(), ChainError> {
        self.take_credit(header);
        match (header.operation, self.state) {
            (Operation::Reset, _) => self.on_reset(),
            // The stream is broken off: bytes behind a gap must not reach the host.
            _ if self.due.reset => {}
            (Operation::Response, State::Requested) => self.on_response(),
            (Operation::Shutdown, State::Open) => {
                self.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
                self.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
                self.settle();
            }
            (Operation::Data, State::Open) if self.guest_sends => self.deliver(payload, buffers, on_link)?,
            (Operation::CreditUpdate, State::Open) => {}
            (Operation::CreditRequest, State::Open) => self.due.credit_update = true,
            _ => self.abort(),
        }
        Ok(())
    }

    fn on_reset(&mut self) {
        self.due = Due::default();
        (self.guest_sends, self.guest_receives) = (false, false);
        if self.buffer.is_empty() {
            self.state = State::Over;
        } else {
            self.state = State::Draining;
            self.deadline = Some(Instant::now() + LINGER_TIME);
        }
    }

    fn on_response(&mut self) {
        self.state = State::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.ports.0);
        if let End::Socket(socket) = &self.end {
            // The socket is empty: a short line is sent whole, or the client is gone.
            if socket::send(socket.as_fd(), line.as_bytes()).ok() != Some(line.len()) {
                self.abort();
            }
        }
    }

    /// Passes bytes on to the host: straight from guest memory as long as it takes them, the rest through the buffer.
    fn deliver(
        &mut self,
        mut payload: Reader<'_>,
        buffers: &mut IoVecs,
        on_link: &mut dyn FnMut(LinkRecord),
    ) -> Result<(), ChainError> {
        let room = (BUFFER as usize).saturating_sub(self.buffer.len());
        if payload.left() > room {
            self.abort();
            return Ok(());
        }
        let socket = match &mut self.end {
            End::Socket(socket) => socket,
            End::Link(link) => {
                while payload.left() > 0 {
                    let mut bytes = [0; 256];
                    let part = bytes.get_mut(..payload.left().min(256)).unwrap_or_default();
                    payload.read(part)?;
                    self.forwarded += u32::try_from(part.len()).unwrap_or(0);
                    if link.take(part, on_link).is_err() {
                        self.abort();
                        return Ok(());
                    }
                }
                self.tell_credit();
                return Ok(());
            }
        };
        let mut refused = None;
        if self.buffer.is_empty() && self.writable && self.host_receives {
            buffers.clear();
            buffers.add_readable(payload)?;
            while buffers.left() > 0 && refused.is_none() {
                match buffers.send_to(socket.as_fd()) {
                    Ok(count) => {
                        buffers.advance(count);
                        payload.split(count)?;
                        self.forwarded += u32::try_from(count).unwrap_or(0);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => refused = Some(error),
                }
            }
        }
        if let Some(error) = refused {
            self.on_refusal(&error);
        }
        if self.host_receives {
            let mut rest = vec![0; payload.left()];
            payload.read(&mut rest)?;
            self.buffer.extend(rest);
        } else {
            // Nobody is going to read it: as good as forwarded.
            self.forwarded += u32::try_from(payload.left()).unwrap_or(0);
        }
        self.tell_credit();
        Ok(())
    }

    fn on_refusal(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ => self.host_left(),
        }
    }

    /// The host reads no more.
    fn host_left(&mut self) {
        self.host_receives = false;
        self.forwarded += u32::try_from(self.buffer.len()).unwrap_or(0);
        self.buffer = VecDeque::new();
    }

    /// Tells the guest its credit when half of what we promised is free again without its knowing.
    fn tell_credit(&mut self) {
        if (self.forwarded - self.forwarded_told).0 >= BUFFER / 2 {
            self.due.credit_update = true;
        }
    }

    /// The host's socket has these events (`EPOLL…`).
    pub fn on_socket(&mut self, events: u32) {
        let has = |event: EventSet| events & event.bits() != 0;
        self.readable |= has(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        self.writable |= has(EventSet::OUT | EventSet::ERROR);
        if has(EventSet::HANG_UP) {
            self.host_left();
            if self.state == State::Requested {
                self.abort();
            }
        }
        self.drain();
    }

    fn drain(&mut self) {
        while self.writable && !self.buffer.is_empty() {
            let End::Socket(socket) = &self.end else { return };
            match socket::send(socket.as_fd(), self.buffer.as_slices().0) {
                Ok(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.forwarded += u32::try_from(count).unwrap_or(0);
                }
                Err(error) => self.on_refusal(&error),
            }
        }
        if self.buffer.is_empty() {
            self.buffer = VecDeque::new();
        }
        self.tell_credit();
        self.settle();
    }

    /// Passes the ends of the guest's halves on to the host once all bytes before them are delivered.
    fn settle(&mut self) {
        if let End::Socket(socket) = &self.end {
            if !self.guest_receives && !self.read_half_shut {
                self.read_half_shut = true;
                socket::shut_down(socket.as_fd(), Half::Read);
            }
            if !self.guest_sends && self.buffer.is_empty() && !self.write_half_shut {
                self.write_half_shut = true;
                socket::shut_down(socket.as_fd(), Half::Write);
            }
        }
        if !self.guest_sends && self.buffer.is_empty() {
            match self.state {
                State::Draining => self.state = State::Over,
                // The answer to a shutdown of both halves (virtio 1.3 section 5.10.6.5).
                State::Open if !self.guest_receives => self.due.reset = true,
                _ => {}
            }
        }
    }

    fn shutdown_flags(&self) -> u32 {
        let receive = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        let send = if self.host_sends { 0 } else { SHUTDOWN_SEND };
        receive | send
    }

    fn has_data(&self) -> bool {
        let possible = self.state == State::Open && self.host_sends && self.guest_receives;
        possible
            && match &self.end {
                End::Socket(_) => self.readable,
                End::Link(link) => link.has_records(),
            }
    }

    /// Whether there is a packet for the guest.
    pub fn wants_to_send(&mut self) -> bool {
        if self.has_data() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.due.credit_request = true;
        }
        let due = &self.due;
        let control = due.request || due.response || due.reset || due.credit_update || due.credit_request;
        self.state != State::Draining
            && (control
                || (self.state == State::Open && self.shutdown_flags() != self.shutdown_told)
                || (self.has_data() && self.credit() > 0))
    }

    fn header(&mut self, operation: Operation, length: u32) -> Header {
        self.forwarded_told = self.forwarded;
        self.due.credit_update = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: self.ports.0,
            destination_port: self.ports.1,
            length,
            kind: TYPE_STREAM,
            operation,
            flags: if operation == Operation::Shutdown { self.shutdown_told } else { 0 },
            buffer_size: BUFFER,
            forwarded: self.forwarded.0,
        }
    }

    /// Fills `chain` with the next packet; its length, or `None` when there is none after all.
    ///
    /// # Errors
    /// The chain is too short.
    pub fn send(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        buffers: &mut IoVecs,
    ) -> Result<Option<u32>, ChainError> {
        let mut payload = chain.writer(memory);
        let mut front = payload.split(HEADER)?;
        let Some(operation) = self.next_control() else {
            let sent = match &self.end {
                End::Link(_) => self.send_record(&mut payload)?,
                End::Socket(_) => self.send_bytes(payload, buffers)?,
            };
            let header = match sent {
                Some(length) => self.header(Operation::Data, length),
                None if self.state == State::Open && self.shutdown_flags() != self.shutdown_told => {
                    self.shutdown()
                }
                None if self.due.credit_update => self.header(Operation::CreditUpdate, 0),
                None => return Ok(None),
            };
            front.write(&header.to_bytes())?;
            return Ok(Some(header.length + HEADER_LENGTH));
        };
        let header = self.header(operation, 0);
        front.write(&header.to_bytes())?;
        Ok(Some(HEADER_LENGTH))
    }

    /// The next packet that goes before data.
    fn next_control(&mut self) -> Option<Operation> {
        let due = &mut self.due;
        if std::mem::take(&mut due.reset) {
            self.state = State::Over;
            return Some(Operation::Reset);
        }
        if std::mem::take(&mut due.request) {
            return Some(Operation::Request);
        }
        if std::mem::take(&mut due.response) {
            return Some(Operation::Response);
        }
        if std::mem::take(&mut due.credit_request) {
            return Some(Operation::CreditRequest);
        }
        None
    }

    fn shutdown(&mut self) -> Header {
        self.shutdown_told = self.shutdown_flags();
        if self.shutdown_told == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
            self.deadline = Some(Instant::now() + LINGER_TIME);
        }
        self.header(Operation::Shutdown, 0)
    }

    fn send_record(&mut self, payload: &mut Writer<'_>) -> Result<Option<u32>, ChainError> {
        let End::Link(link) = &self.end else { return Ok(None) };
        if !self.has_data() || self.credit() == 0 {
            return Ok(None);
        }
        if payload.left() < RECORD_MAX as usize {
            return Err(ChainError::TooShort { wanted: RECORD_MAX as usize, left: payload.left() });
        }
        let Some(record) = link.next_record() else { return Ok(None) };
        payload.write(&record)?;
        let length = u32::try_from(record.len()).unwrap_or(0);
        self.sent += length;
        Ok(Some(length))
    }

    fn send_bytes(
        &mut self,
        mut payload: Writer<'_>,
        buffers: &mut IoVecs,
    ) -> Result<Option<u32>, ChainError> {
        let End::Socket(socket) = &self.end else { return Ok(None) };
        let space = payload.left().min(self.credit() as usize).min(BUFFER as usize);
        if !self.has_data() || self.credit() == 0 {
            return Ok(None);
        }
        if payload.left() == 0 {
            return Err(ChainError::TooShort { wanted: 1, left: 0 });
        }
        buffers.clear();
        buffers.add_writable(payload.split(space)?)?;
        match buffers.read_from(socket.as_fd()) {
            Ok(0) => {
                self.host_sends = false;
                Ok(None)
            }
            Ok(count) => {
                let length = u32::try_from(count).unwrap_or(0);
                self.sent += length;
                Ok(Some(length))
            }
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::WouldBlock => self.readable = false,
                    io::ErrorKind::Interrupted => {}
                    _ => {
                        self.host_sends = false;
                        self.host_left();
                    }
                }
                Ok(None)
            }
        }
    }
}
