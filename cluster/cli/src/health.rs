//! The options of `run` about health checks, named as docker names them.

use std::time::Duration;

use blixard_api::health::HealthSpec;
use clap::Args;

use crate::units;

/// How it is found out whether a VM does its work.
#[derive(Debug, Args)]
#[command(next_help_heading = "Health check")]
pub struct HealthOptions {
    /// Line for a shell in the guest, run again and again; exit code 0 means healthy
    #[arg(long, value_name = "LINE")]
    pub health_cmd: Option<String>,
    /// Pause between two checks (30s)
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub health_interval: Option<Duration>,
    /// Longest time of a check (30s)
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub health_timeout: Option<Duration>,
    /// Failures in a row that make the VM unhealthy (3)
    #[arg(long, value_name = "N")]
    pub health_retries: Option<u32>,
    /// Time after the start in which failures do not count (0s)
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub health_start_period: Option<Duration>,
    /// No health check, also if the image brings one
    #[arg(
        long,
        conflicts_with_all = ["health_cmd", "health_interval", "health_timeout", "health_retries", "health_start_period"]
    )]
    pub no_healthcheck: bool,
}

impl HealthOptions {
    /// As the API takes it; what was not given is as the image says.
    pub fn spec(&self) -> Option<HealthSpec> {
        let ms = |time: &Option<Duration>| time.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
        let shell = |line: &String| ["/bin/sh", "-c", line].map(str::to_owned).into();
        let none = self.no_healthcheck.then(Vec::new);
        let spec = HealthSpec {
            command: self.health_cmd.as_ref().map(shell).or(none),
            interval_ms: ms(&self.health_interval),
            timeout_ms: ms(&self.health_timeout),
            retries: self.health_retries,
            start_period_ms: ms(&self.health_start_period),
        };
        (spec != HealthSpec::default()).then_some(spec)
    }
}
