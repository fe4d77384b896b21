//! The lease of this host: what a majority of voters gave is passed on to the agent, which freezes at its end.
//!
//! A lease is about the plan that follows from what the voters knew when they gave it. It is passed on once the agent works
//! by a plan that is at least as new; newer plans do not hold it up. Where there is only one node there are no leases:
//! nobody else could start its VMs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use blixard_agent_api::{AgentError, Generation, ProblemKind};
use tokio_util::sync::CancellationToken;

use super::local::{Link, Local};
use super::{Agent, chain};
use crate::liveness::Renewal;
use crate::raft::Consensus;
use crate::state::placement::NodeChange;
use crate::state::{Command, Proposal, State};

/// Longest time between two looks, a small part of a lease: what a lease waits for besides may come without a signal.
const LOOK: Duration = Duration::from_millis(500);
/// Longest wait for what a majority knows, before the agent is told that there are no leases.
const KNOW_MAX: Duration = Duration::from_secs(1);
/// Most leases that wait for a plan to arrive.
const WAITING_MAX: usize = 64;

/// Leases on their way to the agent. Pure.
#[derive(Debug, Default)]
pub(super) struct Passing {
    /// Until when, and the oldest plan that each is about; later ones behind.
    waiting: VecDeque<(u64, u64)>,
    newest_ms: u64,
}

impl Passing {
    /// A lease whose revision is applied here, where the plan has this generation now.
    pub(super) fn take(&mut self, lease: Renewal, generation: u64) {
        if lease.until_ms > self.newest_ms {
            self.newest_ms = lease.until_ms;
            self.waiting.push_back((lease.until_ms, generation));
            while self.waiting.len() > WAITING_MAX {
                self.waiting.pop_front();
            }
        }
    }

    /// The latest lease that an agent with this plan may have; earlier ones are of no use any more.
    pub(super) fn next(&mut self, planned: u64) -> Option<(u64, u64)> {
        let count = self.waiting.iter().take_while(|(_, generation)| *generation <= planned).count();
        self.waiting.drain(..count).next_back()
    }
}

/// What to do about the time of leases as such. Pure.
#[derive(Debug, PartialEq, Eq)]
enum Mode {
    /// Leases are passed on; whether it is to be recorded that the agent enforces them, or does not.
    Leases(Option<bool>),
    /// It is to be recorded first that nobody may rely on leases of this host.
    Unrecord,
    /// The agent is to be told that there are no leases.
    End,
    /// There are none.
    Nothing,
}

/// Whether there are leases at all.
pub(super) fn has_leases(state: &State) -> bool {
    state.places() && state.nodes().nth(1).is_some()
}

fn mode(state: &State, node: u64, enforced: bool) -> Mode {
    let recorded = state.node(node).is_some_and(|record| record.offer.leased);
    if has_leases(state) {
        return Mode::Leases((recorded != enforced).then_some(enforced));
    }
    match (recorded, enforced) {
        (true, _) => Mode::Unrecord,
        (false, true) => Mode::End,
        (false, false) => Mode::Nothing,
    }
}

/// The loop.
pub struct Renewer {
    /// The agent.
    pub agent: Arc<dyn Agent>,
    /// Where leases come from.
    pub consensus: Consensus,
    /// What the agent reported.
    pub local: Arc<Local>,
}

