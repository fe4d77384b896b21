//! Frames over a stream that neither side may block: bounded buffers in both directions.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::frame::{Frame, HEADER, NotAFrame, PAYLOAD_MAX, decode_header};
use nix::sys::socket::Shutdown;

use crate::link::{is_transient, set_nonblocking};
use crate::sys;

/// More output is read from a command only while less than this waits to be sent.
const OUTBOX_LOW: usize = 128 << 10;
/// Bytes moved by one read.
pub const CHUNK: usize = 64 << 10;

/// Why a stream ends early.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side is gone.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    /// The other side does not keep to the protocol.
    #[error("a frame that is none")]
    Protocol(#[from] NotAFrame),
}

/// One connection.
pub struct Wire {
    connection: File,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    sent: usize,
}

impl Wire {
    /// Takes over a connected stream of any kind.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(connection: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&connection)?;
        Ok(Self { connection: connection.into(), inbox: vec![], outbox: vec![], sent: 0 })
    }

    /// The descriptor, to be waited for.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// True while bytes wait to be sent.
    pub fn has_output(&self) -> bool {
        self.sent < self.outbox.len()
    }

    /// True while there is room for more output.
    pub fn wants_output(&self) -> bool {
        self.outbox.len() - self.sent < OUTBOX_LOW
    }

    /// True while there is room for more input: never more than one whole frame is kept.
    pub fn wants_input(&self) -> bool {
        self.inbox.len() < HEADER + PAYLOAD_MAX
    }

    /// Puts a frame behind those that wait to be sent.
    pub fn send(&mut self, frame: &Frame) {
        let json = |request: &_| serde_json::to_vec(request).ok();
        if let Some(bytes) = frame.encode(json) {
            self.outbox.extend(bytes);
        }
    }

    /// Sends what can be sent now; the answer is the number of bytes.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn flush(&mut self) -> io::Result<usize> {
        let before = self.sent;
        while let Some(rest) = self.outbox.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.connection.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length,
                Err(error) if is_transient(&error) => break,
                Err(error) => return Err(error),
            }
        }
        let moved = self.sent - before;
        if self.sent == self.outbox.len() {
            self.outbox.clear();
            self.sent = 0;
        } else if self.sent >= OUTBOX_LOW {
            self.outbox.drain(..self.sent);
            self.sent = 0;
        }
        Ok(moved)
    }

    /// Reads what is there, up to [`CHUNK`] bytes.
    ///
    /// # Errors
    /// The other side is gone or has closed its half.
    pub fn fill(&mut self) -> io::Result<()> {
        let old = self.inbox.len();
        self.inbox.resize(old + CHUNK, 0);
        let result = self.connection.read(self.inbox.get_mut(old..).unwrap_or(&mut []));
        self.inbox.truncate(old + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if !is_transient(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Tells the other side that nothing follows, and takes what it still sends until it closes or `limit` is over. A
    /// connection that is closed with unread bytes in it is reset, and a reset may overtake the last frame.
    pub fn finish(mut self, limit: Duration) {
        if nix::sys::socket::shutdown(self.connection.as_raw_fd(), Shutdown::Write).is_err() {
            return;
        }
        let end = Instant::now() + limit;
        loop {
            self.inbox.clear();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sys::poll(&[(self.connection.as_fd(), libc::POLLIN)], Some(left));
            if self.fill().is_err() {
                return;
            }
        }
    }

    /// The next frame, if all of it is here.
    ///
    /// # Errors
    /// The bytes are no frame.
    pub fn next(&mut self) -> Result<Option<Frame>, NotAFrame> {
        let Some(header) = self.inbox.first_chunk() else { return Ok(None) };
        let (kind, length) = decode_header(*header)?;
        let Some(payload) = self.inbox.get(HEADER..HEADER + length) else { return Ok(None) };
        let frame = Frame::decode(kind, payload.to_vec(), |text| serde_json::from_slice(text).ok());
        self.inbox.drain(..HEADER + length);
        frame.map(Some)
    }
}
