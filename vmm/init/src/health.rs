//! Health checks: runs a command again and again, and tells when the workload begins or ceases to do its work.
//!
//! A check is bounded in everything: one at a time, the end of its output is kept, and when its time is over its whole process
//! group is killed. Its output is not waited for once it has ended: what it left behind may hold the pipe for ever.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::health::{Health, HealthCheck, HealthState, OUTPUT_MAX};
use libc::{POLLHUP, POLLIN};

use crate::children::Children;
use crate::command::{self, NotStarted, Surroundings};
use crate::link::set_nonblocking;
use crate::sys;

/// How long a killed check may take to be gone. One that hangs in the kernel is one more failure each time, and no other
/// one is begun beside it.
const KILL_LIMIT: Duration = Duration::from_secs(2);
/// Most bytes that are read at once.
const CHUNK: usize = 4096;

/// The checks of a guest, until they are closed.
pub struct Checks {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Checks {
    /// Begins to check; `tell` hears each change.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        check: HealthCheck,
        children: Arc<Children>,
        tell: impl Fn(Health) + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let checks = Arc::new(Self { closed: Mutex::new(false), changed: Condvar::new() });
        let keeper = Arc::clone(&checks);
        let begin = Instant::now();
        tell(Health::starting());
        std::thread::Builder::new()
            .name("health".into())
            .spawn(move || keeper.repeat(&check, begin, &children, &tell))?;
        Ok(checks)
    }

    /// Begins no check any more.
    pub fn close(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn repeat(&self, check: &HealthCheck, begin: Instant, children: &Children, tell: &dyn Fn(Health)) {
        let mut judge = Judge::new(check, begin);
        let mut hangs: Option<PipeReader> = None;
        let interval = Duration::from_millis(check.interval_ms);
        loop {
            let open = self.changed.wait_timeout_while(self.lock(), interval, |closed| !*closed);
            if *open.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
            let begun = Instant::now();
            let found = match hangs.take().filter(|ended| !has_ended(ended, Duration::ZERO)) {
                Some(ended) => {
                    hangs = Some(ended);
                    Found::failed("the check before was killed and does not end".into())
                }
                None => self.once(check, children, &mut hangs),
            };
            if let Some(state) = judge.hear(found.success, begun) {
                tell(Health { state, output: found.output });
            }
        }
    }

    /// One check. What was killed and is not gone is left in `hangs`.
    fn once(&self, check: &HealthCheck, children: &Children, hangs: &mut Option<PipeReader>) -> Found {
        match self.begin(check, children) {
            Ok(Some(running)) => running.watch(Duration::from_millis(check.timeout_ms), children, hangs),
            // Closed meanwhile: nobody hears it.
            Ok(None) => Found::failed(String::new()),
            Err(reason) => Found::failed(reason.to_string()),
        }
    }

    fn begin(&self, check: &HealthCheck, children: &Children) -> Result<Option<Running>, NotStarted> {
        let program = check.command.args.first().map_or("", String::as_str);
        let internal = |error: io::Error| NotStarted { code: 126, reason: format!("{program}: {error}") };
        let surroundings = Surroundings { terminal: None, make_directory: false };
        let (mut command, _identity) = command::prepare(&check.command, surroundings)?;
        let (output, write) = io::pipe().map_err(internal)?;
        set_nonblocking(&output).map_err(internal)?;
        let both = write.try_clone().map_err(internal)?;
        command.stdin(Stdio::null()).stdout(Stdio::from(write)).stderr(Stdio::from(both));
        let (ended, ends) = io::pipe().map_err(internal)?;
        let (send, exit) = mpsc::channel();
        let on_exit = Box::new(move |how| {
            // A check that was given up has nobody who waits for it.
            let _gone = send.send(how);
            drop(ends);
        });
        // Whoever closes the checks finds what was begun before among the children.
        let closed = self.lock();
        if *closed {
            return Ok(None);
        }
        let started = children.spawn(&mut command, on_exit);
        drop(closed);
        let pid = started.map_err(|error| NotStarted::from_spawn(program, &error))?.pid;
        Ok(Some(Running { pid, output: File::from(OwnedFd::from(output)), ended, exit }))
    }
}

/// What one check found.
struct Found {
    success: bool,
    output: String,
}

impl Found {
    fn failed(output: String) -> Self {
        Self { success: false, output }
    }
}

/// A check that runs.
struct Running {
    pid: i32,
    output: File,
    /// Becomes readable when it has ended.
    ended: PipeReader,
    exit: mpsc::Receiver<WorkloadExit>,
}

impl Running {
    fn watch(mut self, limit: Duration, children: &Children, hangs: &mut Option<PipeReader>) -> Found {
        let deadline = Instant::now() + limit;
        let mut tail = Tail::default();
        let mut open = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let output = if open { POLLIN } else { 0 };
            let ready = sys::poll(&[(self.ended.as_fd(), POLLIN), (self.output.as_fd(), output)], Some(left));
            let ended = ready.first().is_some_and(|events| *events != 0);
            if ready.get(1).is_some_and(|events| *events & (POLLIN | POLLHUP) != 0) && open {
                open = tail.read(&mut self.output);
            } else if !open && !ended {
                // Its output is closed, and poll would say so again and again.
                has_ended(&self.ended, left);
            }
            if ended {
                return self.done(tail);
            }
        }
        children.signal_group(self.pid, libc::SIGKILL);
        tail.note(&format!("no end within {} ms", limit.as_millis()));
        if !has_ended(&self.ended, KILL_LIMIT) {
            *hangs = Some(self.ended);
        }
        Found::failed(tail.text())
    }

