//! Which nodes live, and how long each may run restartable VMs. Pure but for [`watch`]: time comes in as milliseconds of each
//! process's own clock that never stands still (CLOCK_BOOTTIME), messages go out as values.
//!
//! Three roles, each a small state machine:
//!
//! * [`holder`]: every node. It sends a heartbeat to each voter; when a majority has answered one, its lease lasts until
//!   [`Settings::lease_ms`] after that heartbeat was *sent*.
//! * [`voter`]: every voter. It answers heartbeats of nodes that are up in its applied state, and remembers when it last
//!   did. So each future leader knows what it needs already.
//! * [`detector`]: the leader. A node that is silent, and that others cannot reach either, becomes suspected by a log
//!   entry; from then on no voter that has applied it answers that node. Once a majority of voters has said, after applying and
//!   storing it, that their last answer is longer ago than a lease can last, the lease has ended for certain, and the node is
//!   down. A voter that spoke of what it had not stored could restart with an older state and answer the node again.
//!
//! The fence is the log itself: any majority that could renew the lease meets the majority that has said it will not. A new
//! leader goes on where the old one was; nothing waits for it to have been leader for some time. Nor does anything depend
//! on how many nodes there are. `lease_model_test.rs` looks at every order of events of a small cluster.
//!
//! Who votes may change. Answers count only from voters that know the same [`Electorate`] as who counts them, and a voter
//! that learns of another one begins anew as if it had answered everybody just then. Majorities of one electorate and the
//! next always meet (a change goes through both), so no lease of the old one is overlooked.
//!
//! A node lives when it says that a majority of voters replies to it: one that reaches only the leader, or only other nodes,
//! has no lease to run anything with, and is treated like one that is silent.
//!
//! Why not a lease given by the leader alone: a new leader does not know what the old one gave, and would have to wait for
//! a whole lease after each election.

pub mod detector;
pub mod downs;
pub mod holder;
pub mod voter;
pub mod watch;

#[cfg(test)]
mod lease_model_test;

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

pub use detector::{Action, Detector};
pub use downs::Downs;
pub use holder::{Holder, Renewal, Reply};
pub use voter::Voter;

use crate::state::records::LEASE_MS;
use crate::state::{NodeId, NodeStatus, State};

/// Times of failure handling, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Between two heartbeats of a node.
    pub heartbeat_ms: u64,
    /// A node that was silent for so long is probed.
    pub suspect_after_ms: u64,
    /// How long others may take to reach it.
    pub probe_ms: u64,
    /// How many others try.
    pub probes: usize,
    /// How long a lease lasts.
    pub lease_ms: u64,
    /// How much slower a clock may be than another, in thousandths.
    pub drift_per_mille: u64,
    /// How long an agent may take to freeze what it has.
    pub freeze_ms: u64,
}

impl Default for Settings {
    /// A dead node is suspected after 2.5 s and its VMs are placed elsewhere after 5.4 s: what is left of ten seconds is for
    /// starting them.
    fn default() -> Self {
        Self {
            heartbeat_ms: 500,
            suspect_after_ms: 2_000,
            probe_ms: 500,
            probes: 3,
            lease_ms: LEASE_MS,
            drift_per_mille: 20,
            freeze_ms: 250,
        }
    }
}

impl Settings {
    /// Those of this cluster.
    pub fn of(state: &State) -> Self {
        let lease_ms = state.cluster().map_or(LEASE_MS, |cluster| cluster.lease_ms);
        Self { lease_ms, ..Self::default() }
    }

    /// After this time on any clock a lease has ended on every clock, and what ran under it is frozen.
    pub fn lease_over_ms(&self) -> u64 {
        let drift = self.lease_ms.saturating_mul(self.drift_per_mille).div_ceil(1000);
        self.lease_ms.saturating_add(drift).saturating_add(self.freeze_ms)
    }
}

/// Term and index of a log entry.
pub type EntryId = (u64, u64);

/// Who votes, as one member knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Electorate {
    /// The log entry that says so.
    pub since: EntryId,
    /// One set; two while the voters change: then a majority of each is needed.
    pub sets: Vec<BTreeSet<NodeId>>,
}

impl Electorate {
    /// Whether those for whom `some` is true are a majority.
    pub fn is_majority(&self, some: impl Fn(NodeId) -> bool) -> bool {
        let majority = |set: &BTreeSet<NodeId>| {
            let count = set.iter().filter(|node| some(**node)).count();
            count > set.len() / 2
        };
        !self.sets.is_empty() && self.sets.iter().all(majority)
    }

    /// All voters.
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.sets.iter().flatten().copied().collect()
    }
}

/// What the applied state says of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Standing {
    /// Whether it counts as answering.
    pub status: NodeStatus,
    /// Revision of the present suspicion; 0 when it is up.
    pub suspicion: u64,
}

/// This node's part as holder and as voter, shared by the loops and by what answers other nodes.
#[derive(Debug)]
pub struct Pulse {
    voter: Mutex<Voter>,
    holder: Mutex<Holder>,
    renewed: Notify,
}

impl Pulse {
    /// The parts of a process that begins now.
    pub fn new(now_ms: u64) -> Self {
        let settings = Settings::default();
        let (voter, holder) = (Voter::new(now_ms), Holder::new(settings));
        Self { voter: Mutex::new(voter), holder: Mutex::new(holder), renewed: Notify::new() }
    }

    /// A voter replied to heartbeat `number`; wakes whoever waits for a longer lease.
    pub fn reply(&self, number: u64, reply: Reply, voters: &Electorate) {
        let mut holder = self.holder();
        let before = holder.lease(u64::MAX);
        holder.reply(number, reply, voters);
        if holder.lease(u64::MAX) != before {
            self.renewed.notify_one();
        }
    }

    /// Returns once there is another lease than at the last time. For one task.
    pub async fn renewed(&self) {
        self.renewed.notified().await;
    }

    /// The voter. Whoever reads the state for it does so while holding this: see [`watch`].
    pub fn voter(&self) -> MutexGuard<'_, Voter> {
        self.voter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The holder.
    pub fn holder(&self) -> MutexGuard<'_, Holder> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
