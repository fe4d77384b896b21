//! The type configuration of openraft, once.

use openraft::alias;
use serde::{Deserialize, Serialize};

use crate::state::{Outcome, Proposal};

openraft::declare_raft_types!(
    /// What our log carries and what applying it answers.
    pub Types:
        D = Proposal,
        R = Applied,
);

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
/// Where an entry is in the log.
pub type LogId = alias::LogIdOf<Types>;
/// Whom this member votes for.
pub type Vote = alias::VoteOf<Types>;
/// The members, and the entry that made them so.
pub type StoredMembership = alias::StoredMembershipOf<Types>;
/// What a snapshot holds, in short.
pub type SnapshotMeta = alias::SnapshotMetaOf<Types>;
