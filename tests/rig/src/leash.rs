//! Child processes that never outlive the rig, and the two things that end them early: a signal and the
//! time limit.
//!
//! Every child gets `PR_SET_PDEATHSIG`, which the kernel sends when the *thread* that started it ends: so
//! children are started from the main thread only. Signals are blocked in the whole process and read by one
//! watching thread, which kills the children; whatever the main thread was waiting for then fails, and its
//! ordinary clean-up runs.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getpid, getppid};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What can go wrong with children and signals.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The signals could not be redirected to the watching thread.
    #[error("cannot watch for signals")]
    Watch(#[source] io::Error),
    /// The time limit could not be set.
    #[error("cannot set the time limit")]
    Limit(#[source] Errno),
    /// The program could not be started.
    #[error("cannot start {program}")]
    Start {
        /// Name of the program.
        program: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A child could not be waited for.
    #[error("cannot wait for a child process")]
    Wait(#[source] io::Error),
    /// A signal or the time limit came first.
    #[error("{0}")]
    Stopped(Stop),
}

/// Why everything has to end before the command did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// The time limit passed.
    #[error("the time limit has passed")]
    Limit,
    /// This signal came.
    #[error("stopped by signal {0}")]
    Signal(u8),
}

impl Stop {
    /// Exit code of the rig: 124 as `timeout(1)` has it, 128 + n as shells have it.
    pub fn code(self) -> u8 {
        match self {
            Self::Limit => 124,
            Self::Signal(number) => 128_u8.saturating_add(number),
        }
    }
}

/// How long after the time limit a host may still be asked what it does.
const GRACE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct State {
    children: Vec<(Pid, Kept)>,
    stop: Option<Stop>,
}

/// What the time limit does to a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Ends at the limit.
    No,
    /// Ends [`GRACE`] later, unless its owner has ended it: why a run took too long is asked of its hosts.
    AfterLimit,
}

#[derive(Default)]
struct Shared(Mutex<State>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is two plain values, whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers whether this is the first stop.
    fn stop(&self, why: Stop) -> bool {
        let mut state = self.lock();
        let first = state.stop.is_none();
        state.stop.get_or_insert(why);
        let spares = |kept: Kept| first && why == Stop::Limit && kept == Kept::AfterLimit;
        for (pid, _) in state.children.iter().filter(|(_, kept)| !spares(*kept)) {
            // Safe from hitting a stranger: a child leaves the list, under this lock, before it is reaped.
            _ = kill(*pid, Signal::SIGKILL);
        }
        first
    }
}

/// Holds all children and the watching thread.
pub struct Leash {
    shared: Arc<Shared>,
    limit: Arc<TimerFd>,
    finish: UnixStream,
    watcher: JoinHandle<()>,
}

impl Leash {
    /// Blocks the signals that end a program and starts to watch for them. To be called before any other
    /// thread exists, so that all threads inherit the mask.
    pub fn new() -> Result<Self, Error> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block().map_err(|e| Error::Watch(e.into()))?;
        let signals =
            SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(|e| Error::Watch(e.into()))?;
        let limit = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).map_err(Error::Limit)?;
        let limit = Arc::new(limit);
        let (finish, finished) = UnixStream::pair().map_err(Error::Watch)?;
        let shared = Arc::new(Shared::default());
        let watcher = std::thread::Builder::new().name("watch".into());
        let watcher = {
            let (shared, limit) = (Arc::clone(&shared), Arc::clone(&limit));
            watcher.spawn(move || watch(&shared, &signals, &limit, &finished)).map_err(Error::Watch)?
        };
        Ok(Self { shared, limit, finish, watcher })
    }

    /// From now on everything may last this long; zero takes the limit away.
    pub fn limit(&self, time: Duration) -> Result<(), Error> {
        if time.is_zero() {
            return self.limit.unset().map_err(Error::Limit);
        }
        let time = Expiration::OneShot(TimeSpec::from_duration(time));
        self.limit.set(time, TimerSetTimeFlags::empty()).map_err(Error::Limit)
    }

    /// Fails once a signal or the limit came: for loops that wait for something other than a child.
    pub fn check(&self) -> Result<(), Error> {
        self.shared.lock().stop.map_or(Ok(()), |why| Err(Error::Stopped(why)))
    }

    /// Starts a program that dies with this one. Main thread only (see the head of this file).
    pub fn start(&self, command: &mut Command) -> Result<Running, Error> {
        self.spawn(command, Kept::No)
    }

    /// Starts a program that outlives the time limit by [`GRACE`], to be asked what took so long.
    pub fn start_host(&self, command: &mut Command) -> Result<Running, Error> {
        self.spawn(command, Kept::AfterLimit)
    }

    fn spawn(&self, command: &mut Command, kept: Kept) -> Result<Running, Error> {
        let parent = getpid();
        let tie = move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the call above.
            if getppid() == parent { Ok(()) } else { Err(io::Error::from(Errno::ESRCH)) }
        };
        // SAFETY: between fork and exec only async-signal-safe work is allowed: `tie` makes two system calls
        // (prctl, getppid), allocates nothing and takes no lock; the error it builds holds a plain number.
        unsafe { command.pre_exec(tie) };
        let mut state = self.shared.lock();
        if let Some(why) = state.stop {
            return Err(Error::Stopped(why));
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|source| Error::Start { program, source })?;
        // Process numbers are positive and fit by definition (pid_t).
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
        state.children.push((pid, kept));
        Ok(Running { child, pid, shared: Arc::clone(&self.shared), reaped: None })
    }

    /// Runs a program to its end.
    pub fn run(&self, command: &mut Command) -> Result<ExitStatus, Error> {
        let status = self.start(command)?.wait()?;
        self.check()?;
        Ok(status)
    }

    /// Stops watching and tells whether a signal or the limit came. A signal that was sent to the whole
    /// terminal group before a child died of it is always seen.
    pub fn finish(self) -> Option<Stop> {
        drop(self.finish);
        _ = self.watcher.join();
        self.shared.lock().stop
    }
}