    fn done(mut self, mut tail: Tail) -> Found {
        // What it wrote is in the pipe; what others write after it is not waited for.
        let mut left = sys::readable_bytes(self.output.as_fd()).unwrap_or(0);
        while left > 0 && tail.read(&mut self.output) {
            left = left.saturating_sub(CHUNK);
        }
        let exit = self.exit.try_recv().unwrap_or(WorkloadExit::Signal(9));
        match exit {
            WorkloadExit::Code(0) => {}
            WorkloadExit::Code(code) | WorkloadExit::NotStarted(code) => {
                tail.note(&format!("exit code {code}"))
            }
            WorkloadExit::Signal(signal) => tail.note(&format!("ended by signal {signal}")),
        }
        Found { success: exit == WorkloadExit::Code(0), output: tail.text() }
    }
}

fn has_ended(ended: &PipeReader, limit: Duration) -> bool {
    sys::poll(&[(ended.as_fd(), POLLIN)], Some(limit)).first().is_some_and(|events| *events != 0)
}

/// The end of an output.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    /// Reads once; false when nothing more will come.
    fn read(&mut self, from: &mut File) -> bool {
        let mut chunk = [0; CHUNK];
        match from.read(&mut chunk) {
            Ok(0) => false,
            Ok(count) => {
                self.0.extend_from_slice(chunk.get(..count).unwrap_or_default());
                let over = self.0.len().saturating_sub(OUTPUT_MAX);
                self.0.drain(..over);
                true
            }
            Err(error) => crate::link::is_transient(&error),
        }
    }

    /// Adds a line of our own.
    fn note(&mut self, line: &str) {
        if self.0.last().is_some_and(|last| *last != b'\n') {
            self.0.push(b'\n');
        }
        self.0.extend_from_slice(line.as_bytes());
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim_end().to_owned()
    }
}

/// From successes and failures to a state. Pure.
struct Judge {
    state: HealthState,
    failures: u32,
    retries: u32,
    counts_from: Instant,
}

impl Judge {
    fn new(check: &HealthCheck, begin: Instant) -> Self {
        let counts_from = begin + Duration::from_millis(check.start_period_ms);
        Self { state: HealthState::Starting, failures: 0, retries: check.retries, counts_from }
    }

    /// Takes the result of a check that was begun at a moment; answers the state when it is another one.
    fn hear(&mut self, success: bool, begun: Instant) -> Option<HealthState> {
        let before = self.state;
        if success {
            self.failures = 0;
            self.state = HealthState::Healthy;
        } else if before != HealthState::Starting || begun >= self.counts_from {
            self.failures = self.failures.saturating_add(1);
            if self.failures >= self.retries {
                self.state = HealthState::Unhealthy;
            }
        }
        (self.state != before).then_some(self.state)
    }
}

#[cfg(test)]
mod tests {
    use blixard_vmm_api::guest::Command;

    use super::*;
    use crate::children::tests::children;

    const LIMIT: Duration = Duration::from_secs(20);

    fn check(script: &str) -> HealthCheck {
        let args = ["/bin/sh", "-c", script].map(str::to_owned).into();
        HealthCheck {
            command: Command { args, ..Command::default() },
            interval_ms: 20,
            timeout_ms: 10_000,
            retries: 2,
            start_period_ms: 0,
        }
    }

