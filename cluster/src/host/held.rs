//! The lease of this host, in a file: what [`renew`](super::renew) tells the agent, for those that do not hear it from the agent. The
//! guard of this host does not freeze what still has a lease while the agent is dead, and an agent that starts finds it.
//!
//! A loop of its own, since an agent that hangs holds up the other one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blixard_agent_api::{Generation, HeldLease};
use tokio_util::sync::CancellationToken;

use super::local::Local;
use super::renew::{Passing, has_leases};
use crate::raft::Consensus;

/// Between two looks, a small part of a lease: what is written is older than what the node holds by so much.
const LOOK: Duration = Duration::from_secs(1);

/// The loop.
pub struct Teller {
    /// Where leases come from.
    pub consensus: Consensus,
    /// What the agent reported: which plan it works by.
    pub local: Arc<Local>,
    /// The file.
    pub path: PathBuf,
    /// Boot that leases are about.
    pub boot: String,
}

impl Teller {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut pace = tokio::time::interval(LOOK);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut passing = Passing::default();
        while stop.run_until_cancelled(pace.tick()).await.is_some() {
            let Some(held) = self.look(&mut passing) else { continue };
            let path = self.path.clone();
            match tokio::task::spawn_blocking(move || held.put(&path)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(path = %self.path.display(), "the lease is not written: {error}")
                }
                Err(error) => tracing::error!("the lease is not written: {error}"),
            }
        }
    }

    fn look(&self, passing: &mut Passing) -> Option<HeldLease> {
        let planned = self.local.host().seen?.report.generation.0;
        let state = self.consensus.replica().state();
        let lease = self.consensus.pulse().holder().lease(state.revision())?;
        let record = state.node(self.consensus.node()).filter(|_| has_leases(&state))?;
        passing.take(lease, record.plan_generation);
        let (until_ms, generation) = passing.next(planned)?;
        Some(HeldLease { boot: self.boot.clone(), until_ms, generation: Generation(generation) })
    }
}
