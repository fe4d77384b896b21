//! The loops between this node and its agent. Each is level-triggered: it compares what is wanted with what is there, acts,
//! and waits for a signal; the only sleeps are pauses before something failed is tried again.
//!
//! * `send_plans` waits for a plan with another generation (or another start of the agent) and sends it;
//! * `watch_reports` asks for the next report and keeps the newest;
//! * `record` compares the newest report with the replicated state and proposes what is worth replicating: phases and
//!   ends, confirmed removals. It also sends the content that the agent misses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use blixard_agent_api::{
    AgentError, BlobRef, HostPlan, HostReport, Phase as AgentPhase, ProblemKind, VmReport,
};
use blixard_api::health::Health;
use blixard_api::placement::Arch;
use blixard_api::vm::{Desired, Phase};
use futures::{FutureExt, StreamExt};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::feed::{PlanFeed, ReplicaFeed};
use super::local::{Link, Local};
use super::{Agent, chain};
use crate::images::blobs::BlobStore;
use crate::raft::Consensus;
use crate::state::placement::{NodeChange, VmChange};
use crate::state::{Capacity, Command, Observed, Proposal, State, VmRecord};

/// How long one question for a newer report waits.
const OBSERVE_WAIT_MS: u64 = 30_000;
/// First and longest pause after the agent did not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Pause after the agent refused a plan or content could not be sent.
const REFUSED_PAUSE: Duration = Duration::from_secs(2);
/// Proposals that are under way at once.
const PROPOSALS_AT_ONCE: usize = 64;
/// Longest reason that is replicated, in characters: it may come from inside a guest.
const REASON_MAX: usize = 512;

/// The node's side of the dialogue.
#[derive(Clone)]
pub struct HostSync {
    /// The agent.
    pub agent: Arc<dyn Agent>,
    /// Where the plan comes from and news go to.
    pub consensus: Consensus,
    /// Content that the agent may miss.
    pub blobs: BlobStore,
    /// What is kept here.
    pub local: Arc<Local>,
    /// Name servers for guests.
    pub resolvers: Vec<IpAddr>,
}

/// A pause that doubles up to a limit.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(RETRY.0)
    }

    async fn pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(RETRY.1);
    }
}

