//! The stream of a node's own plan. What sends plans to an agent needs nothing else of the cluster: a node that holds no
//! replica can do the same work behind the same trait, from a feed that a replica filters for it.
//!
//! The contract is small on purpose. A feed is level-triggered: it answers the newest plan, not each one; equal generations
//! are equal plans; generations never go back. Whoever fails to reach its source waits inside [`PlanFeed::next`].

use std::net::IpAddr;

use blixard_agent_api::HostPlan;

use super::plan::plan_for;
use crate::raft::Consensus;
use crate::watch;

/// The stream of one node's plan.
pub trait PlanFeed: Send {
    /// The newest plan, as soon as its generation is another one than `after`; `None` when there will be no more.
    fn next(&mut self, after: Option<u64>) -> impl Future<Output = Option<HostPlan>> + Send;
}

/// The feed of a node that holds a replica.
pub struct ReplicaFeed {
    consensus: Consensus,
    revisions: watch::Receiver<u64>,
    resolvers: Vec<IpAddr>,
}

impl ReplicaFeed {
    /// The plan of this member's node.
    pub fn new(consensus: Consensus, resolvers: Vec<IpAddr>) -> Self {
        let revisions = consensus.replica().revisions();
        Self { consensus, revisions, resolvers }
    }

    fn newest(&self, after: Option<u64>) -> Option<HostPlan> {
        let node = self.consensus.node();
        let state = self.consensus.replica().state();
        let generation = state.node(node)?.plan_generation;
        // A plan is made only when it is another one: with thousands of VMs that takes a while.
        (Some(generation) != after).then(|| plan_for(&state, node, &self.resolvers)).flatten()
    }
}

impl PlanFeed for ReplicaFeed {
    async fn next(&mut self, after: Option<u64>) -> Option<HostPlan> {
        loop {
            // Noted before looking: what comes in between wakes again.
            self.revisions.mark_unchanged();
            if let Some(plan) = self.newest(after) {
                return Some(plan);
            }
            self.revisions.changed().await.ok()?;
        }
    }
}