impl Renewer {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut pace = tokio::time::interval(LOOK);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut passing = Passing::default();
        let mut reports = self.local.changes();
        loop {
            let woken = async {
                tokio::select! {
                    biased;
                    () = self.consensus.pulse().renewed() => {}
                    _ = reports.changed() => {}
                    _ = pace.tick() => {}
                }
            };
            if stop.run_until_cancelled(woken).await.is_none() {
                return;
            }
            stop.run_until_cancelled(self.look(&mut passing)).await;
        }
    }

    async fn look(&self, passing: &mut Passing) {
        let host = self.local.host();
        let (Link::Up, Some(seen)) = (host.link, host.seen) else { return };
        let node = self.consensus.node();
        let mode = {
            let state = self.consensus.replica().state();
            let lease = self.consensus.pulse().holder().lease(state.revision());
            if let (Some(lease), Some(record)) = (lease, state.node(node)) {
                passing.take(lease, record.plan_generation);
            }
            mode(&state, node, seen.report.leased)
        };
        match mode {
            // The state of a node that has just started may be from before it was one of several.
            Mode::Unrecord | Mode::End if !self.is_still(&mode, seen.report.leased).await => {}
            Mode::Leases(record) => {
                if let Some((until_ms, generation)) = passing.next(seen.report.generation.0)
                    && until_ms > self.consensus.clock().boottime_ms()
                {
                    self.renew(Some(until_ms), generation).await;
                }
                if let Some(enforced) = record {
                    self.record(enforced).await;
                }
            }
            Mode::Unrecord => self.record(false).await,
            Mode::End => self.renew(None, seen.report.generation.0).await,
            Mode::Nothing => {}
        }
    }

    /// Whether this is so by what a majority knows, too.
    async fn is_still(&self, so: &Mode, enforced: bool) -> bool {
        let known = tokio::time::timeout(KNOW_MAX, self.consensus.linearize()).await;
        let state = self.consensus.replica().state();
        matches!(known, Ok(Ok(()))) && mode(&state, self.consensus.node(), enforced) == *so
    }

    async fn renew(&self, until_ms: Option<u64>, generation: u64) {
        match self.agent.renew(until_ms, Generation(generation)).await {
            Ok(()) => {}
            // Another start of the agent has an older plan: it gets the newest.
            Err(AgentError::Refused(problem)) if problem.kind == ProblemKind::NotNow => {}
            Err(error) => tracing::warn!("the agent does not take a lease: {}", chain(&error)),
        }
    }

    async fn record(&self, leased: bool) {
        let command = Command::Node { node: self.consensus.node(), change: NodeChange::Leased(leased) };
        let proposal = Proposal { now_ms: self.consensus.clock().now_ms(), key: None, command };
        match self.consensus.propose(proposal).await {
            Ok(_) => tracing::info!(leased, "what the agent does at the end of a lease is recorded"),
            Err(error) => tracing::debug!("cannot record it: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::Cluster;

    #[test]
    fn a_lease_waits_for_the_plan_that_it_is_about_and_not_for_newer_ones() {
        let mut passing = Passing::default();
        let lease = |until_ms| Renewal { until_ms, revision: 0 };
        passing.take(lease(100), 5);
        assert_eq!(passing.next(4), None);
        passing.take(lease(200), 9);
        passing.take(lease(200), 12);
        assert_eq!(passing.next(7), Some((100, 5)), "a plan that is made anew all the time does not stop it");
        passing.take(lease(300), 10);
        assert_eq!(passing.next(20), Some((300, 10)), "the latest");
        assert_eq!(passing.next(20), None, "once");
    }

    #[test]
    fn one_node_alone_has_no_leases_and_says_so_before_it_ends_them() {
        let record = |cluster: &mut Cluster, leased| {
            cluster.run(Command::Node { node: 1, change: NodeChange::Leased(leased) }).unwrap();
        };
        let mut alone = Cluster::new(16);
        assert_eq!(mode(&alone.state, 1, false), Mode::Nothing);
        record(&mut alone, true);
        assert_eq!(mode(&alone.state, 1, true), Mode::Unrecord);
        record(&mut alone, false);
        assert_eq!(mode(&alone.state, 1, true), Mode::End);
        let mut two = Cluster::with_nodes(16, 2);
        assert_eq!(mode(&two.state, 1, false), Mode::Leases(None));
        assert_eq!(mode(&two.state, 1, true), Mode::Leases(Some(true)));
        record(&mut two, true);
        assert_eq!(mode(&two.state, 1, true), Mode::Leases(None));
        assert_eq!(mode(&two.state, 1, false), Mode::Leases(Some(false)), "the agent has forgotten it");
    }
}
