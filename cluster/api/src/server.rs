//! The node that answers.

use serde::{Deserialize, Serialize};

/// What answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the node's program.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Feature level of the cluster.
    pub feature_level: u32,
}

/// How the node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// It serves reads and writes.
    pub ready: bool,
    /// Name of the leader, when known.
    pub leader: Option<String>,
    /// Its agent answers.
    pub agent: bool,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// One thing that was looked at on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, for example `cgroup v2`.
    pub check: String,
    /// `ok`, `warning` (works, with less) or `bad` (VMs cannot run like this).
    pub state: String,
    /// What was found.
    pub found: String,
    /// What to do about it, when something is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}
