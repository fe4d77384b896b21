//! Rate limits of a device: token buckets, and the timer that wakes the device when what it holds back may go on.
//!
//! ```text
//!   request ──► Limiter::admit(bytes, operations) ─true──► serve it
//!                        └─false: hold it, start nothing new; the timer is set
//!   timer   ──► Limiter::take_timer(), admit() the held one again
//! ```
//!
//! The arithmetic takes the time as an argument, so that it is the same in every run.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use blixard_vmm_api::rate::{Bucket, RateLimit};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::device::Watch;
use super::socket;
use crate::snapshot::codec::{Invalid, Reader, Writer};

const NANOSECONDS_PER_MILLISECOND: u64 = 1_000_000;
/// Shortest time that a timer is set to: what is held back is let go in batches rather than one by one.
const NAP_MIN: Duration = Duration::from_micros(200);

/// One token bucket. Times are nanoseconds of one clock; one that goes back counts as one that stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    /// Time in which an empty bucket becomes full, at least 1.
    refill_ns: u64,
    /// What is left of the tokens that come only once.
    burst: u64,
    tokens: u64,
    /// Tokens up to which it is filled: more than `size` while something waits that needs more than that.
    most: u64,
    /// Until when tokens were added.
    filled_at: u64,
}

impl TokenBucket {
    /// A full bucket. A size or refill time of 0 counts as 1.
    pub fn new(bucket: Bucket, now: u64) -> Self {
        let size = bucket.size.max(1);
        let refill_ns = bucket.refill_ms.saturating_mul(NANOSECONDS_PER_MILLISECOND).max(1);
        Self { size, refill_ns, burst: bucket.burst, tokens: size, most: size, filled_at: now }
    }

    /// Adds the tokens that came since the last call.
    fn fill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.filled_at);
        // Two u64 multiplied fit a u128.
        let came = u128::from(passed) * u128::from(self.size) / u128::from(self.refill_ns);
        let room = u128::from(self.most.saturating_sub(self.tokens));
        if came >= room {
            self.tokens = self.tokens.max(self.most);
            self.filled_at = self.filled_at.max(now);
            return;
        }
        // `came` is below `room`, which is a u64.
        let came = u64::try_from(came).unwrap_or(0);
        self.tokens = self.tokens.saturating_add(came);
        // The part of a token that is on its way is not lost: the time goes on only by what the whole ones took, rounded
        // up so that no token comes twice.
        self.filled_at = self.filled_at.saturating_add(self.time_for(came)).min(now.max(self.filled_at));
    }

    /// Nanoseconds in which `tokens` come, rounded up.
    fn time_for(&self, tokens: u64) -> u64 {
        let time = (u128::from(tokens) * u128::from(self.refill_ns)).div_ceil(u128::from(self.size));
        u64::try_from(time).unwrap_or(u64::MAX)
    }

    /// When `count` tokens can be spent: 0 for now, else in how many nanoseconds. Spends nothing; from now on the bucket
    /// fills up to `count` when that is more than it holds.
    pub fn wait(&mut self, count: u64, now: u64) -> u64 {
        self.fill(now);
        self.most = self.size.max(count.saturating_sub(self.burst));
        self.tokens = self.tokens.min(self.most);
        let missing = count.saturating_sub(self.burst).saturating_sub(self.tokens);
        if missing == 0 {
            return 0;
        }
        let under_way = now.saturating_sub(self.filled_at);
        self.time_for(missing).saturating_sub(under_way).max(1)
    }

    /// Spends `count` tokens, those that come only once first. Only legal after [`Self::wait`] said 0 for as many.
    pub fn spend(&mut self, count: u64) {
        let once = count.min(self.burst);
        self.burst -= once;
        self.tokens = self.tokens.saturating_sub(count - once);
        self.most = self.size;
    }
}

