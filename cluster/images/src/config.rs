//! What an image says about how to run it (OCI image specification, config.md).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

/// Defaults of an image. All is empty for a plain root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Program with its first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments behind the entry point, or the whole command if there is none.
    pub cmd: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Working directory; empty for the root.
    pub cwd: String,
    /// `user[:group]`; empty for root.
    pub user: String,
    /// Ports such as `80/tcp` that the program listens on.
    pub exposed_ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Name or number of the signal that stops the program.
    pub stop_signal: Option<String>,
    /// How to find out whether the program does its work (docker's; no part of the OCI specification).
    pub health: Option<Healthcheck>,
}

/// A health check. A time or number that is absent is left to whoever runs the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Healthcheck {
    /// Program and arguments; empty when nothing shall be checked.
    pub command: Vec<String>,
    /// Pause between two checks.
    pub interval: Option<Duration>,
    /// Longest time of a check.
    pub timeout: Option<Duration>,
    /// Time after the start in which failures do not count.
    pub start_period: Option<Duration>,
    /// Failures in a row that make it unhealthy.
    pub retries: Option<u32>,
}

/// The part of an image's configuration file that is of use here.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, deserialize_with = "or_default")]
    config: RunConfig,
    pub rootfs: RootFs,
}

/// Digests of the layers before compression.
#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    #[serde(deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    exposed_ports: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "or_default")]
    labels: BTreeMap<String, String>,
    stop_signal: Option<String>,
    healthcheck: Option<RawHealthcheck>,
}

/// As docker writes it: times in nanoseconds, 0 for what is inherited.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawHealthcheck {
    #[serde(deserialize_with = "or_default")]
    test: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    interval: i64,
    #[serde(deserialize_with = "or_default")]
    timeout: i64,
    #[serde(deserialize_with = "or_default")]
    start_period: i64,
    #[serde(deserialize_with = "or_default")]
    retries: i64,
}

impl RawHealthcheck {
    /// `None` when it says nothing, or something unknown.
    fn known(self) -> Option<Healthcheck> {
        let command = match self.test.split_first() {
            Some((kind, _)) if kind == "NONE" => Vec::new(),
            Some((kind, words)) if kind == "CMD" && !words.is_empty() => words.to_vec(),
            Some((kind, [line, ..])) if kind == "CMD-SHELL" => {
                ["/bin/sh", "-c", line].map(str::to_owned).into()
            }
            _ => return None,
        };
        let time = |ns: i64| u64::try_from(ns).ok().filter(|ns| *ns > 0).map(Duration::from_nanos);
        Some(Healthcheck {
            command,
            interval: time(self.interval),
            timeout: time(self.timeout),
            start_period: time(self.start_period),
            retries: u32::try_from(self.retries).ok().filter(|retries| *retries > 0),
        })
    }
}

/// Go programs write `null` for what is empty.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl ConfigFile {
    pub(crate) fn into_image_config(self) -> ImageConfig {
        let run = self.config;
        ImageConfig {
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            env: run.env,
            cwd: run.working_dir,
            user: run.user,
            exposed_ports: run.exposed_ports.into_keys().collect(),
            labels: run.labels,
            stop_signal: run.stop_signal.filter(|signal| !signal.is_empty()),
            health: run.healthcheck.and_then(RawHealthcheck::known),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(json: &str) -> Option<Healthcheck> {
        let text = format!(r#"{{"config":{{"Healthcheck":{json}}},"rootfs":{{"diff_ids":[]}}}}"#);
        serde_json::from_str::<ConfigFile>(&text).unwrap().into_image_config().health
    }

    #[test]
    fn a_health_check_of_docker_is_a_command_with_times() {
        let shell =
            health(r#"{"Test":["CMD-SHELL","curl -f x || exit 1"],"Interval":5000000000,"Retries":2}"#);
        let shell = shell.unwrap();
        assert_eq!(shell.command, ["/bin/sh", "-c", "curl -f x || exit 1"]);
        assert_eq!((shell.interval, shell.timeout), (Some(Duration::from_secs(5)), None));
        assert_eq!(shell.retries, Some(2));
        assert_eq!(health(r#"{"Test":["CMD","/check","-q"]}"#).unwrap().command, ["/check", "-q"]);
    }

    #[test]
    fn none_switches_off_what_is_unknown_is_ignored_and_odd_numbers_are_left_out() {
        assert_eq!(health(r#"{"Test":["NONE"]}"#).unwrap().command, Vec::<String>::new());
        for odd in ["null", "{}", r#"{"Test":null}"#, r#"{"Test":["CMD"]}"#, r#"{"Test":["OTHER","x"]}"#] {
            assert_eq!(health(odd), None, "{odd}");
        }
        let odd =
            health(r#"{"Test":["CMD","a"],"Timeout":-5,"Retries":99999999999,"StartPeriod":0}"#).unwrap();
        assert_eq!(odd, Healthcheck { command: vec!["a".into()], ..Healthcheck::default() });
    }
}
