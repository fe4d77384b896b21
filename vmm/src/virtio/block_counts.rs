//! What a disk counts: requests and bytes, and how long requests took by kind.
//!
//! A request's time begins when it is given to the backing, so the wait for a rate limit is not in it, and ends when its status
//! is written. Requests of one turn that are under way together share the two readings of the clock; what is done at once
//! begins where the request before it ended. So a request costs at most one reading, and none is a system call where the
//! kernel lets processes read its clock.

use super::rate::now;
use crate::stats::{Histogram, Samples};

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;

/// What a request was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Read, "read_us"),
        (Self::Write, "write_us"),
        (Self::Flush, "flush_us"),
        (Self::Discard, "discard_us"),
        (Self::WriteZeroes, "write_zeroes_us"),
    ];
}

/// When a request was begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    kind: Kind,
    at: u64,
}

/// Counters of one disk.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub write_zeroes: u64,
    pub errors: u64,
    /// Microseconds, in the order of [`Kind::ALL`].
    took: [Histogram; Kind::ALL.len()],
    /// The last reading of the clock.
    clock: u64,
}

impl Counts {
    /// Reads the clock: before requests are begun, and before requests that ended are told of.
    pub fn read_clock(&mut self) {
        self.clock = now();
    }

    /// A request is given to the backing.
    pub fn begin(&mut self, kind: Kind) -> Begun {
        match kind {
            Kind::Read => self.reads += 1,
            Kind::Write => self.writes += 1,
            Kind::Flush => self.flushes += 1,
            Kind::Discard => self.discards += 1,
            Kind::WriteZeroes => self.write_zeroes += 1,
        }
        Begun { kind, at: self.clock }
    }

    /// It ended at the last reading of the clock.
    pub fn end(&mut self, begun: Begun) {
        let took = self.clock.saturating_sub(begun.at) / NANOSECONDS_PER_MICROSECOND;
        let histograms = Kind::ALL.iter().zip(&mut self.took);
        for (_, histogram) in histograms.filter(|((kind, _), _)| *kind == begun.kind) {
            histogram.record(took);
        }
    }

    /// Adds the histograms, one per kind.
    pub fn spread(&self, samples: &mut Samples) {
        for ((_, name), histogram) in Kind::ALL.iter().zip(&self.took) {
            samples.histogram(None, name, histogram);
        }
    }
}
