//! Whether the workload of a guest does its work: what `blixard-init` runs to find out, and what it found.

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, check};
use crate::guest::Command;

/// Shortest interval and timeout in milliseconds.
pub const TIME_MS_MIN: u64 = 100;
/// Longest interval, timeout and start period in milliseconds (a day).
pub const TIME_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// Most failures in a row that can be asked for.
pub const RETRIES_MAX: u32 = 100;
/// Longest end of a check's output in bytes: it and the state fit one record of the guest link.
pub const OUTPUT_MAX: usize = 511;

/// A command that is run again and again, and ends with code 0 while the workload does its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What to run: user, environment and directory are usually those of the workload.
    pub command: Command,
    /// Pause before the first check and from the end of one to the next, in milliseconds.
    pub interval_ms: u64,
    /// Longest time of one check, in milliseconds; it and all that it started is killed then, and has failed.
    pub timeout_ms: u64,
    /// How many failures in a row make the workload unhealthy.
    pub retries: u32,
    /// For this time after the start failures are not counted, in milliseconds.
    #[serde(default)]
    pub start_period_ms: u64,
}

impl HealthCheck {
    /// Checks the command and the ranges of the times.
    ///
    /// # Errors
    /// The first field of `field` that is out of range.
    pub fn validate(&self, field: &str) -> Result<(), ConfigError> {
        self.command.validate(&format!("{field}.command"))?;
        let times = TIME_MS_MIN..=TIME_MS_MAX;
        for (name, value) in [("interval_ms", self.interval_ms), ("timeout_ms", self.timeout_ms)] {
            check(times.contains(&value), &format!("{field}.{name}"), || {
                format!("{value} ms asked for, {TIME_MS_MIN} to {TIME_MS_MAX} are possible")
            })?;
        }
        check((1..=RETRIES_MAX).contains(&self.retries), &format!("{field}.retries"), || {
            format!("{} asked for, 1 to {RETRIES_MAX} are possible", self.retries)
        })?;
        check(self.start_period_ms <= TIME_MS_MAX, &format!("{field}.start_period_ms"), || {
            format!("{} ms asked for, at most {TIME_MS_MAX} are possible", self.start_period_ms)
        })
    }
}

/// What the checks of a guest found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// None has succeeded, and not enough have failed.
    Starting,
    /// The newest success is newer than the last series of failures.
    Healthy,
    /// As many in a row have failed as were asked for, and none has succeeded since.
    Unhealthy,
}

impl std::fmt::Display for HealthState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        })
    }
}

/// How the workload of a guest is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What the checks found.
    pub state: HealthState,
    /// End of the output of the check that changed it, at most [`OUTPUT_MAX`] bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
}

impl Health {
    /// Before the first check.
    pub fn starting() -> Self {
        Self { state: HealthState::Starting, output: String::new() }
    }

    /// As a record of the guest link: the state, then the end of the output.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let state = match self.state {
            HealthState::Starting => 0,
            HealthState::Healthy => 1,
            HealthState::Unhealthy => 2,
        };
        let output = self.output.as_bytes();
        let end = output.get(output.len().saturating_sub(OUTPUT_MAX)..).unwrap_or_default();
        [&[state], end].concat()
    }

    /// The health that this record says.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (state, output) = bytes.split_first()?;
        let state = match state {
            0 => HealthState::Starting,
            1 => HealthState::Healthy,
            2 => HealthState::Unhealthy,
            _ => return None,
        };
        // A character may be cut at the front.
        Some(Self { state, output: String::from_utf8_lossy(output).into_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check() -> HealthCheck {
        let command = Command { args: vec!["true".into()], ..Command::default() };
        HealthCheck { command, interval_ms: 1000, timeout_ms: 1000, retries: 3, start_period_ms: 0 }
    }

    #[test]
    fn times_and_retries_out_of_range_are_named() {
        type Change = fn(&mut HealthCheck);
        let field = |change: Change| {
            let mut check = check();
            change(&mut check);
            check.validate("health").unwrap_err().field
        };
        assert_eq!(field(|c| c.command.args.clear()), "health.command.args");
        assert_eq!(field(|c| c.interval_ms = 99), "health.interval_ms");
        assert_eq!(field(|c| c.timeout_ms = TIME_MS_MAX + 1), "health.timeout_ms");
        assert_eq!(field(|c| c.retries = 0), "health.retries");
        assert_eq!(field(|c| c.start_period_ms = u64::MAX), "health.start_period_ms");
        assert!(check().validate("health").is_ok());
    }

    #[test]
    fn of_a_long_output_the_end_arrives_also_where_a_character_is_cut() {
        let output = format!("{}€end", "x".repeat(OUTPUT_MAX - 5));
        let sent = Health { state: HealthState::Unhealthy, output };
        let bytes = sent.encode();
        assert_eq!(bytes.len(), 1 + OUTPUT_MAX);
        let arrived = Health::decode(&bytes).unwrap();
        assert!(arrived.state == HealthState::Unhealthy && arrived.output.ends_with("€end"));
        let cut = Health { output: format!("€{}", "x".repeat(OUTPUT_MAX - 1)), ..sent };
        assert!(Health::decode(&cut.encode()).unwrap().output.ends_with("xxx"));
        assert_eq!(Health::decode(&[3]), None);
        assert_eq!(Health::decode(&[]), None);
    }
}
