//! The clocks of a simulated host: the one clock of the runtime, which only goes on when nothing else is to be done, made faster or
//! slower, begun at each boot, and set by an administrator.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blixard_node::clock::Time;
use tokio::time::Instant;

/// Unix time when a simulation begins.
const UNIX_BEGIN: Duration = Duration::from_secs(1_795_000_000);

#[derive(Debug)]
struct Hands {
    /// How much faster than the runtime's clock, in millionths.
    fast_ppm: i64,
    booted: Instant,
    /// What Unix time is ahead, in milliseconds.
    ahead_ms: i64,
}

/// The clocks of one host.
#[derive(Debug)]
pub struct HostClock {
    begin: Instant,
    hands: Mutex<Hands>,
}

impl HostClock {
    /// Clocks that begin now and run faster than the runtime's by so many millionths.
    pub fn new(fast_ppm: i64) -> Self {
        let begin = Instant::now();
        Self { begin, hands: Mutex::new(Hands { fast_ppm, booted: begin, ahead_ms: 0 }) }
    }

    fn hands(&self) -> MutexGuard<'_, Hands> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host boots now.
    pub fn boot(&self) {
        self.hands().booted = Instant::now();
    }

    /// Unix time is set to be this many milliseconds ahead of the truth, or behind it.
    pub fn set(&self, ahead_ms: i64) {
        self.hands().ahead_ms = ahead_ms;
    }

    /// The time since `from` as this host measures it.
    fn measured(&self, from: Instant) -> Duration {
        let ppm = u32::try_from(self.hands().fast_ppm + 1_000_000).unwrap_or(1_000_000);
        from.elapsed() * ppm / 1_000_000
    }

    /// Milliseconds of CLOCK_BOOTTIME.
    pub fn boottime_ms(&self) -> u64 {
        u64::try_from(self.boottime().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Time for HostClock {
    fn unix(&self) -> Duration {
        let now = UNIX_BEGIN + self.measured(self.begin);
        let ahead_ms = self.hands().ahead_ms;
        let by = Duration::from_millis(ahead_ms.unsigned_abs());
        if ahead_ms < 0 { now.saturating_sub(by) } else { now + by }
    }

    fn monotonic(&self) -> Duration {
        self.boottime()
    }

    fn boottime(&self) -> Duration {
        let booted = self.hands().booted;
        self.measured(booted)
    }
}
