//! When a majority of the voters is lost for ever: a new cluster from what one member has.
//!
//! Offline, by an explicit command. The member's log gets an entry that makes it the only voter, and one for each other
//! node that removes it. Whatever was in its log counts as agreed from then on; what only the lost members had is lost.
//! The others must not come back with their old state: they would still be a majority among themselves.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftStateMachine};
use openraft::vote::{RaftLeaderId, RaftVote};
use openraft::{BasicNode, EntryPayload, LogId as RaftLogId, Membership};

use super::ConsensusError;
use super::log_store::LogStore;
use super::state_store::StateStore;
use super::storage::Folder;
use super::types::{Command, Entry, LeaderId, Vote};
use crate::clock::{self, Clock};
use crate::state::{self, MemberCommand, NodeId, Proposal};

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Newest entry that this member had.
    pub last_log: u64,
    /// Names of the nodes that are removed.
    pub removed: Vec<String>,
}

/// Makes the member in this folder the only voter of its cluster. It must not run.
///
/// # Errors
/// See [`ConsensusError`].
pub async fn force_new_cluster(folder: &Path, node: NodeId) -> Result<Recovered, ConsensusError> {
    let (mut log, log_closed) = LogStore::open(&Folder::new(folder))?;
    let (mut state, state_closed) = StateStore::open(&Folder::new(folder), Clock::default())?;
    let result = rewrite(&mut log, &mut state, node).await;
    drop((log, state));
    log_closed.wait().await;
    state_closed.wait().await;
    result.map_err(|error| ConsensusError::Raft { what: "rewrite the log", reason: error.to_string() })
}

async fn rewrite(log: &mut LogStore, state: &mut StateStore, node: NodeId) -> io::Result<Recovered> {
    let known = log.get_log_state().await?;
    let vote = log.read_vote().await?;
    let Some(last) = known.last_log_id else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "this node has never been a member"));
    };
    let term = vote.map_or(0, |vote| vote.leader_id.term).max(last.leader_id.term).saturating_add(1);
    let leader = LeaderId { term, node_id: node };
    // The stored state may be older than the log: nodes that joined since are to be removed too.
    let (applied, _) = state.applied_state().await?;
    let behind = applied.map_or(0, |id| id.index.saturating_add(1));
    state.catch_up(log.try_get_log_entries(behind..=last.index).await?)?;
    let others: Vec<(NodeId, String)> = {
        let replica = state.replica();
        let state = replica.state();
        state
            .nodes()
            .filter(|record| record.id != node)
            .map(|record| (record.id, record.name.clone()))
            .collect()
    };
    let members = Membership::new(vec![[node].into()], BTreeMap::from([(node, BasicNode::default())]));
    let mut payloads = vec![EntryPayload::Membership(members.map_err(io::Error::other)?)];
    for (other, _) in &others {
        let command = state::Command::Member(Box::new(MemberCommand::Remove { node: *other }));
        let proposal = Proposal { now_ms: clock::now_ms(), key: None, command };
        payloads.push(EntryPayload::Normal(Command::new(proposal)?));
    }
    let entries: Vec<Entry> = payloads
        .into_iter()
        .zip(last.index.saturating_add(1)..)
        .map(|(payload, index)| Entry { log_id: RaftLogId::new(leader.to_committed(), index), payload })
        .collect();
    log.append(entries, IOFlushed::noop()).await?;
    // The log's writer does everything in order: when the vote is stored, so are the entries.
    log.save_vote(&Vote::from_leader_id(leader, false)).await?;
    Ok(Recovered { last_log: last.index, removed: others.into_iter().map(|(_, name)| name).collect() })
}