/// The buckets of one device without their timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl Buckets {
    /// Full buckets.
    pub fn new(limit: &RateLimit, now: u64) -> Self {
        let bucket = |b: Option<Bucket>| b.map(|b| TokenBucket::new(b, now));
        Self { bytes: bucket(limit.bytes), operations: bucket(limit.operations) }
    }

    /// Spends from both buckets, or from none and says in how many nanoseconds to ask again (never 0).
    ///
    /// # Errors
    /// The time to wait.
    pub fn take(&mut self, bytes: u64, operations: u64, now: u64) -> Result<(), u64> {
        let mut wait = 0;
        for (bucket, count) in [(&mut self.bytes, bytes), (&mut self.operations, operations)] {
            wait = bucket.as_mut().map_or(0, |bucket| bucket.wait(count, now)).max(wait);
        }
        if wait > 0 {
            return Err(wait);
        }
        for (bucket, count) in [(&mut self.bytes, bytes), (&mut self.operations, operations)] {
            if let Some(bucket) = bucket {
                bucket.spend(count);
            }
        }
        Ok(())
    }
}

/// The buckets of one device and the timer that wakes it.
#[derive(Debug)]
pub struct Limiter {
    buckets: Buckets,
    timer: TimerFd,
    is_set: bool,
    waits: u64,
}

impl Limiter {
    /// A limiter with full buckets; `None` when nothing is limited. The timer is made here: a running VM makes none.
    ///
    /// # Errors
    /// No descriptor was left.
    pub fn new(limit: &RateLimit) -> io::Result<Option<Self>> {
        if *limit == RateLimit::default() {
            return Ok(None);
        }
        let timer = TimerFd::new().map_err(io::Error::from)?;
        // An event may be left over from a timer that was stopped meanwhile: reading it must not wait.
        socket::set_nonblocking(&timer)?;
        Ok(Some(Self { buckets: Buckets::new(limit, now()), timer, is_set: false, waits: 0 }))
    }

    /// Whether a request of this size may be served now; then its tokens are spent. When not, the timer's event comes as
    /// soon as it may: the caller holds this request back, starts nothing new and asks again after [`Self::take_timer`].
    ///
    /// # Errors
    /// The timer cannot be set.
    pub fn admit(&mut self, bytes: u64, operations: u64) -> io::Result<bool> {
        match self.buckets.take(bytes, operations, now()) {
            Ok(()) => Ok(true),
            Err(wait) => {
                if !self.is_set {
                    self.timer
                        .reset(Duration::from_nanos(wait).max(NAP_MIN), None)
                        .map_err(io::Error::from)?;
                    self.is_set = true;
                    self.waits += 1;
                }
                Ok(false)
            }
        }
    }

    /// Whether the timer runs: something is held back.
    pub fn is_waiting(&self) -> bool {
        self.is_set
    }

    /// Watches the timer under `token`.
    ///
    /// # Errors
    /// The system's answer.
    pub fn watch(&self, watch: &mut dyn Watch, token: u64) -> io::Result<()> {
        watch.add(self.timer.as_raw_fd(), EventSet::IN.bits(), token)
    }

    /// Watches it no more, and stops it.
    pub fn unwatch(&mut self, watch: &mut dyn Watch) {
        watch.remove(self.timer.as_raw_fd());
        // A timer that goes off unwatched wakes nobody and is set anew by the next admit().
        let _still_set = self.timer.clear();
        self.is_set = false;
    }

    /// The timer's event came.
    pub fn take_timer(&mut self) {
        // It fails when the timer was set anew meanwhile; then another event comes.
        if self.timer.wait().is_ok() {
            self.is_set = false;
        }
    }

    /// Writes how full the buckets are; nothing without limits.
    pub fn save(limiter: Option<&Self>, to: &mut Writer) {
        let Some(Self { buckets, .. }) = limiter else { return };
        for bucket in [buckets.bytes, buckets.operations] {
            to.bool(bucket.is_some());
            let (tokens, burst) =
                bucket.map_or((0, 0), |bucket| (bucket.tokens.min(bucket.size), bucket.burst));
            to.u64(tokens);
            to.u64(burst);
        }
    }

