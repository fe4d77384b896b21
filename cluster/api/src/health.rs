//! Health checks: what one asks for, and what an image brings.

pub use blixard_vmm_api::health::{Health, HealthState};
use serde::{Deserialize, Serialize};

/// Pause between two checks when nobody names one, in milliseconds (as docker).
pub const INTERVAL_MS_DEFAULT: u64 = 30_000;
/// Longest time of a check when nobody names one, in milliseconds (as docker).
pub const TIMEOUT_MS_DEFAULT: u64 = 30_000;
/// Failures in a row that make a VM unhealthy when nobody names a number (as docker).
pub const RETRIES_DEFAULT: u32 = 3;

/// How it is found out whether a VM does its work. What is absent is what its image says, or else the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthSpec {
    /// Program and arguments that are run in the guest; code 0 means healthy. Empty: nothing is checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Pause before the first check and from one to the next, in milliseconds, 100 to a day; 30,000 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Longest time of one check in milliseconds, 100 to a day; 30,000 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// How many failures in a row make it unhealthy, 1 to 100; 3 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// For this time after the start failures are not counted, in milliseconds, at most a day; 0 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_period_ms: Option<u64>,
}
