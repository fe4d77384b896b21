//! When a write is done in place rather than given to io_uring.
//!
//! A write into the host's page cache is a copy. But most file systems make a writer wait for a lock or for memory, which a
//! ring must not, so the kernel hands each such write to another thread: two changes of threads for one copy. In place it is
//! as fast as it can be, until the page cache has to wait for a disk. Then it holds up the other devices of the VM; so after
//! one write that took long the next ones go to the ring for a while.

/// Most bytes of a write in place: copying more takes as long as another thread does.
const BYTES_MAX: usize = 256 << 10;
/// A write that takes longer than this in nanoseconds had to wait.
const SLOW_NS: u64 = 2_000_000;
/// How long the ring then has all writes, in nanoseconds.
const PAUSE_NS: u64 = 500_000_000;

/// The rule, and what it remembers.
#[derive(Debug, Default)]
pub(super) struct Straight {
    /// Until when the ring has all writes.
    not_before: u64,
}

impl Straight {
    /// Whether a write of `bytes` is to be done in place at the time `now`.
    pub(super) fn takes(&self, bytes: usize, now: u64) -> bool {
        bytes <= BYTES_MAX && now >= self.not_before
    }

    /// A write in place took from `begun` to `ended`.
    pub(super) fn took(&mut self, begun: u64, ended: u64) {
        if ended.saturating_sub(begun) > SLOW_NS {
            self.not_before = ended.saturating_add(PAUSE_NS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_write_that_waited_the_ring_has_the_next_ones_for_a_while() {
        let mut straight = Straight::default();
        assert!(straight.takes(4096, 5));
        straight.took(5, 5 + SLOW_NS);
        assert!(straight.takes(4096, 6 + SLOW_NS));
        let ended = 10 + 2 * SLOW_NS;
        straight.took(10, ended);
        assert!(!straight.takes(4096, ended) && !straight.takes(4096, ended + PAUSE_NS - 1));
        assert!(straight.takes(4096, ended + PAUSE_NS));
    }

    #[test]
    fn a_large_write_is_for_the_ring() {
        let straight = Straight::default();
        assert!(straight.takes(BYTES_MAX, 0) && !straight.takes(BYTES_MAX + 1, 0));
    }
}
