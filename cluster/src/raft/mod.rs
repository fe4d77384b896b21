//! How openraft is used here: no type of openraft leaves this module.
//!
//! * [`db`]: open files
//! * [`codec`]: entries as bytes
//! * [`journal`]: what makes the log durable between two commits of its database
//! * [`log_store`]: log and vote, one flush for many proposals
//! * [`state_store`]: applies entries to the state, and keeps it in redb
//! * [`storage`]: where both are, and where their work is done
//! * [`runtime`]: chance, for elections
//! * [`replica`]: the state as the rest of the process sees it
//! * [`peer`]: the way to other members
//! * [`propose`]: commands and linearizable reads, here or through the leader
//! * [`membership`]: who is a member, and who of them votes
//! * [`recover`]: a new cluster from what one member has, when the others are lost
//!
//! [`Consensus`] is the handle: it proposes commands and answers once they are applied.

pub mod codec;
pub mod db;
pub mod heartbeat;
pub mod journal;
pub mod log_store;
pub mod membership;
pub mod peer;
pub mod propose;
pub mod recover;
pub mod replica;
pub mod runtime;
pub mod state_store;
pub mod storage;
pub mod types;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::{BasicNode, Config, Raft, ServerState, SnapshotPolicy};

use self::db::Closed;
use self::log_store::{LogError, LogStore};
use self::peer::{Connect, Peers};
pub use self::propose::ProposeError;
use self::replica::Replica;
use self::state_store::{StateError, StateStore};
use self::storage::Storage;
use self::types::Types;
use crate::clock::Clock;
use crate::liveness::Pulse;
use crate::state::NodeId;

/// Silence of the leader after which a voter stands for election, in milliseconds, when nothing else is said.
pub const ELECTION_TIMEOUT_MS: u64 = 250;
/// Longest wait for leadership and recovery after a start.
const RECOVERY_MAX: Duration = Duration::from_secs(60);

/// Longest wait for another leader at the end.
const HAND_OVER_MAX: Duration = Duration::from_secs(1);
/// Longest wait for the files to be closed at the end.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// Why consensus cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    /// The folder cannot be made.
    #[error("cannot make the folder {path}")]
    Folder {
        /// Which.
        path: std::path::PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// See [`LogError`].
    #[error("the Raft log is of no use")]
    Log(#[from] LogError),
    /// See [`StateError`].
    #[error("the replicated state is of no use")]
    State(#[from] StateError),
    /// openraft refuses to run.
    #[error("Raft cannot {what}: {reason}")]
    Raft {
        /// What was tried.
        what: &'static str,
        /// openraft's answer.
        reason: String,
    },
}

/// Numbers of this member.
#[derive(Debug, Clone, Copy, Default)]
pub struct RaftNumbers {
    /// Term.
    pub term: u64,
    /// Index of the last log entry.
    pub last_log: u64,
    /// Index of the newest committed entry.
    pub committed: u64,
    /// Index of the newest applied entry.
    pub applied: u64,
    /// Index up to which the log was cut off.
    pub purged: u64,
    /// Index of the newest snapshot.
    pub snapshot: u64,
    /// 1 when this node leads.
    pub leads: bool,
    /// Commands proposed here since the start of the process.
    pub proposals: u64,
}

/// What a member is opened with.
pub struct Opening<'a> {
    /// Where log and state are.
    pub storage: &'a dyn Storage,
    /// Number of this node.
    pub node: NodeId,
    /// Makes a cluster of this one voter when there is none. Otherwise the first contact comes from the leader.
    pub founder: bool,
    /// Entries after which the log is cut.
    pub snapshot_after: u64,
    /// Silence of the leader after which a voter stands for election, in milliseconds: [`ELECTION_TIMEOUT_MS`], or what the
    /// operator says.
    pub election_timeout_ms: u64,
    /// The way to other members, when there can be some.
    pub way: Option<Arc<dyn Connect>>,
    /// The clocks of this host.
    pub clock: Clock,
}

/// The handle of this member. Clones are the same member.
#[derive(Clone)]
pub struct Consensus {
    raft: Raft<Types, StateStore>,
    replica: Arc<Replica>,
    peers: Peers,
    proposals: Arc<AtomicU64>,
    node: NodeId,
    pulse: Arc<Pulse>,
    clock: Clock,
    closing: Arc<Mutex<Vec<Closed>>>,
}

fn index(id: Option<types::LogId>) -> u64 {
    id.map_or(0, |id| id.index)
}

/// How this member takes part: 75 ms between heartbeats, an election after 250 to 350 ms of silence, or in proportion. A member
/// asks the others first whether they would elect it, so that one that comes back does not disturb a leader that works.
fn settings(snapshot_after: u64, election_ms: u64) -> Config {
    Config {
        cluster_name: "blixard".into(),
        heartbeat_interval: election_ms.saturating_mul(3) / 10,
        election_timeout_min: election_ms,
        election_timeout_max: election_ms.saturating_mul(7) / 5,
        enable_pre_vote: Some(true),
        // A leader that comes back is elected anew. Its term would go on otherwise with what its disk kept: it does not know
        // what was agreed, and answers reads without it; and it may have lost entries that the others flushed before it did.
        enable_leader_restore: Some(false),
        max_payload_entries: 1024,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_after),
        max_in_snapshot_log_to_keep: snapshot_after,
        ..Config::default()
    }
}