impl HostSync {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let feed = ReplicaFeed::new(self.consensus.clone(), self.resolvers.clone());
        let all = async { tokio::join!(self.send_plans(feed), self.watch_reports(), self.record()) };
        stop.run_until_cancelled(all).await;
    }

    async fn send_plans(&self, mut feed: impl PlanFeed) {
        let mut hosts = self.local.changes();
        let mut backoff = Backoff::new();
        let mut newest: Option<HostPlan> = None;
        let mut sent = None;
        loop {
            hosts.mark_unchanged();
            let instance = self.local.host().seen.map(|seen| seen.report.agent_instance);
            let have = newest.as_ref().map(|plan| plan.generation.0);
            let unsent = newest.as_ref().filter(|plan| sent != Some((plan.generation.0, instance)));
            let Some(plan) = unsent.cloned() else {
                // Either sender lives as long as the node; if one is gone the node is ending.
                tokio::select! {
                    biased;
                    plan = feed.next(have) => match plan {
                        Some(plan) => newest = Some(plan),
                        None => return,
                    },
                    changed = hosts.changed() => if changed.is_err() { return },
                }
                continue;
            };
            let generation = plan.generation;
            self.local.planned(&plan, self.consensus.clock().monotonic_us());
            match self.agent.apply(plan).await {
                Ok(report) => {
                    sent = Some((generation.0, Some(report.agent_instance)));
                    backoff = Backoff::new();
                    self.local.trouble(None);
                    self.local.see(report);
                }
                Err(AgentError::Refused(problem)) => {
                    let hint = match problem.kind {
                        ProblemKind::Stale => " (did another cluster use this agent before?)",
                        _ => "",
                    };
                    tracing::error!(%generation, "the agent refuses the plan: {problem}{hint}");
                    self.local.trouble(Some(format!("the agent refuses the plan: {problem}{hint}")));
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                Err(error) => {
                    self.local.lost(chain(&error));
                    backoff.pause().await;
                }
            }
            // After a pause there may be a newer plan; it is not waited for.
            if let Some(Some(plan)) = feed.next(Some(generation.0)).now_or_never() {
                newest = Some(plan);
            }
        }
    }

    async fn watch_reports(&self) {
        let mut backoff = Backoff::new();
        loop {
            let host = self.local.host();
            let up = host.link == Link::Up;
            let newest = host.seen.filter(|_| up);
            let (instance, revision) =
                newest.map_or((0, 0), |seen| (seen.report.agent_instance, seen.report.revision));
            match self.agent.observe(instance, revision, OBSERVE_WAIT_MS).await {
                Ok(report) => {
                    if !up {
                        tracing::info!(instance = report.agent_instance, "the agent answers");
                    }
                    backoff = Backoff::new();
                    self.local.see(report);
                }
                Err(error) => {
                    let reason = chain(&error);
                    if host.link != (Link::Down { reason: reason.clone() }) {
                        tracing::warn!("the agent does not answer: {reason}");
                    }
                    self.local.lost(reason);
                    backoff.pause().await;
                }
            }
        }
    }

    async fn record(&self) {
        let mut hosts = self.local.changes();
        let mut sending: JoinSet<(BlobRef, bool)> = JoinSet::new();
        let mut under_way = BTreeSet::new();
        let mut again = false;
        loop {
            let pause = async {
                if again {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                biased;
                changed = hosts.changed() => if changed.is_err() { return },
                Some(sent) = sending.join_next(), if !sending.is_empty() => {
                    if let Ok((blob, done)) = sent {
                        under_way.remove(&blob);
                        again |= !done;
                    }
                    continue;
                }
                () = pause => {}
            }
            again = false;
            let Some(seen) = hosts.borrow_and_update().seen.clone() else { continue };
            let news = news(&self.consensus.replica().state(), self.consensus.node(), &seen.report);
            let results = futures::stream::iter(news).map(|command| self.propose(command));
            let all_done = results.buffer_unordered(PROPOSALS_AT_ONCE).fold(true, async |a, b| a && b).await;
            again |= !all_done;
            for blob in &seen.report.missing {
                if under_way.insert(*blob) {
                    sending.spawn(self.clone().send(*blob));
                }
            }
        }
    }

    async fn propose(&self, command: Command) -> bool {
        let kind = command.kind();
        let proposal = Proposal { now_ms: self.consensus.clock().now_ms(), key: None, command };
        match self.consensus.propose(proposal).await {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!("cannot propose {kind}: {error}");
                false
            }
        }
    }

    async fn send(self, blob: BlobRef) -> (BlobRef, bool) {
        let (agent, blobs) = (Arc::clone(&self.agent), self.blobs.clone());
        let digest = blob.digest;
        if blobs.open(digest).is_err()
            && let Err(error) = self.consensus.fetch_content(blob, &blobs).await
        {
            tracing::warn!(%digest, "content is neither here nor on another node: {error}");
            return (blob, false);
        }
        let sent = tokio::task::spawn_blocking(move || {
            let file = blobs.open(digest).map_err(|e| chain(&e))?;
            agent.put_blob(blob, &file).map_err(|e| chain(&e))
        });
        match sent.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(()) => {
                tracing::info!(%digest, bytes = blob.size_bytes, "content sent to the agent");
                (blob, true)
            }
            Err(reason) => {
                tracing::warn!(%digest, "cannot send content to the agent: {reason}");
                (blob, false)
            }
        }
    }
}