    fn start(check: HealthCheck) -> (Arc<Checks>, mpsc::Receiver<Health>) {
        let (send, told) = mpsc::channel();
        let tell = move |health| drop(send.send(health));
        let checks = Checks::start(check, children(), tell).unwrap();
        assert_eq!(told.recv_timeout(LIMIT).unwrap(), Health::starting());
        (checks, told)
    }

    fn judged(retries: u32, start_period_ms: u64, results: &[(u64, bool)]) -> Vec<HealthState> {
        let begin = Instant::now();
        let check = HealthCheck { retries, start_period_ms, ..check("true") };
        let mut judge = Judge::new(&check, begin);
        let at = |ms| begin + Duration::from_millis(ms);
        results.iter().filter_map(|(ms, success)| judge.hear(*success, at(*ms))).collect()
    }

    #[test]
    fn failures_count_in_a_row_and_one_success_ends_them() {
        use HealthState::{Healthy, Unhealthy};
        let row = |text: &str| text.bytes().map(|b| (0, b == b'+')).collect::<Vec<_>>();
        assert_eq!(judged(3, 0, &row("--+--+--")), [Healthy]);
        assert_eq!(judged(3, 0, &row("---")), [Unhealthy]);
        assert_eq!(judged(3, 0, &row("+--- --+-")), [Healthy, Unhealthy, Healthy]);
    }

    #[test]
    fn in_the_start_period_failures_do_not_count_until_the_first_success() {
        use HealthState::{Healthy, Unhealthy};
        assert_eq!(judged(1, 100, &[(10, false), (99, false)]), []);
        assert_eq!(judged(1, 100, &[(10, false), (100, false)]), [Unhealthy]);
        assert_eq!(judged(1, 100, &[(10, true), (20, false)]), [Healthy, Unhealthy]);
    }

    #[test]
    fn only_changes_are_told_with_the_end_of_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let flag = folder.path().join("ill");
        let script = format!("echo looked; test ! -e {0} || {{ echo ill >&2; exit 3; }}", flag.display());
        let (checks, told) = start(check(&script));
        let healthy = told.recv_timeout(LIMIT).unwrap();
        assert_eq!((healthy.state, healthy.output.as_str()), (HealthState::Healthy, "looked"));
        std::fs::write(&flag, "").unwrap();
        let ill = told.recv_timeout(LIMIT).unwrap();
        assert_eq!((ill.state, ill.output.as_str()), (HealthState::Unhealthy, "looked\nill\nexit code 3"));
        std::fs::remove_file(&flag).unwrap();
        assert_eq!(told.recv_timeout(LIMIT).unwrap().state, HealthState::Healthy);
        checks.close();
    }

    #[test]
    fn a_check_that_takes_too_long_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("pids");
        let script = format!("echo begun; sleep 1000 & echo $! >> {0}; wait", pids.display());
        let (checks, told) = start(HealthCheck { timeout_ms: 100, retries: 1, ..check(&script) });
        let ill = told.recv_timeout(LIMIT).unwrap();
        assert_eq!((ill.state, ill.output.as_str()), (HealthState::Unhealthy, "begun\nno end within 100 ms"));
        checks.close();
        let first = std::fs::read_to_string(&pids).unwrap();
        let pid: i32 = first.lines().next().unwrap().parse().unwrap();
        // Killed with its group; its new parent may take a moment to reap it.
        let gone =
            || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |s| s.contains(") Z "));
        let end = Instant::now() + LIMIT;
        while !gone() {
            assert!(Instant::now() < end, "process {pid} of a killed check is still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn neither_a_flood_of_output_nor_a_child_that_keeps_the_pipe_holds_up_a_check() {
        let script = "head -c 3000000 /dev/zero | tr '\\0' x; sleep 5 & echo end";
        let (checks, told) = start(check(script));
        let healthy = told.recv_timeout(LIMIT).unwrap();
        checks.close();
        assert!(healthy.state == HealthState::Healthy && healthy.output.ends_with("xxxend"));
        assert!(healthy.output.len() <= OUTPUT_MAX);
    }

    #[test]
    fn a_check_that_cannot_be_started_fails_and_says_why() {
        let mut missing = check("");
        missing.command.args = vec!["/no/such/check".into()];
        let (checks, told) = start(missing);
        let ill = told.recv_timeout(LIMIT).unwrap();
        checks.close();
        assert!(ill.state == HealthState::Unhealthy && ill.output.contains("/no/such/check"), "{ill:?}");
    }
}
