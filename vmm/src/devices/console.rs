//! The console in the I/O thread: what the guest prints goes to a log, to one client, to standard output; what is typed
//! there goes to the guest.
//!
//! The last 64 KiB are kept. A reader is a position in that history: a late one starts with what is kept, a slow one loses
//! the oldest bytes, and none of them holds up the guest or the others.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::devices::serial::Serial;
use crate::poll::{Owner, Poll};

/// Bytes kept for late and slow readers.
pub const HISTORY_MAX: usize = 64 << 10;
/// Log size when none is configured.
const LOG_BYTES: u64 = 8 << 20;
/// A pipe that polls writable takes this many bytes at once (`PIPE_BUF`).
const PIPE_BYTES: usize = 4096;

const IN: u32 = libc::EPOLLIN.cast_unsigned();
const OUT: u32 = libc::EPOLLOUT.cast_unsigned();

const LISTENER: u64 = 0;
const CLIENT: u64 = 1;
const STDIN: u64 = 2;
const STDOUT: u64 = 3;

struct Log {
    file: File,
    size: u64,
    max: u64,
}

impl Log {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(HISTORY_MAX) {
            if self.size >= self.max {
                self.file.set_len(0)?;
                self.size = 0;
            }
            self.file.write_all_at(part, self.size)?;
            self.size += u64::try_from(part.len()).unwrap_or(0);
        }
        Ok(())
    }
}

struct Client {
    stream: UnixStream,
    sent: u64,
    /// What is watched now.
    events: u32,
}

/// How long a reader of standard output may pause at the end of a VM.
const READER_MS: c_int = 2000;

/// What became of an attempt to write.
enum Written {
    All,
    Blocked,
    Broken,
}

/// The console.
pub struct Console {
    serial: Arc<Serial>,
    history: VecDeque<u8>,
    /// Bytes ever printed; the history ends here.
    printed: u64,
    fresh: Vec<u8>,
    log: Option<Log>,
    log_failures: u64,
    listener: Option<OwnedFd>,
    client: Option<Client>,
    /// Position of standard output, when used.
    stdout: Option<u64>,
    stdout_watched: bool,
    stdin: bool,
    stdin_watched: bool,
}

impl Console {
    /// A console for `serial` without any reader.
    pub fn new(serial: Arc<Serial>) -> Self {
        Self {
            serial,
            history: VecDeque::new(),
            printed: 0,
            fresh: vec![],
            log: None,
            log_failures: 0,
            listener: None,
            client: None,
            stdout: None,
            stdout_watched: false,
            stdin: false,
            stdin_watched: false,
        }
    }

    /// Appends output to `file`, which starts anew at `max` bytes (0: 8 MiB).
    ///
    /// # Errors
    /// The size of the file cannot be found out.
    pub fn log_to(&mut self, file: File, max: u64) -> io::Result<()> {
        let size = file.metadata()?.len();
        self.log = Some(Log { file, size, max: if max == 0 { LOG_BYTES } else { max } });
        Ok(())
    }

    /// Accepts clients on `listener`.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn listen(&mut self, listener: OwnedFd, poll: &mut Poll) -> io::Result<()> {
        set_nonblocking(&listener)?;
        poll.add(Owner::Console, listener.as_raw_fd(), IN, LISTENER)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Uses standard input and output.
    pub fn use_stdio(&mut self, poll: &mut Poll) {
        self.stdout = Some(0);
        self.stdin = true;
        self.watch_stdin(poll);
    }

    /// The guest printed, or read what was typed.
    pub fn on_serial(&mut self, poll: &mut Poll) {
        self.take_output();
        self.write_out(poll);
        self.watch_stdin(poll);
        self.watch_client(poll, false);
    }

    /// A watched descriptor is ready.
    pub fn on_event(&mut self, token: u64, poll: &mut Poll) {
        match token {
            LISTENER => self.accept(poll),
            CLIENT => self.read_client(poll),
            STDIN => self.read_stdin(poll),
            _ => {}
        }
        self.write_out(poll);
    }

    /// The VM has ended: writes what can be written at once, and to standard output as long as its reader takes something
    /// at least every `READER_MS`.
    pub fn finish(&mut self, poll: &mut Poll) {
        self.take_output();
        self.write_out(poll);
        while self.stdout_watched && stdout_is_ready(READER_MS) {
            self.write_out(poll);
        }
    }