impl Consensus {
    /// Opens log and state and starts this member.
    ///
    /// # Errors
    /// See [`ConsensusError`].
    pub async fn open(opening: Opening<'_>) -> Result<Self, ConsensusError> {
        let Opening { storage, node, founder, snapshot_after, election_timeout_ms, way, clock } = opening;
        let (log, log_closed) = LogStore::open(storage)?;
        let (state, state_closed) = StateStore::open(storage, clock.clone())?;
        let replica = state.replica();
        let peers = Peers::new(Arc::clone(&replica), way);
        let failed = |what| move |error: String| ConsensusError::Raft { what, reason: error };
        let config = settings(snapshot_after, election_timeout_ms).validate();
        let config = config.map_err(|e| failed("use its settings")(e.to_string()))?;
        let raft = Raft::new(node, Arc::new(config), peers.clone(), log, state).await;
        let raft = raft.map_err(|e| failed("start")(e.to_string()))?;
        let known = raft.is_initialized().await.map_err(|e| failed("read its state")(e.to_string()))?;
        if founder && !known {
            let members = BTreeMap::from([(node, BasicNode::default())]);
            raft.initialize(members).await.map_err(|e| failed("make a cluster")(e.to_string()))?;
        } else if known && raft.voter_ids().all(|voter| voter == node) {
            // A lone voter need not wait until a leader has been silent for long enough.
            let elect = raft.trigger().elect(false).await;
            elect.map_err(|e| failed("stand for election")(e.to_string()))?;
        }
        let closing = Arc::new(Mutex::new(vec![log_closed, state_closed]));
        let pulse = Arc::new(Pulse::new(clock.boottime_ms()));
        Ok(Self { raft, replica, peers, proposals: Arc::default(), node, pulse, clock, closing })
    }

    /// True when this is the only member that votes.
    pub fn is_alone(&self) -> bool {
        let mut voters = self.raft.voter_ids();
        voters.next() == Some(self.node) && voters.next().is_none()
    }

    fn raft(&self) -> &Raft<Types, StateStore> {
        &self.raft
    }

    /// Waits until this member has applied all that was acknowledged before it was started; a lone voter also leads then.
    ///
    /// # Errors
    /// [`ConsensusError::Raft`] when that takes too long.
    pub async fn recovered(&self) -> Result<(), ConsensusError> {
        let failed = |what| move |error: String| ConsensusError::Raft { what, reason: error };
        if self.is_alone() {
            let wait = self.raft.wait(Some(RECOVERY_MAX)).state(ServerState::Leader, "lead").await;
            wait.map_err(|e| failed("lead")(e.to_string()))?;
        }
        let wait = self.raft.wait_for_recovery(Some(RECOVERY_MAX)).await;
        wait.map_err(|e| failed("recover")(e.to_string()))?;
        Ok(())
    }

    /// The state as it was last applied here.
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    /// The clocks by which this member decides.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The name of the leader, when known.
    pub fn leader(&self) -> Option<String> {
        self.leader_id().map(|leader| self.name_of(leader))
    }

    /// The leader, when known.
    pub fn leader_id(&self) -> Option<NodeId> {
        use openraft::type_config::async_runtime::watch::WatchReceiver;
        self.raft.metrics().borrow_watched().current_leader
    }

    /// True when this member leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.leader_id() == Some(self.node)
    }

    /// Name of a node.
    pub fn name_of(&self, node: NodeId) -> String {
        let known = self.replica.state().node(node).map(|record| record.name.clone());
        known.unwrap_or_else(|| format!("number {node}"))
    }

    /// Numbers of this member.
    pub fn numbers(&self) -> RaftNumbers {
        use openraft::type_config::async_runtime::watch::WatchReceiver;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        RaftNumbers {
            term: metrics.current_term,
            last_log: metrics.last_log_index.unwrap_or(0),
            committed: index(metrics.local_committed),
            applied: index(metrics.last_applied),
            purged: index(metrics.purged),
            snapshot: index(metrics.snapshot),
            leads: metrics.state == ServerState::Leader,
            proposals: self.proposals.load(Ordering::Relaxed),
        }
    }

    /// Waits until consensus has stopped by itself (a failed disk); answers why.
    pub async fn stopped(&self) -> String {
        use openraft::type_config::async_runtime::watch::WatchReceiver;
        let mut metrics = self.raft.metrics();
        loop {
            if let Err(fatal) = &metrics.borrow_watched().running_state {
                return fatal.to_string();
            }
            if metrics.changed().await.is_err() {
                return "Raft has ended".into();
            }
        }
    }

    /// Before this member ends: lets another voter lead, so that nobody has to wait for an election.
    pub async fn hand_over(&self) {
        let (voters, heard) = self.standing();
        let others = heard.into_iter().filter(|(node, _)| voters.contains(node) && *node != self.node);
        let other = others.min_by_key(|(_, ms)| *ms).map(|(node, _)| node);
        let (true, Some(other)) = (self.leads(), other) else { return };
        if let Err(reason) = self.give_up(other, HAND_OVER_MAX).await {
            tracing::warn!("leadership was not handed over: {reason}");
        }
    }

    /// Stops this member, and waits a while until its files are closed.
    pub async fn shutdown(self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "Raft did not end in good order");
        }
        let closing = std::mem::take(&mut *self.closing.lock().unwrap_or_else(PoisonError::into_inner));
        drop(self);
        let closed = async {
            for file in closing {
                file.wait().await;
            }
        };
        if tokio::time::timeout(CLOSE_MAX, closed).await.is_err() {
            tracing::warn!("log and state are not closed; the next start will check them");
        }
    }
}

#[cfg(test)]
#[path = "raft_test.rs"]
mod tests;
