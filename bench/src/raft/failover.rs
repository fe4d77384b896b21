//! The leader is killed while four clients write: how long until a write is acknowledged that began afterwards, and whether
//! everything that was acknowledged is still there. And a member is frozen for a while: how long until it has caught up.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::{Options, RaftError, System};
use crate::table::say;

/// Clients that write meanwhile.
const WRITERS: usize = 4;
/// Longest time of one attempt.
const ATTEMPT: Duration = Duration::from_millis(250);
/// Writes before and after the leader is killed.
const WRITES: usize = 20;
/// How long a member is frozen: longer than any election.
const FROZEN: Duration = Duration::from_secs(3);

/// Three members that can be disturbed.
pub trait Member: Sync {
    /// Which of them leads.
    fn leader(&mut self) -> Result<usize, RaftError>;
    /// Its process.
    fn pid(&self, at: usize) -> Option<u32>;
    /// SIGKILL.
    fn kill(&mut self, at: usize);
    /// Starts it again, and waits until it has caught up.
    fn restart(&mut self, at: usize) -> Result<(), RaftError>;
    /// Waits until it has everything.
    fn caught_up(&self, at: usize) -> Result<(), RaftError>;
    /// One durable write through this member.
    fn create(&self, at: usize, number: u64, time: Duration) -> Result<(), RaftError>;
    /// Whether a write is there.
    fn has(&self, number: u64) -> Result<bool, RaftError>;
}

/// What came of it, in milliseconds.
#[derive(Debug, Serialize)]
pub struct Failover {
    /// Leader killed → next acknowledged write.
    killed_ms: Vec<f64>,
    /// Frozen member continued → caught up.
    thawed_ms: Vec<f64>,
    /// Acknowledged writes that were looked for.
    acknowledged: usize,
    /// Acknowledged writes that are not there.
    lost: usize,
}

impl Failover {
    /// Prints it.
    pub fn show(&mut self, system: &str) {
        for (what, times) in
            [("leader killed → next write", &mut self.killed_ms), ("frozen → caught up", &mut self.thawed_ms)]
        {
            times.sort_by(f64::total_cmp);
            let at = |n: usize| times.get(n).copied().unwrap_or(f64::NAN);
            say(&format!(
                "{system:8} {what}: n {}, p50 {:.0} ms, max {:.0} ms",
                times.len(),
                at(times.len() / 2),
                at(times.len().saturating_sub(1))
            ));
        }
        say(&format!("{system:8} acknowledged {}, lost {}", self.acknowledged, self.lost));
    }
}

fn signal(pid: Option<u32>, signal: Signal) -> Result<(), RaftError> {
    let pid =
        pid.and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| RaftError::Wrong("no process".into()))?;
    kill(Pid::from_raw(pid), signal).map_err(|error| RaftError::Wrong(error.to_string()))
}

/// Disturbs a fresh cluster again and again.
pub fn kills<S: System + Member>(options: &Options, programs: &Path) -> Result<Failover, RaftError> {
    let mut system = S::start(&options.work, programs)?;
    let (next, mut all) = (AtomicU64::new(1), Vec::new());
    let mut result = Failover { killed_ms: vec![], thawed_ms: vec![], acknowledged: 0, lost: 0 };
    for _ in 0..options.kills {
        let leader = system.leader()?;
        let pid = system.pid(leader);
        let (stop, acknowledged) =
            (AtomicBool::new(false), Mutex::new(Vec::<(u64, Instant, Instant)>::new()));
        let known = || acknowledged.lock().map(|list| list.clone()).unwrap_or_default();
        let killed = std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (system, stop, acknowledged, next) = (&system, &stop, &acknowledged, &next);
                scope.spawn(move || {
                    let mut at = writer;
                    while !stop.load(Ordering::Relaxed) {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let begun = Instant::now();
                        match system.create(at, number, ATTEMPT) {
                            Ok(()) => {
                                if let Ok(mut list) = acknowledged.lock() {
                                    list.push((number, begun, Instant::now()));
                                }
                            }
                            // Another member, at once.
                            Err(_) => at += 1,
                        }
                    }
                });
            }
            let wait = |wanted: &dyn Fn() -> bool| {
                let begin = Instant::now();
                while !wanted() && begin.elapsed() < Duration::from_secs(30) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                wanted()
            };
            let before = wait(&|| known().len() >= WRITES);
            let killed = Instant::now();
            let dead = signal(pid, Signal::SIGKILL);
            let after = wait(&|| known().iter().filter(|(_, begun, _)| *begun > killed).count() >= WRITES);
            stop.store(true, Ordering::Relaxed);
            dead?;
            if before && after {
                Ok(killed)
            } else {
                Err(RaftError::Late("writes around a killed leader".into()))
            }
        })?;
        let list = known();
        let first = list.iter().filter(|(_, begun, _)| *begun > killed).map(|(_, _, done)| *done).min();
        let time = first.map(|first| first.duration_since(killed).as_secs_f64() * 1000.0);
        result.killed_ms.extend(time);
        all.extend(list.iter().map(|(number, _, _)| *number));
        system.kill(leader);
        system.restart(leader)?;
    }
    for _ in 0..options.repeats {
        let at = (system.leader()? + 1) % 3;
        signal(system.pid(at), Signal::SIGSTOP)?;
        let end = Instant::now() + FROZEN;
        while Instant::now() < end {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if system.create(at + 1, number, Duration::from_secs(5)).is_ok() {
                all.push(number);
            }
        }
        signal(system.pid(at), Signal::SIGCONT)?;
        let thawed = Instant::now();
        system.caught_up(at)?;
        result.thawed_ms.push(thawed.elapsed().as_secs_f64() * 1000.0);
    }
    system.leader()?;
    result.acknowledged = all.len();
    for number in all {
        if !system.has(number)? {
            result.lost += 1;
        }
    }
    Ok(result)
}
