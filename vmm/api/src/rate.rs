//! How fast a device may be: token buckets for bytes and for operations.
//!
//! A bucket holds `size` tokens, is full at the start and is refilled evenly, an empty one wholly within `refill_ms`. So in any
//! time `t` at most `size + t / refill_ms × size` tokens are spent, and `burst` more once in the life of the device. What
//! needs more tokens than the bucket holds waits until that many have flowed in.

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, check};

/// Longest time in which an empty bucket becomes full, in milliseconds: one day.
pub const REFILL_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// Limits of one device. A missing bucket is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bucket>,
    /// Requests, or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<Bucket>,
}

/// One token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// Tokens that it holds, 1 or more.
    pub size: u64,
    /// Tokens that may be spent once, before all others.
    #[serde(default)]
    pub burst: u64,
    /// Time in which an empty bucket becomes full, in milliseconds, 1 to [`REFILL_MS_MAX`].
    pub refill_ms: u64,
}

impl RateLimit {
    /// Checks the numbers; `field` is the path of this limit in the configuration.
    ///
    /// # Errors
    /// The first number that is out of range.
    pub fn validate(&self, field: &str) -> Result<(), ConfigError> {
        for (name, bucket) in [("bytes", self.bytes), ("operations", self.operations)] {
            let Some(Bucket { size, refill_ms, .. }) = bucket else { continue };
            check(size > 0, &format!("{field}.{name}.size"), || "0 would let nothing through".into())?;
            check((1..=REFILL_MS_MAX).contains(&refill_ms), &format!("{field}.{name}.refill_ms"), || {
                format!("{refill_ms} ms asked for, 1 to {REFILL_MS_MAX} are possible")
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_survives_json_and_absent_buckets_are_no_limit() {
        let limit: RateLimit = serde_json::from_str(r#"{"bytes":{"size":1000,"refill_ms":100}}"#).unwrap();
        assert_eq!(limit.bytes, Some(Bucket { size: 1000, burst: 0, refill_ms: 100 }));
        assert_eq!(limit.operations, None);
        let text = serde_json::to_string(&limit).unwrap();
        assert_eq!(serde_json::from_str::<RateLimit>(&text).unwrap(), limit);
        limit.validate("rng.limit").unwrap();
    }

    #[test]
    fn what_would_stop_the_device_for_ever_is_refused_by_field() {
        let refused = |size, refill_ms| {
            let limit = RateLimit { bytes: None, operations: Some(Bucket { size, burst: 0, refill_ms }) };
            limit.validate("disks[0].limit").expect_err("must be refused").field
        };
        assert_eq!(refused(0, 100), "disks[0].limit.operations.size");
        assert_eq!(refused(1, 0), "disks[0].limit.operations.refill_ms");
        assert_eq!(refused(1, REFILL_MS_MAX + 1), "disks[0].limit.operations.refill_ms");
    }
}