/// Pure: what of a report is worth replicating.
fn news(state: &State, node: u64, report: &HostReport) -> Vec<Command> {
    let mut commands = Vec::new();
    commands.extend(node_news(state, node, report));
    for told in &report.vms {
        let Some(vm) = state.vm(told.vm) else { continue };
        let mut observed = observed(told);
        // Other members would not keep it.
        observed.health = observed.health.filter(|_| state.checks_health());
        let current = vm.node == node && vm.epoch == told.epoch.0 && vm.unlisted_since == 0;
        let refused = told.refused && current && told.phase == AgentPhase::Failed && state.places();
        if refused && state.goes_elsewhere(vm, told.start.0) {
            let change = VmChange::Refused { start: told.start.0 };
            commands.push(Command::Vm { id: vm.id, epoch: vm.epoch, change });
            continue;
        }
        if vm.node == node && vm.epoch == told.epoch.0 && vm.is_news(&observed) && differs(vm, &observed) {
            let epoch = told.epoch.0;
            commands.push(Command::RecordReport { id: vm.id, node, epoch, observed: Box::new(observed) });
        }
    }
    for vm in state.vms().filter(|vm| vm.node == node && vm.desired == Desired::Gone) {
        let confirmed = report.generation.0 >= vm.unlisted_since;
        if confirmed && !report.vms.iter().any(|told| told.vm == vm.id) {
            commands.push(Command::ForgetVm { id: vm.id, epoch: vm.epoch });
        }
    }
    for vm in state.vms().filter(|vm| vm.node == node && vm.desired != Desired::Gone && vm.unlisted_since > 0)
    {
        let waits = vm.upkeep.leaving.is_some_and(|leaving| !leaving.released);
        let confirmed = report.generation.0 >= vm.unlisted_since;
        if waits && confirmed && !report.vms.iter().any(|told| told.vm == vm.id) {
            commands.push(Command::Vm { id: vm.id, epoch: vm.epoch, change: VmChange::Released });
        }
    }
    commands
}

/// What the host has, when the state knows something else. Free memory is not part of it: it changes all the time.
fn node_news(state: &State, node: u64, report: &HostReport) -> Option<Command> {
    if !state.places() {
        return None;
    }
    let has = report.capacity;
    let known = state.node(node)?.offer.capacity;
    let capacity = Capacity {
        cpus: has.cpus,
        memory_mib: has.memory_mib,
        disk_mib: has.disk_bytes >> 20,
        arch: if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 },
    };
    (has.memory_mib > 0 && known != Some(capacity))
        .then_some(Command::Node { node, change: NodeChange::Capacity(capacity) })
}

/// A reason alone may change often (a copy that goes on) and is read from the report here; it is replicated along with
/// other news, and with a failure, which it explains.
fn differs(vm: &VmRecord, observed: &Observed) -> bool {
    if observed.phase == Phase::Failed {
        return vm.observed != *observed;
    }
    // Of the health the state counts: the output is that of its beginning.
    let state = |observed: &Observed| observed.health.as_ref().map(|health| health.state);
    let same = state(&vm.observed) == state(observed);
    let health = if same { &vm.observed.health } else { &observed.health };
    vm.observed != Observed { reason: vm.observed.reason.clone(), health: health.clone(), ..observed.clone() }
}

fn observed(told: &VmReport) -> Observed {
    Observed {
        start: told.start.0,
        phase: phase(told.phase),
        reason: told.reason.as_ref().map(|text| text.chars().take(REASON_MAX).collect()),
        guest_ready: told.guest_ready,
        started_at_ms: told.started_at_ms,
        ended_at_ms: told.ended_at_ms,
        exit: told.exit.clone(),
        workload: told.workload,
        health: told
            .health
            .clone()
            .map(|health| Health { output: health.output.chars().take(REASON_MAX).collect(), ..health }),
    }
}

fn phase(phase: AgentPhase) -> Phase {
    match phase {
        AgentPhase::Pending => Phase::Pending,
        AgentPhase::Preparing => Phase::Preparing,
        AgentPhase::Starting => Phase::Starting,
        AgentPhase::Running => Phase::Running,
        AgentPhase::Paused => Phase::Paused,
        AgentPhase::Suspended => Phase::Suspended,
        AgentPhase::Stopping => Phase::Stopping,
        AgentPhase::Stopped => Phase::Stopped,
        AgentPhase::Failed => Phase::Failed,
    }
}

#[cfg(test)]
#[path = "sync_test.rs"]
mod tests;
