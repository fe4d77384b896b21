//! All children of this process: started here, reaped here, signalled only while they are known to exist.
//!
//! One thread reaps everything, orphans of the guest included. A spawn and the entry of its process id are one step
//! under a lock that the reaper needs too, so that no child can be reaped before it is known, and no signal can reach
//! a process that got the number of a reaped one.

use std::collections::HashMap;
use std::io;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::WorkloadExit;

use crate::sys;

/// Called once, by the reaper, when a child has ended. Must not block.
pub type OnExit = Box<dyn FnOnce(WorkloadExit) + Send>;

/// The children of this process.
#[derive(Default)]
pub struct Children {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    spawned: u64,
    none_left: bool,
    watched: HashMap<i32, OnExit>,
}

/// A started child with the ends of its pipes.
pub struct Started {
    /// Process id; also its process group and session.
    pub pid: i32,
    /// Where its standard input is written, if it is a pipe.
    pub stdin: Option<ChildStdin>,
    /// Where its standard output is read, if it is a pipe.
    pub stdout: Option<ChildStdout>,
    /// Where its standard error is read, if it is a pipe.
    pub stderr: Option<ChildStderr>,
}

impl Children {
    /// Starts the thread that reaps. There must be one such object in a process.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> io::Result<Arc<Self>> {
        let children = Arc::new(Self::default());
        let reaper = Arc::clone(&children);
        std::thread::Builder::new().name("reaper".into()).spawn(move || reaper.reap_for_ever())?;
        Ok(children)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command`; `on_exit` hears how it ended.
    ///
    /// # Errors
    /// The program cannot be executed; `on_exit` is dropped.
    pub fn spawn(&self, command: &mut Command, on_exit: OnExit) -> io::Result<Started> {
        let mut state = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        state.watched.insert(pid, on_exit);
        state.spawned += 1;
        state.none_left = false;
        self.changed.notify_all();
        Ok(Started { pid, stdin: child.stdin, stdout: child.stdout, stderr: child.stderr })
    }

    /// Sends a signal to a child, if it has not been reaped.
    pub fn signal(&self, pid: i32, signal: i32) {
        self.signal_target(pid, pid, signal);
    }

    /// Sends a signal to the process group of a child, if that child has not been reaped.
    pub fn signal_group(&self, pid: i32, signal: i32) {
        self.signal_target(pid, -pid, signal);
    }

    fn signal_target(&self, pid: i32, target: i32, signal: i32) {
        let state = self.lock();
        if state.watched.contains_key(&pid) {
            // The only failure left is a signal number that the kernel does not have: nothing happens, as asked.
            let _refused = sys::kill(target, signal);
        }
    }

    /// Waits until this process has no child left, orphans included; false when it took longer than `limit`.
    pub fn wait_for_none(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while !state.none_left {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn reap_for_ever(&self) {
        let mut seen = 0;
        loop {
            match sys::wait_for_any_exit() {
                Ok(()) => {
                    let mut state = self.lock();
                    while let Some((pid, exit)) = sys::reap_one() {
                        if let Some(on_exit) = state.watched.remove(&pid) {
                            on_exit(exit);
                        }
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    // A child that was started after the call above has changed `spawned` by now or later.
                    let mut state = self.lock();
                    if state.spawned == seen {
                        state.none_left = true;
                        self.changed.notify_all();
                        while state.spawned == seen {
                            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                    seen = state.spawned;
                }
                Err(_interrupted) => {}
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::sync::{OnceLock, mpsc};

    use super::*;

    /// The one reaper of the test process.
    pub fn children() -> Arc<Children> {
        static ONE: OnceLock<Arc<Children>> = OnceLock::new();
        Arc::clone(ONE.get_or_init(|| Children::start().unwrap()))
    }

    fn exit_of(script: &str) -> WorkloadExit {
        let (send, receive) = mpsc::channel();
        let on_exit: OnExit = Box::new(move |exit| send.send(exit).unwrap());
        children().spawn(Command::new("/bin/sh").arg("-c").arg(script), on_exit).unwrap();
        receive.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn a_child_is_reaped_with_its_code() {
        assert_eq!(exit_of("exit 7"), WorkloadExit::Code(7));
    }

    #[test]
    fn a_child_ended_by_a_real_time_signal_is_reaped_too() {
        assert_eq!(exit_of("kill -40 $$"), WorkloadExit::Signal(40));
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error_and_does_not_disturb_the_reaper() {
        for _ in 0..20 {
            assert!(children().spawn(&mut Command::new("/nowhere"), Box::new(|_| ())).is_err());
        }
        assert_eq!(exit_of("exit 1"), WorkloadExit::Code(1));
    }
}
