//! The cluster itself: its nodes, how it is formed, tokens.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Asks a node to let others join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitCluster {
    /// Where other nodes and users reach it.
    pub address: SocketAddr,
    /// Where it listens for them; absent: at the same address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bind: Option<SocketAddr>,
}

/// Asks a node to leave its own empty cluster and join another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinCluster {
    /// A join token.
    pub token: String,
    /// Where other nodes and users will reach it.
    pub address: SocketAddr,
    /// Where it listens for them; absent: at the same address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bind: Option<SocketAddr>,
}

/// What a node that wants to join says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applicant {
    /// Name for people.
    pub name: String,
    /// Where other nodes and users reach it.
    pub address: SocketAddr,
    /// Its public key (Ed25519), hexadecimal.
    pub public_key: String,
    /// Where it stands: `zone`, `rack` and whatever else is told apart.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Version of its program.
    pub version: String,
    /// Highest feature level that its program knows.
    pub feature_level: u32,
}

/// What a node that joined is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// Its number.
    pub node: u64,
    /// Identity of the cluster.
    pub cluster: String,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The authorities of the cluster, PEM.
    pub authorities_pem: String,
    /// Version of the trust that both are from; 0 from nodes that do not say it.
    #[serde(default)]
    pub trust_version: u64,
}

/// Asks for a join token, or names what a token for the API shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// Name of a token for the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long it is valid, in milliseconds; absent: a join token an hour, a token for the API for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// A token. Its text is shown once, when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Name of a token for the API; the beginning of its digest for a join token.
    pub name: String,
    /// The token itself, only in the answer to its making.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// When it was made, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// When it ends, in milliseconds of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<u64>,
}

/// How the cluster is, as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Identity, once other nodes can join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Name of the leader, when one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// Term of the leader.
    pub term: u64,
    /// What every node understands.
    pub feature_level: u32,
    /// What the program that answers understands.
    pub feature_level_known: u32,
    /// How long VMs that may be started elsewhere run on while their host hears from no majority of the voters, in milliseconds.
    #[serde(default)]
    pub lease_ms: u64,
    /// Number of nodes.
    pub nodes: usize,
    /// Names of the nodes that vote.
    pub voters: Vec<String>,
    /// The authority is being changed.
    pub rotating: bool,
    /// Index of the newest entry that this node has applied.
    pub applied: u64,
    /// Index of the newest entry in its log.
    pub last_log: u64,
}

/// Part of a node in the consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeRole {
    /// It leads.
    Leader,
    /// It votes.
    Voter,
    /// It gets everything and does not vote.
    Learner,
}

impl std::fmt::Display for NodeRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Leader => "leader",
            Self::Voter => "voter",
            Self::Learner => "learner",
        })
    }
}

/// Whether a node answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It does.
    #[default]
    Up,
    /// It may not: it gets no new VMs.
    Suspected,
    /// It does not, and its lease has ended: its VMs are started elsewhere.
    Down,
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Suspected => "suspected",
            Self::Down => "down",
        })
    }
}

/// What VMs take of a node, or may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRoom {
    /// Processors in thousandths.
    pub cpu_milli: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Space for disks in MiB.
    pub disk_mib: u64,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Name.
    pub name: String,
    /// Number.
    pub id: u64,
    /// Its part in the consensus.
    pub role: NodeRole,
    /// Where other nodes and users reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Where it stands.
    pub labels: BTreeMap<String, String>,
    /// It gets no new VMs.
    pub cordoned: bool,
    /// Its VMs are being moved away.
    #[serde(default)]
    pub draining: bool,
    /// Whether it answers.
    #[serde(default)]
    pub status: NodeState,
    /// Its agent freezes VMs when the node is cut off: only then are they started elsewhere without an operator.
    #[serde(default)]
    pub leased: bool,
    /// Version of its program.
    pub version: String,
    /// Highest feature level that its program knows.
    pub feature_level: u32,
    /// VMs placed on it.
    pub vms: usize,
    /// What its VMs take.
    #[serde(default)]
    pub used: NodeRoom,
    /// What they may take, with overcommit and without reserves; absent while its agent has not told: until then it gets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<NodeRoom>,
    /// Milliseconds since it answered the leader; only the leader knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard_ms_ago: Option<u64>,
}

/// Asks for another leader.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferLeader {
    /// Name of the node; absent: any other voter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// Asks for a higher feature level.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaiseLevel {
    /// Which; absent: what the answering node's program knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<u32>,
}
