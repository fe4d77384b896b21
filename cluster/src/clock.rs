//! The only place that reads time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Milliseconds of Unix time.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Microseconds of CLOCK_MONOTONIC: the clock that agent and VMM write their moments with.
pub fn monotonic_us() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    u64::try_from(Duration::from(now).as_micros()).unwrap_or(u64::MAX)
}

/// Milliseconds of CLOCK_BOOTTIME, which goes on while the host sleeps and is never set: the clock of leases.
pub fn boottime_ms() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return 0 };
    u64::try_from(Duration::from(now).as_millis()).unwrap_or(u64::MAX)
}
