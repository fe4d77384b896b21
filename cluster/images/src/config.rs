//! What an image says about how to run it (OCI image specification, config.md).

use std::collections::BTreeMap;

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
        }
    }
}
