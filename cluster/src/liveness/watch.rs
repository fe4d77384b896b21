//! The loops: every node sends heartbeats, the leader watches for silence. What they decide is in the pure parts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::detector::Unanswered;
use super::{Action, Detector, Downs, Settings, Standing};
use crate::raft::Consensus;
use crate::state::placement::NodeChange;
use crate::state::{Command, NodeId, Proposal, Refusal};

/// Between two looks of the leader.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks of a member that does not lead, or has nobody to watch.
const IDLE_LOOK: Duration = Duration::from_millis(500);
/// Longest wait for a proposal of the leader; it is repeated when it is still due.
const PROPOSE_MAX: Duration = Duration::from_secs(1);
/// Most questions under way.
const QUESTIONS_MAX: usize = 4096;

/// Whether nodes watch each other: there are several, and all know the questions.
fn is_watched(consensus: &Consensus) -> bool {
    let state = consensus.replica().state();
    state.places() && state.nodes().nth(1).is_some()
}

/// Sends heartbeats until `stop`.
pub async fn beat(consensus: Consensus, stop: CancellationToken) {
    let settings = Settings::default();
    let mut replies: JoinSet<()> = JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_millis(settings.heartbeat_ms));
    // A process that stood still does not make up for what it missed.
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(pace.tick()).await.is_some() {
        while replies.try_join_next().is_some() {}
        if !is_watched(&consensus) {
            continue;
        }
        let voters = consensus.electorate();
        let (number, connected) = {
            let settings = Settings::of(&consensus.replica().state());
            let mut holder = consensus.pulse().holder();
            holder.set(settings);
            let now_ms = consensus.clock().boottime_ms();
            (holder.beat(now_ms, &voters), holder.is_connected(now_ms))
        };
        for voter in voters.voters() {
            let consensus = consensus.clone();
            replies.spawn(async move {
                // A voter that cannot be reached is nothing new: the next heartbeat tries again.
                if let Ok(reply) = consensus.beat(voter, connected).await {
                    let voters = consensus.electorate();
                    consensus.pulse().reply(number, reply, &voters);
                }
            });
        }
    }
}

/// What the leader of one term works on.
struct Watch {
    consensus: Consensus,
    settings: Settings,
    detector: Arc<Mutex<Detector>>,
    questions: JoinSet<()>,
    /// Suspicions about which was said that too many nodes are down.
    told: BTreeMap<NodeId, u64>,
}

/// Watches for silent nodes for as long as this node leads, until `stop`.
pub async fn detect(consensus: Consensus, stop: CancellationToken) {
    let mut pause = Duration::ZERO;
    let mut term = None;
    let mut watch = None;
    let mut downs = Downs::default();
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        let now_ms = consensus.clock().boottime_ms();
        // Also while another node leads: whoever leads next shall know it.
        downs.look(now_ms, consensus.replica().state().nodes().map(|node| node.offer.down_revision));
        let leads = consensus.leading_term();
        if leads != term {
            watch = None;
            term = leads;
        }
        // A leader that no longer votes hears nobody's heartbeats, and is about to hand over.
        let votes = || consensus.electorate().voters().contains(&consensus.node());
        pause = IDLE_LOOK;
        if leads.is_some() && is_watched(&consensus) && votes() {
            pause = LOOK;
            let watch = watch.get_or_insert_with(|| Watch::new(consensus.clone()));
            stop.run_until_cancelled(watch.look(downs.settled(now_ms))).await;
        }
    }
}

