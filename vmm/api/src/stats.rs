//! What a VMM counts, and its flight recorder: the last events before an end that nobody asked for.
//!
//! A histogram has one bucket per power of two, so it needs no configuration and takes the same memory whatever it sees.

use serde::{Deserialize, Serialize};

/// Most buckets of a histogram.
pub const BUCKETS_MAX: usize = 28;
/// Most samples in one answer; a client asks for the rest.
pub const SAMPLES_PER_REPLY: usize = 200;
/// Most events that the flight recorder keeps.
pub const EVENTS_MAX: usize = 128;

/// One number of a device or vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Whose it is, for example `net.nic0`, `vcpu1`, `console`.
    pub device: String,
    /// Queue or pair of queues, when it is one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,
    /// What was counted, for example `received_frames`.
    pub name: String,
    /// How much.
    pub value: Value,
}

/// How much of something there was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// It only grows during the life of the process, except for what is obviously a state (`streams`).
    Count(u64),
    /// How values are spread.
    Histogram(Histogram),
}

/// How many values there were of each size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Sum of all values.
    pub sum: u64,
    /// Number of values by size: bucket 0 has those that are 0, bucket `i` those from 2^(i-1) to 2^i - 1, the last of
    /// [`BUCKETS_MAX`] all that are larger. Empty buckets at the end are left out.
    pub buckets: Vec<u64>,
}

impl Histogram {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, bucket| sum.saturating_add(*bucket))
    }

    /// Largest value of bucket `index`; `None` for the one without a bound.
    pub fn bound(index: usize) -> Option<u64> {
        let bits = u32::try_from(index).ok().filter(|_| index + 1 < BUCKETS_MAX)?;
        Some(1u64.checked_shl(bits)? - 1)
    }
}

/// A part of the samples of a VMM, in an order that does not change while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// Those asked for, at most [`SAMPLES_PER_REPLY`].
    pub samples: Vec<Sample>,
    /// How many there are in all.
    pub total: u32,
}

/// Something that the flight recorder noted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlightEvent {
    /// Microseconds of `CLOCK_MONOTONIC` of the host.
    pub at_us: u64,
    /// What it happened to, for example `net.nic0`, `vcpu0`, `vm`.
    pub what: String,
    /// What happened, for example `activated`.
    pub event: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_those_of_the_powers_of_two() {
        assert_eq!(Histogram::bound(0), Some(0));
        assert_eq!(Histogram::bound(1), Some(1));
        assert_eq!(Histogram::bound(10), Some(1023));
        assert_eq!(Histogram::bound(BUCKETS_MAX - 1), None);
        assert_eq!(Histogram::bound(usize::MAX - 1), None);
        let histogram = Histogram { sum: 7, buckets: vec![1, 0, 2] };
        assert_eq!(histogram.count(), 3);
    }

    #[test]
    fn a_sample_survives_json() {
        let count =
            Sample { device: "vcpu0".into(), queue: None, name: "exits".into(), value: Value::Count(3) };
        let value = Value::Histogram(Histogram { sum: 1, buckets: vec![0, 1] });
        let spread = Sample { queue: Some(2), value, ..count.clone() };
        let samples = Samples { samples: vec![count, spread], total: 2 };
        let text = serde_json::to_string(&samples).unwrap();
        assert_eq!(serde_json::from_str::<Samples>(&text).unwrap(), samples);
    }
}
