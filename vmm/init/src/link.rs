//! The guest link: tells the host what happened and hears when to stop.
//!
//! What there is to tell only grows, but for the health, of which the newest is told. A connection begins with all of it from the start, so that a host that was away
//! (or a VM that was restored from a snapshot) knows as much as one that was there all the time.

use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::identity;
use blixard_vmm_api::guest::LinkRecord;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// First pause after a connection that failed; it doubles up to [`PAUSE_MAX`]. Nothing announces that the host
/// listens, so that waiting is all there is.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    #[error("the host sent what is no record for a guest")]
    Protocol,
}

/// The link as the rest of init sees it.
pub struct Link {
    shared: Arc<Shared>,
    wake: PipeWriter,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Everything there is to tell, in order.
    told: Vec<LinkRecord>,
    /// How much of it was given to the present connection.
    taken: usize,
    /// How much of it has been written to the present connection.
    written: usize,
}

impl State {
    fn push(&mut self, record: LinkRecord) {
        let is_health = |record: &LinkRecord| matches!(record, LinkRecord::Health(_));
        // So that what is kept stays small, however often it changes.
        if is_health(&record)
            && let Some(at) = self.told.iter().position(is_health)
        {
            self.told.remove(at);
            self.taken -= usize::from(at < self.taken);
            self.written -= usize::from(at < self.written);
        }
        self.told.push(record);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Starts the thread that keeps the link. `connect` makes a connection; `stop` is sent to when the host says stop.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start<T: Send + 'static>(
        connect: impl Fn() -> io::Result<OwnedFd> + Send + 'static,
        stop: Sender<T>,
        message: impl Fn() -> T + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.lock().told.push(LinkRecord::Started);
        let (woken, wake) = io::pipe()?;
        set_nonblocking(&woken)?;
        let keeper = Arc::clone(&shared);
        let on_stop = move || {
            // Init that is gone needs no stopping.
            let _gone = stop.send(message());
        };
        std::thread::Builder::new()
            .name("link".into())
            .spawn(move || keep(&keeper, &woken, &connect, &on_stop))?;
        Ok(Self { shared, wake })
    }

    /// Tells the host, now or when it is there again.
    pub fn tell(&self, record: LinkRecord) {
        self.shared.lock().push(record);
        // A full pipe wakes as well as one more byte.
        let _woken = (&self.wake).write(&[1]);
    }