fn watch(shared: &Shared, signals: &SignalFd, limit: &TimerFd, finished: &UnixStream) {
    loop {
        let mut waiting =
            [signals.as_fd(), limit.as_fd(), finished.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return,
        }
        let [signal, time, finish] = waiting.map(|fd| fd.any() == Some(true));
        if signal && let Ok(Some(info)) = signals.read_signal() {
            let why = Stop::Signal(u8::try_from(info.ssi_signo).unwrap_or(0));
            if shared.lock().stop.is_some() {
                // Asked twice: do not wait for a tidy end. Children die with us.
                std::process::exit(i32::from(why.code()));
            }
            shared.stop(why);
        }
        if time && limit.wait().is_ok() && shared.stop(Stop::Limit) {
            let again = Expiration::OneShot(TimeSpec::from_duration(GRACE));
            if limit.set(again, TimerSetTimeFlags::empty()).is_err() {
                shared.stop(Stop::Limit);
            }
        }
        if finish && !signal {
            return;
        }
    }
}

/// A child on the leash. Dropping it kills it.
pub struct Running {
    child: Child,
    pid: Pid,
    shared: Arc<Shared>,
    reaped: Option<ExitStatus>,
}

impl Running {
    /// The standard streams that were asked for as pipes.
    pub fn streams(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        if let Some(status) = self.reaped {
            return Ok(status);
        }
        let wanted = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while let Err(error) = waitid(Id::Pid(self.pid), wanted) {
            if error != Errno::EINTR {
                return Err(Error::Wait(error.into()));
            }
        }
        // It is dead but still has its number: off the list first, then let the number go.
        self.shared.lock().children.retain(|(pid, _)| *pid != self.pid);
        let status = self.child.wait().map_err(Error::Wait)?;
        self.reaped = Some(status);
        Ok(status)
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        if self.reaped.is_some() {
            return true;
        }
        let wanted = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        !matches!(waitid(Id::Pid(self.pid), wanted), Ok(nix::sys::wait::WaitStatus::StillAlive))
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        if self.reaped.is_none() {
            _ = kill(self.pid, Signal::SIGKILL);
            _ = self.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_timeout_and_of_shells() {
        assert_eq!(Stop::Limit.code(), 124);
        assert_eq!(Stop::Signal(2).code(), 130);
        assert_eq!(Stop::Signal(15).code(), 143);
    }

    #[test]
    fn the_limit_kills_children_and_is_reported() {
        let leash = Leash::new().unwrap();
        leash.limit(Duration::from_millis(50)).unwrap();
        let mut child = leash.start(Command::new("sleep").arg("1000")).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(matches!(leash.check(), Err(Error::Stopped(Stop::Limit))));
        assert!(matches!(leash.start(&mut Command::new("true")), Err(Error::Stopped(Stop::Limit))));
        assert_eq!(leash.finish(), Some(Stop::Limit));
    }

    #[test]
    fn a_host_outlives_the_limit_to_be_asked_what_took_so_long() {
        let leash = Leash::new().unwrap();
        let mut host = leash.start_host(Command::new("sleep").arg("1000")).unwrap();
        let mut child = leash.start(Command::new("sleep").arg("1000")).unwrap();
        leash.limit(Duration::from_millis(50)).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!host.ended());
        leash.shared.stop(Stop::Limit);
        assert!(!host.wait().unwrap().success());
    }

    #[test]
    fn a_child_that_ends_by_itself_is_no_stop() {
        let leash = Leash::new().unwrap();
        let status = leash.run(Command::new("sh").args(["-c", "exit 7"])).unwrap();
        assert_eq!(status.code(), Some(7));
        assert_eq!(leash.finish(), None);
    }
}