    /// Counters by name.
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        [
            ("printed_bytes", self.printed),
            ("lost_bytes", self.serial.lost()),
            ("log_failures", self.log_failures),
        ]
    }

    fn take_output(&mut self) {
        self.fresh.clear();
        self.serial.take_output(&mut self.fresh);
        if let Some(log) = &mut self.log {
            // A full disk must not end the VM; that bytes are missing is counted.
            self.log_failures += u64::from(log.append(&self.fresh).is_err());
        }
        self.printed += u64::try_from(self.fresh.len()).unwrap_or(0);
        self.history.extend(&self.fresh);
        let surplus = self.history.len().saturating_sub(HISTORY_MAX);
        self.history.drain(..surplus);
    }

    /// History from position `from` on, and the position where it really starts.
    fn since(&self, from: u64) -> (u64, [&[u8]; 2]) {
        let kept = u64::try_from(self.history.len()).unwrap_or(0);
        let from = from.max(self.printed - kept);
        let skip = kept - (self.printed - from);
        let skip = usize::try_from(skip).unwrap_or(0);
        let (first, second) = self.history.as_slices();
        let of_second = second.get(skip.saturating_sub(first.len())..).unwrap_or_default();
        (from, [first.get(skip..).unwrap_or_default(), of_second])
    }

    fn write_out(&mut self, poll: &mut Poll) {
        if let Some(from) = self.stdout {
            let (from, parts) = self.since(from);
            let (position, result) = write_parts(from, parts, write_stdout);
            self.stdout = (!matches!(result, Written::Broken)).then_some(position);
            let wanted = matches!(result, Written::Blocked);
            if wanted && !self.stdout_watched {
                self.stdout_watched = poll.add(Owner::Console, libc::STDOUT_FILENO, OUT, STDOUT).is_ok();
            } else if !wanted && self.stdout_watched {
                poll.remove(libc::STDOUT_FILENO);
                self.stdout_watched = false;
            }
        }
        if let Some(client) = &self.client {
            let (from, parts) = self.since(client.sent);
            let (position, result) = write_parts(from, parts, |bytes| (&client.stream).write(bytes));
            if let Some(client) = &mut self.client {
                client.sent = position;
            }
            match result {
                Written::Broken => self.drop_client(poll),
                Written::Blocked => self.watch_client(poll, true),
                Written::All => self.watch_client(poll, false),
            }
        }
    }

    fn watch_client(&mut self, poll: &mut Poll, blocked: bool) {
        let room = self.serial.room() > 0;
        let Some(client) = &mut self.client else { return };
        let events = if room { IN } else { 0 } | if blocked { OUT } else { client.events & OUT };
        let events = if blocked { events } else { events & !OUT };
        if events != client.events
            && poll.modify(Owner::Console, client.stream.as_raw_fd(), events, CLIENT).is_ok()
        {
            client.events = events;
        }
    }

    fn accept(&mut self, poll: &mut Poll) {
        let Some(listener) = &self.listener else { return };
        let Some(stream) = accept::<UnixStream>(listener) else { return };
        self.drop_client(poll);
        if poll.add(Owner::Console, stream.as_raw_fd(), IN, CLIENT).is_ok() {
            self.client = Some(Client { stream, sent: 0, events: IN });
        }
    }

    fn drop_client(&mut self, poll: &mut Poll) {
        if let Some(client) = self.client.take() {
            poll.remove(client.stream.as_raw_fd());
        }
    }

    fn read_client(&mut self, poll: &mut Poll) {
        let room = self.serial.room();
        let Some(client) = &mut self.client else { return };
        let mut bytes = [0; 512];
        let part = bytes.get_mut(..room.min(512)).unwrap_or_default();
        if part.is_empty() {
            return self.watch_client(poll, false);
        }
        match client.stream.read(part) {
            Ok(0) => self.drop_client(poll),
            Ok(count) => self.serial.type_in(part.get(..count).unwrap_or_default()),
            Err(error) if is_temporary(&error) => {}
            Err(_) => self.drop_client(poll),
        }
    }

    fn watch_stdin(&mut self, poll: &mut Poll) {
        let wanted = self.stdin && self.serial.room() > 0;
        if wanted && !self.stdin_watched {
            // A regular file cannot be watched; then nothing is typed.
            self.stdin_watched = poll.add(Owner::Console, libc::STDIN_FILENO, IN, STDIN).is_ok();
            self.stdin = self.stdin_watched;
        } else if !wanted && self.stdin_watched {
            poll.remove(libc::STDIN_FILENO);
            self.stdin_watched = false;
        }
    }

    fn read_stdin(&mut self, poll: &mut Poll) {
        let mut bytes = [0; 512];
        let room = self.serial.room().min(bytes.len());
        if room > 0 {
            // SAFETY: the buffer has at least `room` bytes; the descriptor is only read.
            let got = unsafe { libc::read(libc::STDIN_FILENO, bytes.as_mut_ptr().cast(), room) };
            match usize::try_from(got) {
                Ok(0) => self.stdin = false,
                Ok(count) => self.serial.type_in(bytes.get(..count).unwrap_or_default()),
                Err(_) => self.stdin = is_temporary(&io::Error::last_os_error()),
            }
        }
        self.watch_stdin(poll);
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn write_parts(
    mut position: u64,
    parts: [&[u8]; 2],
    mut write: impl FnMut(&[u8]) -> io::Result<usize>,
) -> (u64, Written) {
    for part in parts {
        let mut rest = part;
        while !rest.is_empty() {
            match write(rest) {
                Ok(0) => return (position, Written::Blocked),
                Ok(count) => {
                    position += u64::try_from(count).unwrap_or(0);
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return (position, Written::Blocked);
                }
                Err(_) => return (position, Written::Broken),
            }
        }
    }
    (position, Written::All)
}

/// True as soon as standard output takes bytes or is broken, false after `milliseconds`.
fn stdout_is_ready(milliseconds: c_int) -> bool {
    let mut poll = libc::pollfd { fd: libc::STDOUT_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: the pointer is to one pollfd.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) != 0 }
}