    /// Waits until the host's side has taken everything; false when that took longer than `limit`.
    pub fn flush(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.shared.lock();
        while state.written < state.told.len() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// Makes reads and writes of a descriptor return instead of wait.
///
/// # Errors
/// As fcntl(2).
pub fn set_nonblocking(descriptor: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn keep(shared: &Shared, woken: &PipeReader, connect: &dyn Fn() -> io::Result<OwnedFd>, on_stop: &dyn Fn()) {
    let mut pause = PAUSE_MIN;
    loop {
        if let Ok(connection) = connect() {
            pause = PAUSE_MIN;
            // The reason does not matter: whatever it was, the answer is a new connection.
            let _ended = converse(shared, woken, File::from(connection), on_stop);
            let mut state = shared.lock();
            (state.taken, state.written) = (0, 0);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Runs one connection until it breaks.
fn converse(shared: &Shared, woken: &PipeReader, link: File, on_stop: &dyn Fn()) -> Result<(), LinkError> {
    set_nonblocking(&link)?;
    let (mut inbox, mut outbox) = (vec![], vec![]);
    loop {
        {
            let mut state = shared.lock();
            outbox.extend(state.told.iter().skip(state.taken).flat_map(LinkRecord::encode));
            state.taken = state.told.len();
        }
        let written = write_some(&link, &outbox)?;
        outbox.drain(..written);
        if outbox.is_empty() {
            let mut state = shared.lock();
            state.written = state.taken;
            drop(state);
            shared.changed.notify_all();
        }
        let wanted =
            if outbox.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        let mut ready = [PollFd::new(link.as_fd(), wanted), PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
        let _interrupted = poll(&mut ready, PollTimeout::NONE);
        let mut bytes = [0; 64];
        while let Ok(1..) = (&mut &*woken).read(&mut bytes) {}
        match (&link).read(&mut bytes) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(length) => inbox.extend_from_slice(bytes.get(..length).unwrap_or(&[])),
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(record) = LinkRecord::decode(&mut inbox).map_err(|_| LinkError::Protocol)? {
            match record {
                LinkRecord::Stop => on_stop(),
                LinkRecord::Restored(identity) => identity::refresh(&identity),
                _ => return Err(LinkError::Protocol),
            }
        }
    }
}

/// True if the same call may succeed later.
pub fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn write_some(mut link: &File, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match link.write(bytes) {
        Err(error) if is_transient(&error) => Ok(0),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::mpsc;

    use blixard_vmm_api::guest::WorkloadExit;
    use blixard_vmm_api::health::{Health, HealthState};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn next(host: &mut UnixStream, buffer: &mut Vec<u8>) -> LinkRecord {
        host.set_read_timeout(Some(LIMIT)).unwrap();
        loop {
            if let Some(record) = LinkRecord::decode(buffer).unwrap() {
                return record;
            }
            let mut byte = [0];
            host.read_exact(&mut byte).unwrap();
            buffer.extend(byte);
        }
    }

    #[test]
    fn a_host_that_comes_back_is_told_everything_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let listener = UnixListener::bind(&path).unwrap();
        let (stop, stopped) = mpsc::channel();
        let link = Link::start(move || Ok(UnixStream::connect(&path)?.into()), stop, || "stop").unwrap();
        let (mut host, mut buffer) = (listener.accept().unwrap().0, vec![]);
        assert_eq!(next(&mut host, &mut buffer), LinkRecord::Started);
        link.tell(LinkRecord::Ready);
        assert_eq!(next(&mut host, &mut buffer), LinkRecord::Ready);
        drop(host);

        let (mut host, mut buffer) = (listener.accept().unwrap().0, vec![]);
        assert_eq!(next(&mut host, &mut buffer), LinkRecord::Started);
        assert_eq!(next(&mut host, &mut buffer), LinkRecord::Ready);
        let exit = LinkRecord::WorkloadExited(WorkloadExit::Code(3));
        link.tell(exit.clone());
        assert!(link.flush(LIMIT));
        assert_eq!(next(&mut host, &mut buffer), exit);
        host.write_all(&LinkRecord::Stop.encode()).unwrap();
        assert_eq!(stopped.recv_timeout(LIMIT).unwrap(), "stop");
    }

    #[test]
    fn of_the_health_the_newest_is_told_once_and_the_rest_stays_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let listener = UnixListener::bind(&path).unwrap();
        let (stop, _stopped) = mpsc::channel();
        let link = Link::start(move || Ok(UnixStream::connect(&path)?.into()), stop, || ()).unwrap();
        let health = |state| LinkRecord::Health(Health { state, output: String::new() });
        let (mut host, mut buffer) = (listener.accept().unwrap().0, vec![]);
        link.tell(health(HealthState::Starting));
        link.tell(LinkRecord::Ready);
        for expected in [LinkRecord::Started, health(HealthState::Starting), LinkRecord::Ready] {
            assert_eq!(next(&mut host, &mut buffer), expected);
        }
        for state in [HealthState::Healthy, HealthState::Unhealthy] {
            link.tell(health(state));
            assert_eq!(next(&mut host, &mut buffer), health(state));
        }
        assert!(link.flush(LIMIT));
        drop(host);
        let (mut host, mut buffer) = (listener.accept().unwrap().0, vec![]);
        for expected in [LinkRecord::Started, LinkRecord::Ready, health(HealthState::Unhealthy)] {
            assert_eq!(next(&mut host, &mut buffer), expected);
        }
    }

    #[test]
    fn bytes_that_are_no_record_end_the_connection_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let listener = UnixListener::bind(&path).unwrap();
        let (stop, stopped) = mpsc::channel();
        let _link = Link::start(move || Ok(UnixStream::connect(&path)?.into()), stop, || ()).unwrap();
        let (mut host, _) = listener.accept().unwrap();
        host.write_all(&[99, 0, 0, 0]).unwrap();
        let (mut host, mut buffer) = (listener.accept().unwrap().0, vec![]);
        assert_eq!(next(&mut host, &mut buffer), LinkRecord::Started);
        host.write_all(&LinkRecord::Stop.encode()).unwrap();
        stopped.recv_timeout(LIMIT).unwrap();
    }

    #[test]
    fn waiting_for_a_host_that_is_not_there_ends() {
        let (stop, _stopped) = mpsc::channel();
        let link = Link::start(|| Err(ErrorKind::NotFound.into()), stop, || ()).unwrap();
        assert!(!link.flush(Duration::from_millis(20)));
    }
}