    /// Takes what [`Self::save`] wrote, which is the end of a section: buckets are as full as they were, or as full as they can be when they have become
    /// smaller, so that nobody gets a burst anew by being restored. A bucket that was not limited before begins full.
    ///
    /// # Errors
    /// The state is cut short.
    pub fn restore(limiter: Option<&mut Self>, from: &mut Reader<'_>) -> Result<(), Invalid> {
        if from.end().is_ok() {
            return Ok(());
        }
        let mut unlimited = Buckets { bytes: None, operations: None };
        let buckets = limiter.map_or(&mut unlimited, |limiter| &mut limiter.buckets);
        for bucket in [&mut buckets.bytes, &mut buckets.operations] {
            let was = from.bool("rate limit")?;
            let (tokens, burst) = (from.u64("tokens")?, from.u64("burst")?);
            if let Some(bucket) = bucket.as_mut().filter(|_| was) {
                bucket.tokens = tokens.min(bucket.size);
                bucket.burst = burst.min(bucket.burst);
            }
        }
        Ok(())
    }

    /// How often something had to wait.
    pub fn waits(&self) -> u64 {
        self.waits
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC` now.
pub fn now() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::guest_driver::EventLoop;
    use proptest::prelude::*;

    const MILLISECOND: u64 = NANOSECONDS_PER_MILLISECOND;

    fn bucket(size: u64, burst: u64, refill_ms: u64) -> TokenBucket {
        TokenBucket::new(Bucket { size, burst, refill_ms }, 0)
    }

    #[test]
    fn a_full_bucket_is_spent_and_refilled_evenly() {
        let mut bucket = bucket(1000, 0, 100);
        assert_eq!(bucket.wait(1000, 0), 0);
        bucket.spend(1000);
        assert_eq!(bucket.wait(10, 0), MILLISECOND);
        assert_eq!(bucket.wait(10, MILLISECOND / 2), MILLISECOND / 2);
        assert_eq!(bucket.wait(10, MILLISECOND), 0);
        bucket.spend(10);
        assert_eq!(bucket.wait(1000, 1000 * MILLISECOND), 0, "it is full again");
        assert_eq!(bucket.wait(1001, 1000 * MILLISECOND), MILLISECOND / 10, "and not more than full");
    }

    #[test]
    fn a_burst_is_there_once() {
        let mut bucket = bucket(10, 90, 1000);
        assert_eq!(bucket.wait(100, 0), 0);
        bucket.spend(100);
        assert_eq!(bucket.wait(10, 1000 * MILLISECOND), 0);
        assert!(bucket.wait(11, 1000 * MILLISECOND) > 0);
    }

    #[test]
    fn both_buckets_are_spent_or_none() {
        let limit = RateLimit {
            bytes: Some(Bucket { size: 100, burst: 0, refill_ms: 100 }),
            operations: Some(Bucket { size: 1, burst: 0, refill_ms: 1000 }),
        };
        let mut buckets = Buckets::new(&limit, 0);
        assert_eq!(buckets.take(60, 1, 0), Ok(()));
        assert_eq!(buckets.take(40, 1, 0), Err(1000 * MILLISECOND));
        assert_eq!(buckets.take(40, 0, 0), Ok(()), "the refused request spent no bytes");
    }

    #[test]
    fn the_timer_goes_off_when_what_waits_may_go_on() {
        let limit =
            RateLimit { bytes: Some(Bucket { size: 1000, burst: 0, refill_ms: 10 }), operations: None };
        let mut limiter = Limiter::new(&limit).unwrap().unwrap();
        let mut events = EventLoop::new();
        limiter.watch(&mut events, 7).unwrap();
        assert!(limiter.admit(1000, 1).unwrap());
        let mut rounds = 0;
        while !limiter.admit(1000, 1).unwrap() {
            assert!(limiter.is_waiting());
            assert!(await_readable(&limiter.timer), "the timer went off");
            limiter.take_timer();
            assert!(!limiter.is_waiting());
            rounds += 1;
        }
        assert!((1..=3).contains(&rounds), "{rounds} rounds");
        assert_eq!(limiter.waits(), rounds);
        limiter.unwatch(&mut events);
        assert_eq!(events.watched(), 0);
    }

    fn await_readable(timer: &TimerFd) -> bool {
        let mut wanted = libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one pollfd, which outlives the call.
        unsafe { libc::poll(&raw mut wanted, 1, 10_000) == 1 }
    }

    #[test]
    fn a_spent_bucket_is_restored_as_spent() {
        let limit =
            |size| RateLimit { bytes: Some(Bucket { size, burst: 5, refill_ms: 1000 }), operations: None };
        let mut limiter = Limiter::new(&limit(100)).unwrap().unwrap();
        assert_eq!(limiter.buckets.take(95, 0, limiter.buckets.bytes.unwrap().filled_at), Ok(()));
        let mut state = Writer::new();
        Limiter::save(Some(&limiter), &mut state);
        let state = state.into_bytes();
        for (size, tokens) in [(100, 10), (3, 3)] {
            let mut restored = Limiter::new(&limit(size)).unwrap().unwrap();
            Limiter::restore(Some(&mut restored), &mut Reader::new(&state)).unwrap();
            let bucket = restored.buckets.bytes.unwrap();
            assert_eq!((bucket.tokens, bucket.burst), (tokens, 0));
        }
        let mut reader = Reader::new(&state);
        Limiter::restore(None, &mut reader).unwrap();
        assert_eq!(reader.end(), Ok(()));
        assert!(Limiter::restore(None, &mut Reader::new(&state[1..])).is_err());
    }

    #[test]
    fn no_limit_needs_no_timer() {
        assert!(Limiter::new(&RateLimit::default()).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn no_more_is_let_through_than_size_burst_and_rate_allow(
            size in 1u64..10_000, burst in 0u64..10_000, refill_ms in 1u64..5_000,
            steps in proptest::collection::vec((0u64..20_000, 0u64..2_000_000_000), 1..200),
        ) {
            let mut bucket = bucket(size, burst, refill_ms);
            let (mut now, mut spent) = (0u64, 0u128);
            for (count, passed) in steps {
                now += passed;
                if bucket.wait(count, now) == 0 {
                    bucket.spend(count);
                    spent += u128::from(count);
                }
                let flowed = u128::from(now) * u128::from(size) / u128::from(refill_ms * MILLISECOND);
                prop_assert!(spent <= u128::from(size) + u128::from(burst) + flowed);
            }
        }

        #[test]
        fn a_request_of_any_size_gets_through_after_the_time_it_was_told(
            size in 1u64..100_000, burst in 0u64..100, refill_ms in 1u64..10_000, before in 0u64..100_000, count in 0u64..1_000_000,
            part in 0u64..100,
        ) {
            let mut bucket = bucket(size, burst, refill_ms);
            if bucket.wait(before, 0) == 0 {
                bucket.spend(before);
            }
            let wait = bucket.wait(count, 0);
            // Asking in between, as spurious wake-ups do, costs a nanosecond at most.
            let between = wait / 100 * part;
            prop_assert!(between == 0 || bucket.wait(count, between) <= wait - between + 1);
            prop_assert_eq!(bucket.wait(count, wait + u64::from(between > 0)), 0);
        }

        #[test]
        fn a_steady_load_gets_its_rate_whatever_the_wake_ups(
            size in 1u64..1_000_000, refill_ms in 1u64..1_000, part in 1u64..100,
        ) {
            let count = size.div_ceil(part);
            let mut bucket = bucket(size, 0, refill_ms);
            let (mut now, mut spent) = (0u64, 0u64);
            for _ in 0..2_000 {
                match bucket.wait(count, now) {
                    0 => { bucket.spend(count); spent += count; }
                    wait => now += wait,
                }
            }
            let flowed = u128::from(now) * u128::from(size) / u128::from(refill_ms * MILLISECOND);
            // Each wait rounds up by less than a nanosecond, and the last tokens may be on their way.
            let lost = 2_000 * u128::from(size) / u128::from(refill_ms * MILLISECOND) + 2 + u128::from(count);
            prop_assert!(u128::from(spent) + lost >= flowed + u128::from(size.min(count)), "{} of {}", spent, flowed);
        }

        #[test]
        fn no_number_overflows(
            size: u64, burst: u64, refill_ms: u64, steps in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..50),
        ) {
            let mut bucket = bucket(size, burst, refill_ms);
            for (count, now) in steps {
                if bucket.wait(count, now) == 0 {
                    bucket.spend(count);
                }
            }
        }
    }
}
