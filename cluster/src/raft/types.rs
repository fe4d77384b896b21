//! The type configuration of openraft, once.

use std::fmt;
use std::sync::Arc;

use openraft::alias;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::state::{Outcome, Proposal};

openraft::declare_raft_types!(
    /// What our log carries and what applying it answers.
    pub Types:
        D = Command,
        R = Applied,
        AsyncRuntime = super::runtime::Runtime,
);

/// A proposal on its way through the log: as the bytes that every log stores, and, where it was proposed, as the value too.
#[derive(Clone)]
pub struct Command {
    json: Arc<[u8]>,
    value: Option<Arc<Proposal>>,
}

impl Command {
    /// A proposal of this node.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(proposal: Proposal) -> Result<Self, serde_json::Error> {
        Ok(Self { json: serde_json::to_vec(&proposal)?.into(), value: Some(Arc::new(proposal)) })
    }

    /// What came from another node or the disk. It is read when it is applied.
    pub fn from_bytes(json: &[u8]) -> Self {
        Self { json: json.into(), value: None }
    }

    /// JSON.
    pub fn bytes(&self) -> &[u8] {
        &self.json
    }

    /// The proposal.
    ///
    /// # Errors
    /// It is none that this program knows.
    pub fn proposal(&self) -> Result<Arc<Proposal>, serde_json::Error> {
        match &self.value {
            Some(value) => Ok(Arc::clone(value)),
            None => serde_json::from_slice(&self.json).map(Arc::new),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.json.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.proposal() {
            Ok(proposal) => proposal.fmt(f),
            Err(_) => f.write_str("unknown"),
        }
    }
}

impl PartialEq for Command {
    fn eq(&self, other: &Self) -> bool {
        self.json == other.json
    }
}

impl Serialize for Command {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.proposal().map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Command {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Proposal::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// What applying one log entry answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// The entry carried no command.
    Nothing,
    /// The answer of the command.
    Command(Box<Outcome>),
}

/// An entry of the log.
pub type Entry = alias::EntryOf<Types>;
/// Who leads, in which term.
pub type LeaderId = alias::LeaderIdOf<Types>;
/// Where an entry is in the log.
pub type LogId = alias::LogIdOf<Types>;
/// Whom this member votes for.
pub type Vote = alias::VoteOf<Types>;
/// The members, and the entry that made them so.
pub type StoredMembership = alias::StoredMembershipOf<Types>;
/// What a snapshot holds, in short.
pub type SnapshotMeta = alias::SnapshotMetaOf<Types>;