fn locked(detector: &Mutex<Detector>) -> std::sync::MutexGuard<'_, Detector> {
    detector.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    fn new(consensus: Consensus) -> Self {
        let settings = Settings::of(&consensus.replica().state());
        let detector = Arc::new(Mutex::new(Detector::new(settings)));
        Self { consensus, settings, detector, questions: JoinSet::new(), told: BTreeMap::new() }
    }

    async fn look(&mut self, settled: u64) {
        while self.questions.try_join_next().is_some() {}
        let standings = self.consensus.standings();
        self.told.retain(|node, suspicion| standings.get(node).is_some_and(|s| s.suspicion == *suspicion));
        let actions = self.decide(&standings);
        let mut changes = Vec::new();
        for action in actions {
            match action {
                Action::Probe { node, via } => self.probe(node, &via),
                Action::Ask { node, suspicion, voters } => {
                    voters.into_iter().for_each(|voter| self.ask(voter, node, suspicion));
                }
                Action::Suspect(node) => changes.push((node, NodeChange::Suspect)),
                Action::Clear(node) => changes.push((node, NodeChange::Clear)),
                Action::Down { node, suspicion } => {
                    let settled = self.consensus.replica().state().checks_health().then_some(settled);
                    if self.may_be_down(node, suspicion, settled) {
                        changes.push((node, NodeChange::Down { suspicion, settled }));
                    }
                }
            }
        }
        let proposals = changes.into_iter().map(|(node, change)| self.propose(node, change));
        futures::future::join_all(proposals).await;
    }

    fn decide(&self, standings: &BTreeMap<NodeId, Standing>) -> Vec<Action> {
        let (voters, now_ms) = (self.consensus.electorate(), self.consensus.clock().boottime_ms());
        let mut voter = self.consensus.pulse().voter();
        voter.votes_since(now_ms, voters.since);
        voter.retain(|node| standings.contains_key(&node));
        locked(&self.detector).tick(now_ms, standings, &voters, &voter)
    }

    fn probe(&mut self, node: NodeId, via: &[NodeId]) {
        tracing::info!(node, ?via, "a node is silent: others try to reach it");
        for via in via.iter().copied() {
            let (consensus, detector) = (self.consensus.clone(), Arc::clone(&self.detector));
            self.questions.spawn(async move {
                if consensus.reaches_via(via, node).await {
                    locked(&detector).reached(consensus.clock().boottime_ms(), node);
                }
            });
        }
    }

    fn ask(&mut self, voter: NodeId, node: NodeId, suspicion: u64) {
        // What is left out is asked with a later look.
        if self.questions.len() >= QUESTIONS_MAX {
            return;
        }
        let (consensus, detector) = (self.consensus.clone(), Arc::clone(&self.detector));
        self.questions.spawn(async move {
            let Ok(answer) = consensus.ask_unanswered(voter, node, suspicion).await else { return };
            let Some(for_ms) = answer.for_ms else { return };
            let told =
                Unanswered { for_ms, at_ms: consensus.clock().boottime_ms(), electorate: answer.electorate };
            locked(&detector).told(node, suspicion, voter, told);
        });
    }

    fn may_be_down(&mut self, node: NodeId, suspicion: u64, settled: Option<u64>) -> bool {
        let now_ms = self.consensus.clock().now_ms();
        let checked = self.consensus.replica().state().check_down(node, suspicion, settled, now_ms);
        if let Err(refusal @ Refusal::TooManyDown { .. }) = &checked
            && self.told.insert(node, suspicion).is_none()
        {
            tracing::error!(node, "a silent node is not declared down: {refusal}");
        }
        checked.is_ok()
    }

    async fn propose(&self, node: NodeId, change: NodeChange) {
        let name = self.consensus.name_of(node);
        let command = Command::Node { node, change: change.clone() };
        let proposal = Proposal { now_ms: self.consensus.clock().now_ms(), key: None, command };
        match tokio::time::timeout(PROPOSE_MAX, self.consensus.propose(proposal)).await {
            // Not before: a leader that is cut off would say so of everybody, again and again.
            Ok(Ok((_, Ok(_)))) => match &change {
                NodeChange::Suspect => tracing::warn!(name, "a node does not answer: suspected"),
                NodeChange::Down { .. } => {
                    let lease_ms = self.settings.lease_ms;
                    tracing::error!(
                        name,
                        lease_ms,
                        "a node is down: its lease has ended, its VMs go elsewhere"
                    );
                }
                _ => tracing::info!(name, "a node answers again"),
            },
            Ok(Ok((_, Err(refusal)))) => tracing::info!(name, "not so any more: {refusal}"),
            Ok(Err(error)) => tracing::debug!(name, "cannot propose it: {error}"),
            Err(_) => tracing::debug!(name, "the proposal is not agreed in time"),
        }
    }
}
