//! The only place that reads time. What the cluster decides by time it reads from a [`Clock`], which a simulation makes run
//! differently on each node.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// The clocks of a host.
pub trait Time: Send + Sync {
    /// Unix time. Whoever administers the host may set it.
    fn unix(&self) -> Duration;
    /// CLOCK_MONOTONIC: the clock that agent and VMM write their moments with.
    fn monotonic(&self) -> Duration;
    /// CLOCK_BOOTTIME, which goes on while the host sleeps and is never set: the clock of leases.
    fn boottime(&self) -> Duration;
}

/// The clocks of the host that a part of the node runs on. Clones are the same clocks.
#[derive(Clone)]
pub struct Clock(Arc<dyn Time>);

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(Host))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl Clock {
    /// These clocks instead of those of this host.
    pub fn new(time: Arc<dyn Time>) -> Self {
        Self(time)
    }

    /// Milliseconds of Unix time.
    pub fn now_ms(&self) -> u64 {
        millis(self.0.unix())
    }

    /// Microseconds of CLOCK_MONOTONIC.
    pub fn monotonic_us(&self) -> u64 {
        u64::try_from(self.0.monotonic().as_micros()).unwrap_or(u64::MAX)
    }

    /// Milliseconds of CLOCK_BOOTTIME.
    pub fn boottime_ms(&self) -> u64 {
        millis(self.0.boottime())
    }
}

/// Milliseconds of Unix time on this host, for what happens apart from a member of a cluster.
pub fn now_ms() -> u64 {
    millis(Host.unix())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The clocks of this host.
struct Host;

impl Time for Host {
    fn unix(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)
    }

    fn monotonic(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
    }

    fn boottime(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
    }
}
