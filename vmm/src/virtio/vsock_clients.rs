//! Host clients of the vsock device that have not said yet what they want: `CONNECT <port>\n`, in a bounded time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::device::Watch;
use super::socket;

/// How long a client may take for its first line.
const LINE_TIME: Duration = Duration::from_secs(2);
/// Longest first line in bytes.
const LINE_MAX: usize = 32;
/// Most clients at a time; further ones wait in the listener's backlog.
const CLIENTS_MAX: usize = 128;

struct Client {
    socket: OwnedFd,
    deadline: Instant,
}

/// The clients, by the token under which their sockets are watched.
pub(super) struct Clients {
    waiting: BTreeMap<u64, Client>,
    /// The listener may have more.
    more: bool,
}

/// What is watched of the host's end of a stream.
pub(super) const CLIENT_EVENTS: EventSet =
    EventSet::IN.union(EventSet::OUT).union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

impl Clients {
    pub(super) fn new() -> Self {
        Self { waiting: BTreeMap::new(), more: true }
    }

    pub(super) fn count(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.waiting.contains_key(&id)
    }

    /// The listener has clients.
    pub(super) fn on_listener(&mut self) {
        self.more = true;
    }

    /// Whether [`Self::on_tick`] has to be called: for deadlines, or because the listener could not be emptied.
    pub(super) fn have_deadlines(&self) -> bool {
        self.more || !self.waiting.is_empty()
    }

    /// Accepts a client under the token `id`; false when there is none or no room.
    pub(super) fn accept(&mut self, listener: BorrowedFd<'_>, id: u64, watch: &mut dyn Watch) -> bool {
        while self.more && self.waiting.len() < CLIENTS_MAX {
            match socket::accept(listener) {
                Ok(socket) => {
                    if watch.add(socket.as_raw_fd(), CLIENT_EVENTS.bits(), id).is_ok() {
                        self.waiting.insert(id, Client { socket, deadline: Instant::now() + LINE_TIME });
                        return true;
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => self.more = false,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // No descriptor is left, for example: tried again when a stream ends or the timer ticks.
                    _ => return false,
                },
            }
        }
        false
    }

    /// Looks whether a client has written its line: the port it wants and its socket, still watched. A client that writes
    /// something else is closed.
    pub(super) fn on_line(&mut self, id: u64, events: u32, watch: &mut dyn Watch) -> Option<(u32, OwnedFd)> {
        let ended = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        let has_ended = events & ended.bits() != 0;
        let port = match look(self.waiting.get(&id)?.socket.as_fd()) {
            Line::Port(port) => Some(port),
            Line::Partial if !has_ended => return None,
            Line::Partial | Line::Wrong => None,
        };
        let Client { socket, .. } = self.waiting.remove(&id)?;
        if port.is_none() {
            watch.remove(socket.as_raw_fd());
        }
        Some((port?, socket))
    }

    /// Closes the clients whose time is up.
    pub(super) fn on_tick(&mut self, now: Instant, watch: &mut dyn Watch) {
        for (_, client) in self.waiting.extract_if(.., |_, client| client.deadline <= now) {
            watch.remove(client.socket.as_raw_fd());
        }
    }

    /// Closes all.
    pub(super) fn close_all(&mut self, watch: &mut dyn Watch) {
        for client in std::mem::take(&mut self.waiting).into_values() {
            watch.remove(client.socket.as_raw_fd());
        }
        self.more = false;
    }
}

enum Line {
    Port(u32),
    Partial,
    Wrong,
}

/// Takes the line from the socket when it is complete. What comes behind it stays there.
fn look(socket: BorrowedFd<'_>) -> Line {
    let mut line = [0; LINE_MAX];
    let count = match socket::receive(socket, &mut line, true) {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Line::Partial,
        Err(_) => return Line::Wrong,
    };
    let seen = line.get(..count).unwrap_or_default();
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if (1..LINE_MAX).contains(&count) { Line::Partial } else { Line::Wrong };
    };
    let line = line.get_mut(..=end).unwrap_or_default();
    let whole = socket::receive(socket, line, false).is_ok_and(|taken| taken == end + 1);
    parse(line).filter(|_| whole).map_or(Line::Wrong, Line::Port)
}

/// The port in `CONNECT <port>\n`.
fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    let digits = !port.is_empty() && port.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(port).ok().filter(|_| digits)?.parse().ok()
}