/// Writes to standard output without blocking; its mode belongs to others too and is not changed.
fn write_stdout(bytes: &[u8]) -> io::Result<usize> {
    if !stdout_is_ready(0) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let part = bytes.get(..bytes.len().min(PIPE_BYTES)).unwrap_or_default();
    // SAFETY: pointer and length are those of a slice.
    let count = unsafe { libc::write(libc::STDOUT_FILENO, part.as_ptr().cast(), part.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Makes an inherited listener nonblocking.
///
/// # Errors
/// The system's answer.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers are involved.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::O_NONBLOCK != 0 {
        return Ok(());
    }
    // SAFETY: no pointers are involved.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Accepts a connection, if there is one.
pub fn accept<S: From<OwnedFd>>(listener: &OwnedFd) -> Option<S> {
    accept_raw(listener.as_raw_fd()).map(S::from)
}

fn accept_raw(listener: RawFd) -> Option<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: null pointers mean that the peer's address is not wanted.
    let fd = unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    // SAFETY: a descriptor that is not negative was just made and nobody else owns it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ioapic::{IoApic, Signal};
    use crate::mailbox::Mailbox;
    use std::os::unix::net::UnixListener;

    struct NoSignal;
    impl Signal for NoSignal {
        fn signal(&self, _: u64, _: u32) {}
    }

    fn console() -> (Console, Arc<Serial>, Poll) {
        let ioapic = Arc::new(IoApic::new(Arc::new(NoSignal)));
        let serial = Arc::new(Serial::new(ioapic, Arc::new(Mailbox::new().unwrap()), Arc::default()));
        (Console::new(serial.clone()), serial, Poll::new().unwrap())
    }

    fn print(serial: &Serial, console: &mut Console, poll: &mut Poll, text: &[u8]) {
        for part in text.chunks(crate::devices::serial::OUTPUT_MAX) {
            part.iter().for_each(|byte| serial.write(0, *byte));
            console.on_serial(poll);
        }
    }

    fn connect(console: &mut Console, poll: &mut Poll) -> (UnixStream, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        console.listen(UnixListener::bind(&path).unwrap().into(), poll).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        console.on_event(LISTENER, poll);
        (stream, directory)
    }

    #[test]
    fn a_late_client_reads_what_was_printed_and_types() {
        let (mut console, serial, mut poll) = console();
        print(&serial, &mut console, &mut poll, b"early ");
        let (mut stream, _directory) = connect(&mut console, &mut poll);
        print(&serial, &mut console, &mut poll, b"late");
        let mut text = [0; 10];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"early late");
        stream.write_all(b"x").unwrap();
        console.on_event(CLIENT, &mut poll);
        assert_eq!(serial.read(0), b'x');
    }

    #[test]
    fn a_client_that_does_not_read_loses_old_bytes_and_holds_nothing_up() {
        let (mut console, serial, mut poll) = console();
        let (mut stream, _directory) = connect(&mut console, &mut poll);
        let text: Vec<u8> = (0..4 * 1024 * 1024u32).map(|n| b'a' + (n % 26) as u8).collect();
        print(&serial, &mut console, &mut poll, &text);
        print(&serial, &mut console, &mut poll, b"END");
        assert!(console.history.len() <= HISTORY_MAX);
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let (mut read, mut buffer) = (vec![], [0; 4096]);
        while !read.ends_with(b"END") {
            let count = stream.read(&mut buffer).unwrap();
            read.extend_from_slice(&buffer[..count]);
            console.on_event(STDOUT, &mut poll);
        }
        assert!(read.len() < text.len());
    }

    #[test]
    fn a_full_log_starts_anew() {
        let (mut console, serial, mut poll) = console();
        let file = tempfile::tempfile().unwrap();
        console.log_to(file.try_clone().unwrap(), 10).unwrap();
        for text in ["0123456789", "abc", "d"] {
            print(&serial, &mut console, &mut poll, text.as_bytes());
        }
        let mut log = [0; 10];
        let count = file.read_at(&mut log, 0).unwrap();
        assert_eq!(&log[..count], b"abcd");
    }
}
